"""Write the report of an evaluation: an HTML page that works offline, and the same as Markdown."""

from __future__ import annotations

import base64
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ...reporting.run_callbacks import plots_of
from ...saving.model_card import PACKAGES
from ...saving.starting_point import run_of
from ...utils.files import VERDICT_FILE, write_atomically
from ...utils.statistics import BETTER, TOO_FEW, WORSE
from .images import image_path, settings_path
from .results import Comparison, Evaluation
from .scales import Sweep

REPORT_FILE = "report.html"
MARKDOWN_FILE = "report.md"
SHOWN_PROMPTS = 6  # prompts in each list of images
SHOWN_SIDE = 512  # longer side of the images on the page, in pixels
LIMITS = (
    "A scorer is a model of taste, not a person. If the same scorer also chose the training pairs, it favours the "
    "tuned model. A win rate says how often an image is preferred, not by how much. The intervals show how much it "
    "could change with other prompts of the same kind, and say nothing about other kinds."
)


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Write `report.html` and `report.md` into the folder of an evaluation."""
    write_atomically(folder / REPORT_FILE, html_report(folder, evaluation).encode())
    write_atomically(folder / MARKDOWN_FILE, markdown_report(evaluation).encode())


def verdict_sentence(one: Comparison, base: str) -> str:
    """Return a sentence on whether a scorer shows a model to be better than the base model."""
    result = one.result
    rate = f"{result.rate:.0%} (95 % interval {result.low:.0%} to {result.high:.0%}, {result.prompts} prompts)"
    if one.verdict == BETTER:
        return f"{one.model} is better than {base} by {one.scorer}: its win rate is {rate}."
    if one.verdict == WORSE:
        return f"{one.model} is worse than {base} by {one.scorer}: its win rate is {rate}."
    if one.verdict == TOO_FEW:
        few = f"{result.prompts} prompts are too few to tell {one.model} from {base} by {one.scorer}"
        return f"{few}: a win rate of {rate}."
    return f"{one.scorer} shows no difference between {one.model} and {base}: a win rate of {rate}."


def scale_sentence(sweep: Sweep, scorer: str) -> str:
    """Return a sentence on the scale that a scorer recommends."""
    scale = sweep.recommended[scorer]
    kind = "of the weights" if sweep.form == "weights" else "of preference guidance"
    if scale is None:
        return f"{sweep.name}: {scorer} recommends no scale {kind}: there are too few prompts."
    as_good = ", the base model" if scale == 0 else ""
    return f"{sweep.name}: the recommended scale {kind} by {scorer} is {scale:g}{as_good}."


def markdown_report(evaluation: Evaluation) -> str:
    """Return the results of an evaluation as Markdown, for example for a model card."""
    base = evaluation.models[0]
    lines = ["# Evaluation", ""]
    lines += [f"- {verdict_sentence(one, base)}" for one in evaluation.comparisons]
    lines += [f"- {scale_sentence(sweep, scorer)}" for sweep in evaluation.sweeps for scorer in evaluation.scores]
    for table in (_win_rate_table(evaluation), _means_table(evaluation)):
        head, *rows = ["| " + " | ".join(row) + " |" for row in table]
        lines += ["", head, "|---" * len(table[0]) + "|", *rows] if rows else []
    lines += ["", *evaluation.notes, *([""] if evaluation.notes else []), LIMITS, ""]
    return "\n".join(lines)


def _win_rate_table(evaluation: Evaluation) -> list[list[str]]:
    rows = [["Model", "Scorer", "Win rate", "95 % interval", "Mean change", "p (Holm)", "Ties", "Verdict"]]
    for one in evaluation.comparisons:
        result = one.result
        ends = "" if result.change_low is None else f" ({result.change_low:+.3g} to {result.change_high:+.3g})"
        rows.append(
            [
                one.model,
                one.scorer,
                f"{result.rate:.1%}",
                f"{result.low:.1%} to {result.high:.1%}",
                f"{result.mean_change:+.3g}{ends}",
                f"{one.adjusted:.2g}",
                str(result.ties),
                one.verdict,
            ]
        )
    return rows


def _means_table(evaluation: Evaluation) -> list[list[str]]:
    rows = [["Model", *evaluation.scores, "Saturation", "Diversity within a prompt"]]
    for model in evaluation.models:
        means = [f"{np.nanmean(by_model[model]):.4g}" for by_model in evaluation.scores.values()]
        looks = evaluation.looks[model]
        diversity = "needs two seeds" if np.isnan(looks["diversity"]) else f"{looks['diversity']:.3f}"
        rows.append([model, *means, f"{looks['saturation']:.3f}", diversity])
    return rows


# ---- The page -------------------------------------------------------------------------------------------------------


def html_report(folder: Path, evaluation: Evaluation) -> str:
    """Return the report as an HTML page with its images, which needs no network."""
    base, *others = evaluation.models
    swept = {model for sweep in evaluation.sweeps for model in sweep.names.values()}
    single = [model for model in others if model not in swept]
    all_models = {model: model for model in (base, *single)} if len(single) > 1 or not evaluation.scores else {}
    return template(Path(__file__).parent / "report.html").render(
        evaluation=evaluation,
        base=base,
        shown=[f"{sweep.name} at {len(sweep.names) - 1} scales" for sweep in evaluation.sweeps] + single,
        verdict_sentence=verdict_sentence,
        scale_sentence=scale_sentence,
        win_rate_table=_win_rate_table(evaluation),
        means_table=_means_table(evaluation),
        agreements=[
            (model, pair, f"{share:.0%}")
            for model, pairs in evaluation.agreement.items()
            for pair, share in pairs.items()
            if not np.isnan(share)
        ],
        sweeps=[
            (
                sweep,
                [plot for scorer in evaluation.scores for plot in _scale_plots(evaluation, sweep, scorer)],
                _rows_of_images(folder, evaluation, {f"{scale:g}": name for scale, name in sweep.names.items()}),
            )
            for sweep in evaluation.sweeps
        ],
        all_models=_rows_of_images(folder, evaluation, all_models) if all_models else [],
        examples=[(model, _examples(folder, evaluation, model)) for model in single if evaluation.scores],
        runs=_runs(folder, evaluation),
        limits=LIMITS,
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
        settings={model: settings_path(folder, model).read_text(encoding="utf-8") for model in evaluation.models},
    )


def _scale_plots(evaluation: Evaluation, sweep: Sweep, scorer: str) -> list[dict[str, Any]]:
    """Return two plots for a scorer: win rate and mean score at each scale."""
    base = float(np.nanmean(evaluation.scores[scorer][evaluation.models[0]]))
    results = {one.model: one.result for one in evaluation.comparisons if one.scorer == scorer}
    rates = {0.0: (0.5, 0.5, 0.5)}
    means = {0.0: (base, base, base)}
    for scale, name in sweep.names.items():
        if scale:
            one = results[name]
            rates[scale] = (one.rate, one.low, one.high)
            low = one.mean_change if one.change_low is None else one.change_low
            high = one.mean_change if one.change_high is None else one.change_high
            means[scale] = (base + one.mean_change, base + low, base + high)
    return [_curve(f"Win rate by {scorer}", rates, "{:.0%}"), _curve(f"Mean {scorer}", means, "{:.3g}")]


def _curve(title: str, points: dict[float, tuple[float, float, float]], number: str) -> dict[str, Any]:
    """Return a plot of values and their intervals against scales, in SVG coordinates. `points` maps each scale to a
    value and the ends of its interval; `number` formats the y axis's labels."""
    left = 66
    right = 338
    top = 34
    bottom = 180
    low = min(ends[1] for ends in points.values())
    high = max(ends[2] for ends in points.values())
    margin = (high - low) * 0.05 or 0.05

    def y(value: float) -> float:
        return round(bottom - (value - low + margin) / (high - low + 2 * margin) * (bottom - top), 1)

    return {
        "title": title,
        "ticks": [(y(value), number.format(value)) for value in np.linspace(low, high, 3)],
        "points": [
            {
                "x": round(left + scale / max(points) * (right - left), 1),
                "y": y(value),
                "low": y(start),
                "high": y(end),
                "scale": f"{scale:g}",
            }
            for scale, (value, start, end) in points.items()
        ],
    }


def _rows_of_images(
    folder: Path, evaluation: Evaluation, models: dict[str, str]
) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the first seed's image of each model for some evenly spaced prompts. `models` maps the label below an
    image to the model's name."""
    count = len(evaluation.prompts.prompts)
    scores = next(iter(evaluation.scores.values()), None)
    return [
        (
            evaluation.prompts.prompts[index],
            [
                {
                    "url": _url_of_file(image_path(folder, name, index, evaluation.seeds[0])),
                    "model": name,
                    "label": label,
                    "score": "" if scores is None else f"{scores[name][index, 0]:.3g}",
                }
                for label, name in models.items()
            ],
        )
        for index in sorted({index * (count - 1) // (SHOWN_PROMPTS - 1) for index in range(SHOWN_PROMPTS)})
    ]


def _examples(folder: Path, evaluation: Evaluation, model: str) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the prompts on which the first scorer puts the model most above the base model, and most below it, each
    with the images of the seed whose score changed most that way."""
    base = evaluation.models[0]
    by_model = next(iter(evaluation.scores.values()))
    change = by_model[model] - by_model[base]  # (prompts, seeds)

    def most(direction: int) -> list[dict[str, str]]:
        gains = np.where(np.isfinite(change), direction * change, -np.inf)
        seeds = gains.argmax(axis=1)
        best = gains.max(axis=1)
        return [
            {
                "before": _url_of_file(image_path(folder, base, index, evaluation.seeds[seeds[index]])),
                "after": _url_of_file(image_path(folder, model, index, evaluation.seeds[seeds[index]])),
                "prompt": evaluation.prompts.prompts[index],
                "change": f"{change[index, seeds[index]]:+.3g}",
            }
            for index in np.argsort(-best, kind="stable")[:SHOWN_PROMPTS].tolist()
            if best[index] > 0
        ]

    return [("scores most above the base model on", most(1)), ("scores most below the base model on", most(-1))]


def _runs(folder: Path, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return name, verdict and plots of each training run that made one of the models."""
    sources = []
    for model in evaluation.models:
        settings = json.loads(settings_path(folder, model).read_text(encoding="utf-8"))
        sources.append(run_of(Path(settings["lora"] or settings["model"])))
    runs = []
    for run in dict.fromkeys(sources):
        if not (run / TRAINER_STATE_NAME).is_file():
            continue
        verdict = run / VERDICT_FILE
        sentence = json.loads(verdict.read_text(encoding="utf-8"))["sentence"] if verdict.is_file() else ""
        plots = [
            (title, f"data:image/png;base64,{base64.b64encode((run / name).read_bytes()).decode()}")
            for name, title in plots_of(TrainerState.load_from_json(str(run / TRAINER_STATE_NAME)))
            if (run / name).is_file()
        ]
        runs.append({"name": run.name, "verdict": sentence, "plots": plots})
    return runs


def _url_of_file(path: Path) -> str:
    with Image.open(path) as image:
        return thumbnail_url(image, SHOWN_SIDE)


def thumbnail_url(image: Image.Image, side: int) -> str:
    """Return an image as a data URL for an HTML page, shrunk to at most `side` pixels on each side."""
    shown = image.convert("RGB")
    shown.thumbnail((side, side))
    if max(shown.size) <= side // 8:  # browsers blur small images when they enlarge them
        shown = shown.resize((4 * shown.width, 4 * shown.height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def template(path: Path) -> jinja2.Template:
    """Return the Jinja template in a file, which escapes all values for HTML."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template(path.name)
