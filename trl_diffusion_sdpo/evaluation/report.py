"""Write an evaluation's report: one HTML file that works offline, and the same results in Markdown."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..reporting.run_callbacks import plots_of
from ..saving.model_card import PACKAGES
from ..saving.starting_point import run_of
from ..utils.files import VERDICT_FILE, VERDICT_PLOT, write_atomically
from .images import image_path, settings_path

if TYPE_CHECKING:
    from .evaluate import Comparison, Evaluation
    from .scales import Sweep

REPORT_FILE = "report.html"
MARKDOWN_FILE = "report.md"
SHOWN_PROMPTS = 6  # number of best and of worst prompts shown per model
SHOWN_SIDE = 512  # longer side of the images on the page, in pixels
LIMITS = (
    "A scorer is a model of taste, not a person. If the same scorer also chose the training pairs, it favours the "
    "tuned model. A win rate says how often an image is preferred, not by how much. The intervals show how much the "
    "rate could change with other prompts of the same kind. They say nothing about other kinds of prompts."
)


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Write `report.html` and `report.md` into the folder of an evaluation."""
    write_atomically(folder / REPORT_FILE, html_report(folder, evaluation).encode())
    write_atomically(folder / MARKDOWN_FILE, markdown_report(evaluation).encode())


def verdict_sentence(one: Comparison, base: str) -> str:
    """Return the result of a comparison as a sentence."""
    result = one.result
    rate = f"{result.rate:.0%} (95 % interval {result.low:.0%} to {result.high:.0%}, {result.prompts} prompts)"
    if one.verdict == "better":
        return f"{one.model} is better than {base} by {one.scorer}: it wins {rate}."
    if one.verdict == "worse":
        return f"{one.model} is worse than {base} by {one.scorer}: it wins only {rate}."
    return f"{one.scorer} shows no difference between {one.model} and {base}: a win rate of {rate}."


def scale_sentence(sweep: Sweep, scorer: str) -> str:
    """Return the recommended scale as a sentence."""
    scale = sweep.recommended[scorer]
    kind = "of the weights" if sweep.form == "weights" else "of preference guidance"
    if scale is None:
        return f"{sweep.name}: {scorer} recommends no scale {kind}, because there are too few prompts."
    as_good = ", so the base is as good" if scale == 0 else ""
    return f"{sweep.name}: the recommended scale {kind} by {scorer} is {scale:g}{as_good}."


def markdown_report(evaluation: Evaluation) -> str:
    """Return the results as Markdown, for example for a model card."""
    base = evaluation.models[0]
    lines = ["# Evaluation", ""]
    lines += [f"- {verdict_sentence(one, base)}" for one in evaluation.comparisons]
    lines += [f"- {scale_sentence(sweep, scorer)}" for sweep in evaluation.sweeps for scorer in evaluation.scores]
    lines += ["", "| Model | Scorer | Win rate | 95 % interval | Mean change | p (Holm) | Ties | Verdict |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(evaluation)]
    lines += ["", "| Model | " + " | ".join(evaluation.scores) + " | Saturation | Diversity within a prompt |"]
    lines += ["|---" * (len(evaluation.scores) + 3) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _mean_rows(evaluation)]
    lines += ["", *evaluation.notes, *([""] if evaluation.notes else []), LIMITS, ""]
    return "\n".join(lines)


def _rows(evaluation: Evaluation) -> Iterator[list[str]]:
    for one in evaluation.comparisons:
        result = one.result
        yield [
            one.model,
            one.scorer,
            f"{result.rate:.1%}",
            f"{result.low:.1%} to {result.high:.1%}",
            f"{result.mean_change:+.3g} ({result.change_low:+.3g} to {result.change_high:+.3g})",
            f"{one.adjusted:.2g}",
            str(result.ties),
            one.verdict,
        ]


def _mean_rows(evaluation: Evaluation) -> Iterator[list[str]]:
    for model in evaluation.models:
        means = [f"{np.nanmean(by_model[model]):.4g}" for by_model in evaluation.scores.values()]
        looks = evaluation.looks[model]
        yield [model, *means, f"{looks['saturation']:.3f}", _number(looks["diversity"])]


def _number(value: float) -> str:
    return "needs two seeds" if np.isnan(value) else f"{value:.3f}"


# ---- The page -------------------------------------------------------------------------------------------------------


def html_report(folder: Path, evaluation: Evaluation) -> str:
    """Return the HTML page. It contains its images and uses neither the network nor other files."""
    base = evaluation.models[0]
    verdicts = "".join(
        f'<li class="{one.verdict.split()[0]}">{_text(verdict_sentence(one, base))}</li>'
        for one in evaluation.comparisons
    )
    notes = "".join(f"<li>{_text(note)}</li>" for note in evaluation.notes)
    means = ["Model", *evaluation.scores, "Saturation", "Diversity within a prompt"]
    agreements = "".join(
        f"<li>{_text(pair)} prefer the same of {_text(model)} and {_text(base)} on {share:.0%} of the prompts.</li>"
        for model, pairs in evaluation.agreement.items()
        for pair, share in pairs.items()
        if not np.isnan(share)
    )
    swept = {model for sweep in evaluation.sweeps for model in sweep.names.values()}
    single = [model for model in evaluation.models[1:] if model not in swept]
    shown = [f"{sweep.name} at {len(sweep.names) - 1} scales" for sweep in evaluation.sweeps] + single
    parts = [
        f"<h1>{_text(', '.join(shown) + ' against ' if shown else '')}{_text(base)}</h1>",
        f"<p>{len(evaluation.prompts.prompts)} prompts, {len(evaluation.seeds)} images each, from equal noise.</p>",
        f'<ul class="verdicts">{verdicts}</ul>',
        _win_rates(evaluation) if evaluation.comparisons else "",
        "<h2>Means</h2>",
        _table(means, _mean_rows(evaluation)),
        "<p>Scorers tend to reward saturated images. Training often makes the images of a prompt more alike.</p>",
        f"<ul>{agreements}</ul>" if agreements else "",
        *(_scales(folder, evaluation, sweep) for sweep in evaluation.sweeps),
        _images_of_all(folder, evaluation, [base, *single]) if len(single) > 1 or not evaluation.scores else "",
        _examples(folder, evaluation, single) if single and evaluation.scores else "",
        _training(folder, evaluation),
        "<h2>What the numbers do not show</h2>",
        f"<p>{LIMITS}</p>",
        f"<ul>{notes}</ul>" if notes else "",
        "<h2>Settings</h2>",
        f"<p>{', '.join(f'{name} {version(name)}' for name in PACKAGES)}</p>",
        *(_settings(folder, model) for model in evaluation.models),
    ]
    title = _text(f"Evaluation against {base}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>{''.join(parts)}</main>"
        f'<dialog id="large"><img alt=""></dialog><script>{_SCRIPT}</script></body></html>\n'
    )


def _training(folder: Path, evaluation: Evaluation) -> str:
    """Return, as HTML, verdict and plots of each training run among the models."""
    runs = []
    for model in evaluation.models:
        settings = json.loads(settings_path(folder, model).read_text(encoding="utf-8"))
        runs.append(run_of(Path(settings["lora"] or settings["model"])))
    parts = []
    for run in dict.fromkeys(runs):
        if not (run / TRAINER_STATE_NAME).is_file():
            continue
        parts.append(f"<h2>Training of {_text(run.name)}</h2>")
        if (run / VERDICT_FILE).is_file():
            parts.append(f"<p>{_text(json.loads((run / VERDICT_FILE).read_text(encoding='utf-8'))['sentence'])}</p>")
        for name, title in plots_of(TrainerState.load_from_json(str(run / TRAINER_STATE_NAME))):
            if name != VERDICT_PLOT and (run / name).is_file():
                url = f"data:image/png;base64,{base64.b64encode((run / name).read_bytes()).decode()}"
                parts.append(f'<h3>{_text(title)}</h3><div class="scroll"><img class="plot" src="{url}" alt=""></div>')
    return "".join(parts)


def _settings(folder: Path, model: str) -> str:
    settings = settings_path(folder, model).read_text(encoding="utf-8")
    return f"<details><summary>{_text(model)}</summary><pre>{_text(settings)}</pre></details>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _win_rates(evaluation: Evaluation) -> str:
    head = ["Model", "Scorer", "Win rate", "95 % interval", "Mean change", "p (Holm)", "Ties", "Verdict"]
    return (
        "<h2>Win rates</h2>"
        "<p>A win rate is the share of prompts on which the model's image scores higher. A tie counts one half. The "
        f"line in the middle is one half: no difference.</p>{_plot(evaluation)}{_table(head, _rows(evaluation))}"
    )


def _plot(evaluation: Evaluation) -> str:
    """Return an SVG with the win rates and their intervals. Each label is above its bar, so that phones have room."""
    left, right, step = 20, 380, 40

    def x(rate: float) -> float:
        return left + rate * (right - left)

    height = step * len(evaluation.comparisons) + 36
    marks = []
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        kind = "middle" if rate == 0.5 else "grid"
        marks.append(f'<line class="{kind}" x1="{x(rate)}" x2="{x(rate)}" y1="8" y2="{height - 28}"/>')
        marks.append(f'<text x="{x(rate)}" y="{height - 10}" text-anchor="middle">{rate:.0%}</text>')
    for position, one in enumerate(evaluation.comparisons):
        y = 34 + step * position
        result = one.result
        marks.append(f'<text class="label" x="{left}" y="{y - 12}">{_text(f"{one.model}, {one.scorer}"[:48])}</text>')
        kind = one.verdict.split()[0]
        marks.append(f'<line class="bar {kind}" x1="{x(result.low)}" x2="{x(result.high)}" y1="{y}" y2="{y}"/>')
        marks.append(f'<circle class="{kind}" cx="{x(result.rate)}" cy="{y}" r="6"/>')
    return f'<svg viewBox="0 0 400 {height}" role="img" aria-label="Win rates">{"".join(marks)}</svg>'


# ---- Scales ---------------------------------------------------------------------------------------------------------


def _scales(folder: Path, evaluation: Evaluation, sweep: Sweep) -> str:
    """Return, as HTML, plots of win rate and mean score by scale, and a row of images by scale for some prompts."""
    recommendations = "".join(f"<li>{_text(scale_sentence(sweep, scorer))}</li>" for scorer in evaluation.scores)
    plots = "".join(_scale_plots(evaluation, sweep, scorer) for scorer in evaluation.scores)
    rows = _rows_of_images(folder, evaluation, {f"{scale:g}": name for scale, name in sweep.names.items()})
    form = "the weights" if sweep.form == "weights" else "preference guidance"
    return (
        f"<h2>{_text(sweep.name)} by scale of {form}</h2><ul>{recommendations}</ul>"
        f'<div class="plots">{plots}</div>'
        f"<p>Scale 0 is {_text(evaluation.models[0])}. The bars are 95 % intervals.</p>{rows}"
    )


def _scale_plots(evaluation: Evaluation, sweep: Sweep, scorer: str) -> str:
    base = float(np.nanmean(evaluation.scores[scorer][evaluation.models[0]]))
    results = {one.model: one.result for one in evaluation.comparisons if one.scorer == scorer}
    rates = {0.0: (0.5, 0.5, 0.5)}
    means = {0.0: (base, base, base)}
    for scale, name in sweep.names.items():
        if scale:
            one = results[name]
            rates[scale] = (one.rate, one.low, one.high)
            means[scale] = (base + one.mean_change, base + one.change_low, base + one.change_high)
    return _curve(f"Win rate by {scorer}", rates, "{:.0%}") + _curve(f"Mean {scorer}", means, "{:.3g}")


def _curve(title: str, points: dict[float, tuple[float, float, float]], number: str) -> str:
    """Return an SVG that plots values with intervals against scales. The dashed line is the base."""
    left, right, top, bottom = 56, 348, 34, 180
    low = min(ends[1] for ends in points.values())
    high = max(ends[2] for ends in points.values())
    margin = (high - low) * 0.05 or 0.05
    low, high = low - margin, high + margin
    widest = max(points)

    def x(scale: float) -> float:
        return left + 10 + scale / widest * (right - left - 20)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    marks = [f'<text x="4" y="16">{_text(title)}</text>']
    for value in np.linspace(low + margin, high - margin, 3):
        marks.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        marks.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{number.format(value)}</text>')
    base = y(points[0.0][0])
    marks.append(f'<line class="middle" x1="{left}" x2="{right}" y1="{base:.1f}" y2="{base:.1f}"/>')
    line = " ".join(f"{x(scale):.1f},{y(values[0]):.1f}" for scale, values in points.items())
    marks.append(f'<polyline class="curve" points="{line}"/>')
    for scale, (value, start, end) in points.items():
        at = f"{x(scale):.1f}"
        marks.append(f'<line class="bar" x1="{at}" x2="{at}" y1="{y(start):.1f}" y2="{y(end):.1f}"/>')
        marks.append(f'<circle cx="{at}" cy="{y(value):.1f}" r="5"/>')
        marks.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{scale:g}</text>')
    return f'<svg class="curve" viewBox="0 0 360 206" role="img" aria-label="{_text(title)}">{"".join(marks)}</svg>'


# ---- Images ---------------------------------------------------------------------------------------------------------


def _images_of_all(folder: Path, evaluation: Evaluation, models: list[str]) -> str:
    return f"<h2>All models</h2>{_rows_of_images(folder, evaluation, {model: model for model in models})}"


def _rows_of_images(folder: Path, evaluation: Evaluation, models: dict[str, str]) -> str:
    """Return a row of images for some prompts, one for each model, from the noise of the first seed.

    Args:
        models (`dict[str, str]`): Label below an image -> name of the model.
    """
    count = len(evaluation.prompts.prompts)
    scorer, by_model = next(iter(evaluation.scores.items()), ("", {}))
    rows = []
    for index in sorted({index * count // SHOWN_PROMPTS for index in range(SHOWN_PROMPTS)}):
        figures = []
        for label, name in models.items():
            image = (
                f'<img src="{_data_url(image_path(folder, name, index, evaluation.seeds[0]))}" alt="{_text(name)}">'
            )
            score = f" <b>{by_model[name][index, 0]:.3g}</b>" if scorer else ""
            figures.append(f"<figure>{image}<figcaption>{_text(label)}{score}</figcaption></figure>")
        rows.append(f'<h3>{_text(evaluation.prompts.prompts[index])}</h3><div class="row">{"".join(figures)}</div>')
    scores = f", with their scores by {_text(scorer)}" if scorer else ""
    return (
        f"<p>Images of equal noise{scores}. The prompts are spread evenly over the list. Click an image to enlarge it."
        f"</p>{''.join(rows)}"
    )


def _examples(folder: Path, evaluation: Evaluation, models: list[str]) -> str:
    """Return each model's best and worst prompts by the first scorer, with a slider that compares both images."""
    base = evaluation.models[0]
    scorer, by_model = next(iter(evaluation.scores.items()))
    sections = []
    for model in models:
        difference = by_model[model] - by_model[base]
        present = [index for index in range(len(difference)) if np.isfinite(difference[index]).any()]
        change = {index: float(np.nanmean(difference[index])) for index in present}
        gains = sorted((index for index in present if change[index] > 0), key=lambda index: -change[index])
        losses = sorted((index for index in present if change[index] < 0), key=lambda index: change[index])
        parts = []
        for title, indices in (("gains most", gains[:SHOWN_PROMPTS]), ("loses most", losses[:SHOWN_PROMPTS])):
            if indices:
                figures = "".join(_figure(folder, evaluation, model, index, difference[index]) for index in indices)
                parts.append(f'<h3>{_text(model)} {title}</h3><div class="figures">{figures}</div>')
        state = " open" if len(models) == 1 else ""
        sections.append(
            f"<details{state}><summary>{_text(model)} and {_text(base)}</summary>{''.join(parts)}</details>"
        )
    return (
        f"<h2>Best and worst prompts, by {_text(scorer)}</h2>"
        f"<p>Left of the slider is {_text(base)}, right of it the model, from equal noise. The number is the mean "
        f"change over seeds. Click an image to enlarge it.</p>{''.join(sections)}"
    )


def _figure(folder: Path, evaluation: Evaluation, model: str, index: int, difference: np.ndarray) -> str:
    seed = evaluation.seeds[int(np.isfinite(difference).argmax())]
    before, after = (_data_url(image_path(folder, name, index, seed)) for name in (evaluation.models[0], model))
    caption = _text(evaluation.prompts.prompts[index])
    change = f"{np.nanmean(difference):+.3g}"
    return (
        f'<figure><div class="pair"><img src="{before}" alt="{_text(evaluation.models[0])}"><img class="over" '
        f'src="{after}" alt="{_text(model)}"></div><input type="range" value="50" aria-label="Compare">'
        f"<figcaption>{caption} <b>{change}</b></figcaption></figure>"
    )


def _data_url(path: Path) -> str:
    with Image.open(path) as image:
        shown = image.convert("RGB")
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    if max(shown.size) <= SHOWN_SIDE // 8:  # browsers blur small images
        shown = shown.resize((4 * shown.width, 4 * shown.height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_STYLE = """
:root{color-scheme:light dark;--line:#8886;--good:#1a7f37;--bad:#c62828;--none:#777}
body{font:16px/1.5 system-ui,sans-serif;margin:0}
main{max-width:960px;margin:auto;padding:16px}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.2rem;margin-top:2em;overflow-wrap:anywhere}
.verdicts{padding:0;list-style:none}.verdicts li{border-left:5px solid var(--none);padding:4px 12px;margin:8px 0}
.verdicts .better{border-color:var(--good)}.verdicts .worse{border-color:var(--bad)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:4px 10px;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
svg{display:block;width:100%;max-width:520px;font-size:12px;fill:currentColor}
.label{paint-order:stroke;stroke:Canvas;stroke-width:4px}
.grid{stroke:var(--line)}.middle{stroke:currentColor;stroke-dasharray:4 3}
.bar{stroke-width:4;stroke:var(--none)}.bar.better{stroke:var(--good)}.bar.worse{stroke:var(--bad)}
circle{fill:var(--none)}circle.better{fill:var(--good)}circle.worse{fill:var(--bad)}
.figures{display:grid;grid-template-columns:repeat(3,1fr);gap:16px}
@media(max-width:600px){.figures{grid-template-columns:repeat(2,1fr);gap:10px}}
summary{cursor:pointer;padding:6px 0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:16px}
polyline{fill:none;stroke:currentColor;stroke-width:1.5}
.row{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(96px,150px);gap:8px;overflow-x:auto}
.row img{width:100%;display:block;cursor:zoom-in}h3{font-size:.95rem;margin:1.2em 0 .4em}
figure{margin:0}.pair{position:relative;cursor:zoom-in}
.pair img{width:100%;display:block;image-rendering:auto}
.pair .over{position:absolute;inset:0;height:100%;clip-path:inset(0 0 0 50%)}
.plot{width:100%;min-width:640px}
pre{overflow-x:auto;font-size:.8rem}input{width:100%;margin:4px 0}figcaption{font-size:.85rem;overflow-wrap:anywhere}
dialog{padding:0;border:0;background:none}dialog img{max-width:94vw;max-height:94vh;min-width:min(512px,94vw)}
dialog::backdrop{background:#000c}
"""
_SCRIPT = """
const large=document.getElementById("large"),enlarge=image=>{large.firstChild.src=image.src;large.showModal()};
for(const pair of document.querySelectorAll(".pair")){
  const over=pair.querySelector(".over"),slider=pair.parentElement.querySelector("input");
  slider.oninput=()=>over.style.clipPath=`inset(0 0 0 ${slider.value}%)`;
  pair.onclick=event=>{const share=(event.clientX-pair.getBoundingClientRect().left)/pair.clientWidth*100;
    enlarge(share<slider.value?pair.firstChild:over)};
}
for(const image of document.querySelectorAll(".row img"))image.onclick=()=>enlarge(image);
large.onclick=()=>large.close();
"""
