"""The demo's report: curves, a grid of images from equal latents, a table, the numbers, and a summary."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .methods import GUIDED_METHOD, GuidedMethod
from .pipeline import reported_captions
from .results import DemoResult, Generated, Guided, MethodResult, Score
from .world import IMAGE_SIZE, captions

CURVES_FILE, GRID_FILE = "curves.png", "grid.png"
GUIDANCE_FILE, GUIDED_GRID_FILE = "guidance.png", "grid_guided.png"
TABLE_FILE, NUMBERS_FILE, SUMMARY_FILE = "table.md", "results.json", "summary.txt"

BASE = "base"

# Okabe and Ito's palette for colour-blind readers, and the marker of each line.
STYLES = {
    BASE: ("#000000", ""),
    "sft": ("#0072B2", "s"),
    "dpo": ("#D55E00", "v"),
    "sdpo": ("#009E73", "o"),
    "sdpo_recipe": ("#CC79A7", "P"),
    GUIDED_METHOD.key: ("#882255", "*"),
    "dpo_gentle": ("#E69F00", "^"),
    "sdpo_gentle": ("#56B4E9", "D"),
}
GRID_PROMPT_EVERY = 5  # the grid shows every fifth reported prompt
GRID_ZOOM = 4


def write_report(result: DemoResult) -> tuple[str, tuple[Path, ...]]:
    """Write the report to the result's folder; returns the summary and the files."""
    folder = result.folder
    plot_curves(result, folder / CURVES_FILE)
    plot_guidance(rows_of(result), folder / GUIDANCE_FILE)
    draw_grid(result).save(folder / GRID_FILE)
    draw_grid(result, with_guidance=True).save(folder / GUIDED_GRID_FILE)
    (folder / TABLE_FILE).write_text(table(result), encoding="utf-8")
    (folder / NUMBERS_FILE).write_text(json.dumps(numbers(result), indent=2) + "\n", encoding="utf-8")
    text = summary(result)
    (folder / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
    names = (CURVES_FILE, GUIDANCE_FILE, GRID_FILE, GUIDED_GRID_FILE, TABLE_FILE, NUMBERS_FILE, SUMMARY_FILE)
    return text, tuple(folder / name for name in names)


def plot_curves(result: DemoResult, path: Path) -> None:
    """Plot winner and loser error change, lambda and the oracle's score over the steps, a line per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes seconds, and is an extra
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    for method in result.methods:
        curves, style = method.curves, _style(method)
        panels[0, 0].plot(curves.steps, curves.winner_change, **style)
        panels[0, 1].plot(curves.steps, curves.loser_change, **style)
        _plot_oracle(panels[1, 0], method, style)
        if curves.scale:
            panels[1, 1].plot(curves.scale_steps, curves.scale, **{**style, "marker": ""})
    panels[1, 0].axhline(result.base.mean, color="black", linestyle=":", label="base model")
    _name_panels(panels)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=12, frameon=False)
    kind = result.settings["pairs"].replace("_", "-")
    figure.suptitle(
        f"Pushing hard on {result.train_pairs} {kind} pairs: one seed of a toy world", fontsize=15, fontweight="bold"
    )
    figure.savefig(path)


def _plot_oracle(panel: Any, method: MethodResult, style: dict[str, Any]) -> None:
    mean = np.array([score.mean for score in method.curves.oracle])
    stderr = np.array([score.stderr for score in method.curves.oracle])
    panel.plot(method.curves.steps, mean, **style)
    panel.fill_between(method.curves.steps, mean - stderr, mean + stderr, color=style["color"], alpha=0.15, lw=0)


def _style(method: MethodResult) -> dict[str, Any]:
    colour, marker = STYLES[method.key]
    style = "--" if method.gentle else "-"
    return {"color": colour, "marker": marker, "linestyle": style, "label": method.label, "lw": 2.2, "ms": 7}


def _name_panels(panels: Any) -> None:
    titles = (
        ("Error on held-out winners, change", "up = preferred images become less likely"),
        ("Error on held-out losers, change", "up = rejected images become less likely"),
        ("Oracle score of generated images", "up = images fit their prompts better; band: ± 1 standard error"),
        ("Scale of the loser's gradient, λ", "1 = unchanged"),
    )
    for panel, (title, note) in zip(panels.flat, titles, strict=True):
        panel.set_title(title, fontsize=13, loc="left", pad=22)
        panel.text(0, 1.02, note, transform=panel.transAxes, fontsize=10.5, color="#444444")
        panel.set_xlabel("training step", fontsize=11)
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[0]:
        panel.axhline(0, color="black", linestyle=":")
    bottom, top = min(p.get_ylim()[0] for p in panels[0]), max(p.get_ylim()[1] for p in panels[0])
    for panel in panels[0]:
        panel.set_ylim(bottom, top)  # one scale for both
    panels[1, 1].set_ylim(0, 1.05)


@dataclass(frozen=True)
class Row:
    """A model in the pictures and tables; its errors are those of its saved weights."""

    key: str
    label: str
    guided: Guided
    winner_change: str
    loser_change: str
    seconds: float  # of training


def rows_of(result: DemoResult) -> list[Row]:
    """The base model, the methods, and after the recipe its images with preference guidance."""
    rows = [Row(BASE, "base model", result.guided[BASE], "0", "0", 0.0)]
    for method in result.methods:
        changes = _change(method.curves.winner_change), _change(method.curves.loser_change)
        rows.append(Row(method.key, method.label, result.guided[method.key], *changes, method.seconds))
        if method.key == GUIDED_METHOD.of:
            key = GUIDED_METHOD.key
            rows.append(Row(key, GUIDED_METHOD.label, result.guided[key], *changes, method.seconds))
    return rows


def plot_guidance(rows: list[Row], path: Path) -> None:
    """Plot score against Frechet distance, for each model from its images without classifier-free guidance to those at
    its best scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for row in rows:
        colour, marker = STYLES[row.key]
        parts = (row.guided.plain, row.guided.best)
        x, y = [_measure(part, "frechet") for part in parts], [part.score.mean for part in parts]
        style: dict[str, Any] = {"color": colour, "marker": marker or "X", "ms": 10, "linestyle": ""}
        panel.plot(x, y, color=colour, lw=1.6, alpha=0.6)
        panel.plot(x[:1], y[:1], **style, markerfacecolor="white", markeredgewidth=1.8)
        panel.plot(x[1:], y[1:], **style, label=f"{row.label} (scale {parts[1].guidance_scale:g})")
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("{x:g}")
    panel.set_title("Score and realism, without classifier-free guidance (open) and with it", fontsize=13, loc="left")
    panel.set_xlabel("Frechet distance to the world's preferred drawings (left = nearer)", fontsize=11)
    panel.set_ylabel("oracle score", fontsize=11)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    figure.savefig(path)


def draw_grid(result: DemoResult, *, with_guidance: bool = False) -> Image.Image:
    """A grid of images from equal latents: a row for every fifth reported prompt, a column for each of [`rows_of`].

    Args:
        result (`DemoResult`): The numbers and images.
        with_guidance (`bool`): Whether the images are those at each model's best scale of classifier-free guidance.

    Returns:
        `Image.Image`: With the score of each image, and the mean score of each column over the reported prompts.
    """
    samples = result.settings["samples_per_prompt"]
    shown = [caption.text for caption, reported in zip(captions(), reported_captions(), strict=True) if reported]
    rows = range(0, len(shown), GRID_PROMPT_EVERY)
    columns = rows_of(result)
    large, normal, small = (ImageFont.load_default(size) for size in (21, 15, 14))
    side, left, top, gap = GRID_ZOOM * IMAGE_SIZE, 150, 64, 14
    step_x, step_y = side + 3 * gap, side + gap + 20
    sheet = Image.new("RGB", (left + step_x * len(columns), top + step_y * len(rows) + 34), "white")
    pen = ImageDraw.Draw(sheet)
    for column, model in enumerate(columns):
        part = model.guided.best if with_guidance else model.guided.plain
        x = left + column * step_x
        short = model.label.replace("Diffusion-", "").replace("SDPO, recipe", "recipe").replace(", ", " ")
        pen.text((x + side / 2, 8), short, STYLES[model.key][0], large, anchor="ma")
        mean = f"mean {part.score.mean:.3f}" + (f", scale {part.guidance_scale:g}" if with_guidance else "")
        pen.text((x + side / 2, 34), mean, "#333333", small, anchor="ma")
        for row, prompt in enumerate(rows):
            y, index = top + row * step_y, prompt * samples
            image = Image.fromarray(part.images[index]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
            pen.rectangle((x - 1, y - 1, x + side, y + side), outline="#bbbbbb")
            pen.text((x + side / 2, y + side + 3), f"{part.scores[index]:.2f}", "#333333", small, anchor="ma")
    for row, prompt in enumerate(rows):
        words = shown[prompt].split()
        text = "\n".join([" ".join(words[:3]), " ".join(words[3:])])
        pen.multiline_text((12, top + row * step_y + side / 2), text, "black", normal, anchor="lm")
    guidance = "with classifier-free guidance at each model's best scale" if with_guidance else "without guidance"
    note = f"Equal latents in each row, {guidance}. Below each image its oracle score."
    pen.text((12, sheet.height - 28), note, "#444444", small)
    return sheet


def table(result: DemoResult) -> str:
    """The final numbers as a Markdown table."""
    rows = rows_of(result)
    lines = [
        "| method | score | with guidance (scale) | diversity | Frechet distance | winner error | loser error | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, best = row.guided.plain, row.guided.best
        measures = [
            " / ".join(f"{_measure(part, name):.3f}" for part in (plain, best)) for name in ("diversity", "frechet")
        ]
        lines.append(
            f"| {row.label} | {plain.score} | {best.score} ({best.guidance_scale:g}) | {' | '.join(measures)} "
            f"| {row.winner_change} | {row.loser_change} | {row.seconds:.0f} |"
        )
    s, images = result.settings, len(rows[0].guided.plain.scores)
    lines += [
        "",
        f"Oracle score in [0, 1], mean ± standard error over {images} images of 36 prompts from equal latents, without "
        "classifier-free guidance and with it, at the scale that is best on the other 36 prompts. Diversity, the "
        "distance of two images of one prompt, and the Frechet distance to the world's preferred drawings: without / "
        f"with guidance. Errors: changes on {result.eval_pairs} held-out pairs under fixed noise, against the base; "
        f"preference guidance ({_settings_text(GUIDED_METHOD)}, from the base) changes no weights. "
        f"{result.train_pairs} {s['pairs'].replace('_', '-')} training pairs, steps of "
        f"{s['per_device_train_batch_size']} pairs, seed {s['seed']}: one seed of a toy world.",
        "",
    ]
    lines += [
        f"- {method.label}: {method.curves.steps[-1]} steps, {_settings_text(method)}" for method in result.methods
    ]
    return "\n".join(lines) + "\n"


def numbers(result: DemoResult) -> dict[str, Any]:
    """All measurements, for JSON."""
    return {
        "settings": result.settings,
        "train_pairs": result.train_pairs,
        "eval_pairs": result.eval_pairs,
        "seconds": result.seconds,
        "base": {"oracle": result.base.mean, "oracle_stderr": result.base.stderr},
        "methods": [method.to_dict() for method in result.methods],
        "guided": {key: guided.to_dict() for key, guided in result.guided.items()},
    }


def summary(result: DemoResult) -> str:
    """The numbers, for a terminal, and what they do and do not show."""
    steps, seed = result.settings["max_steps"], result.settings["seed"]
    kind = result.settings["pairs"].replace("_", "-")
    rows = rows_of(result)
    width = max(len(row.label) for row in rows)
    lines = [
        f"What happens when one pushes hard: {steps} steps on {result.train_pairs} {kind} pairs (seed {seed})",
        "",
        f"  {'':{width}}  score            with guidance (scale)  Frechet with  winner error",
    ]
    for row in rows:
        best = row.guided.best
        scores = f"{row.guided.plain.score}    {best.score} ({best.guidance_scale:g})"
        lines.append(f"  {row.label:{width}}  {scores:35}  {_measure(best, 'frechet'):12.3f}  {row.winner_change:>12}")
    lines += ["", *_interpretation(result), ""]
    names = ", ".join((CURVES_FILE, GUIDANCE_FILE, GRID_FILE, GUIDED_GRID_FILE, TABLE_FILE, NUMBERS_FILE))
    lines += [f"Written to {result.folder}: {names}."]
    return "\n".join(lines)


def _interpretation(result: DemoResult) -> list[str]:
    """The interpretation of the numbers, whatever they are."""
    by_key = {method.key: method for method in result.methods}
    dpo, sdpo, recipe = (by_key[key] for key in ("dpo", "sdpo", "sdpo_recipe"))
    lines = [
        "Oracle: mean ± standard error, the ideal is 1. Errors: change on held-out pairs against the base model.",
        f"Error on the preferred images: {_change(dpo.curves.winner_change)} under plain Diffusion-DPO, "
        f"{_change(sdpo.curves.winner_change)} under Diffusion-SDPO, {_change(recipe.curves.winner_change)} with the "
        "recipe for keeping winners.",
        f"Oracle score without classifier-free guidance: {_compared(sdpo, dpo)};",
        f"{_compared(recipe, sdpo)}.",
        *_with_guidance(rows_of(result)),
    ]
    if "sdpo_gentle" in by_key:
        gentle = _compared(by_key["sdpo_gentle"], by_key["dpo_gentle"])
        steps = by_key["sdpo_gentle"].curves.steps[-1]
        lines.append(f"With the gentle settings (beta 500, learning rate 1e-4), after {steps} steps:\n{gentle}.")
    else:
        lines.append("Gentle settings (beta 500, learning rate 1e-4) were not run; DPO and SDPO may lie closer there.")
    lines.append(
        "This is one seed of a toy world. The safeguard acts to first order, so the winner's error can still rise,"
    )
    lines.append("and with other pairs or settings plain Diffusion-DPO can be level or ahead.")
    return lines


def _with_guidance(rows: list[Row]) -> list[str]:
    """What is left of the scores' differences in images as users generate them."""
    by_key = {row.key: row for row in rows}
    base, sdpo, recipe, guided = (by_key[key] for key in (BASE, "sdpo", GUIDED_METHOD.of, GUIDED_METHOD.key))
    without, best = base.guided.plain.score.mean, base.guided.best
    pairs = [(recipe, base), (recipe, sdpo), (guided, base), (guided, sdpo)]
    compared = [
        _comparison(a.label, b.label, a.guided.best.scores - b.guided.best.scores).replace("base model", "the base")
        for a, b in pairs
    ]
    return [
        "With classifier-free guidance, as images are usually generated, the untrained base goes from "
        f"{without:.3f} to {best.score.mean:.3f} (scale {best.guidance_scale:g}).",
        "Each model at the best of its scales:",
        *(f"{text};" for text in compared[:-1]),
        f"{compared[-1]}.",
    ]


def _measure(part: Generated, name: str) -> float:
    """A measure of images; not a number where there is one image of a prompt only."""
    return math.nan if part.measures is None else getattr(part.measures, name)


def _compared(first: MethodResult, second: MethodResult) -> str:
    return _comparison(first.label, second.label, first.scores - second.scores)


def _comparison(first: str, second: str, difference: np.ndarray) -> str:
    """Which scored higher, by the mean and standard error of the paired difference: from equal latents."""
    score = Score.of(difference)
    apart = abs(score.mean) > 2 * score.stderr
    verdict = ("ahead of" if score.mean > 0 else "behind") if apart else "not clearly different from"
    return f"{first} is {verdict} {second} (difference {score.mean:+.3f} ± {score.stderr:.3f})"


def _change(curve: list[float]) -> str:
    """The last value with its sign; zero as +0.000."""
    return f"{round(curve[-1], 3) + 0.0:+.3f}"


def _settings_text(method: MethodResult | GuidedMethod) -> str:
    return ", ".join(f"{name} {value}" for name, value in method.settings.items())
