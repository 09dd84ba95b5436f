"""The demo's report: plots, grids of images, a table, the numbers and a summary."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .methods import GUIDED_FROM, GUIDED_METHOD, Method
from .pipeline import reported_captions
from .results import DemoResult, Generated, Guided, Score
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
PANELS = (
    ("Error on held-out winners, change", "up = preferred images become less likely"),
    ("Error on held-out losers, change", "up = rejected images become less likely"),
    ("Oracle score of generated images", "up = images fit their prompts better; band: ± 1 standard error"),
    ("Scale of the loser's gradient, λ", "1 = unchanged"),
)
GRID_PROMPT_EVERY = 5  # the grid shows every fifth reported prompt
GRID_ZOOM = 4


def write_report(result: DemoResult) -> tuple[str, tuple[Path, ...]]:
    """Write the report into the result's folder. Return the summary and the files."""
    folder, text = result.folder, summary(result)
    plot_curves(result, folder / CURVES_FILE)
    plot_guidance(rows_of(result), folder / GUIDANCE_FILE)
    draw_grid(result).save(folder / GRID_FILE)
    draw_grid(result, with_guidance=True).save(folder / GUIDED_GRID_FILE)
    (folder / TABLE_FILE).write_text(table(result), encoding="utf-8")
    (folder / NUMBERS_FILE).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
    names = (CURVES_FILE, GUIDANCE_FILE, GRID_FILE, GUIDED_GRID_FILE, TABLE_FILE, NUMBERS_FILE, SUMMARY_FILE)
    return text, tuple(folder / name for name in names)


def plot_curves(result: DemoResult, path: Path) -> None:
    """Plot winner and loser error change, lambda and the oracle's score over the steps, a line for each method."""
    from matplotlib.figure import Figure  # takes seconds

    figure = Figure(figsize=(12, 8.2), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2)
    for trained in result.methods:
        curves, (colour, marker) = trained.curves, STYLES[trained.method.key]
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": trained.method.label, "lw": 2.2, "ms": 7}
        style["linestyle"] = "--" if trained.method.gentle else "-"
        panels[0, 0].plot(curves.steps, curves.winner_change, **style)
        panels[0, 1].plot(curves.steps, curves.loser_change, **style)
        mean = np.array([score.mean for score in curves.oracle])
        stderr = np.array([score.stderr for score in curves.oracle])
        panels[1, 0].plot(curves.steps, mean, **style)
        panels[1, 0].fill_between(curves.steps, mean - stderr, mean + stderr, color=colour, alpha=0.15, lw=0)
        if curves.scale:
            panels[1, 1].plot(curves.scale_steps, curves.scale, **{**style, "marker": ""})
    panels[1, 0].axhline(result.base.mean, color="black", linestyle=":", label="base model")
    for panel, (title, note) in zip(panels.flat, PANELS, strict=True):
        panel.set_title(title, fontsize=13, loc="left", pad=22)
        panel.text(0, 1.02, note, transform=panel.transAxes, fontsize=10.5, color="#444444")
        panel.set_xlabel("training step", fontsize=11)
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[0]:
        panel.axhline(0, color="black", linestyle=":")
    limits = [panel.get_ylim() for panel in panels[0]]
    for panel in panels[0]:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))  # one scale for both
    panels[1, 1].set_ylim(0, 1.05)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=12, frameon=False)
    title = f"Pushing hard on {result.train_pairs} {_kind(result)} pairs: one seed of a toy world"
    figure.suptitle(title, fontsize=15, fontweight="bold")
    figure.savefig(path)


@dataclass(frozen=True)
class Row:
    """A model in the pictures and tables. Its errors are those of its saved weights."""

    key: str
    label: str
    guided: Guided
    winner_change: str
    loser_change: str
    seconds: float  # of training


def rows_of(result: DemoResult) -> list[Row]:
    """Return the base model, the methods, and after the recipe its images with preference guidance."""
    rows = [Row(BASE, "base model", result.guided[BASE], "0", "0", 0.0)]
    for trained in result.methods:
        changes = _change(trained.curves.winner_change), _change(trained.curves.loser_change)
        shown = [trained.method, GUIDED_METHOD] if trained.method.key == GUIDED_FROM else [trained.method]
        for method in shown:
            rows.append(Row(method.key, method.label, result.guided[method.key], *changes, trained.seconds))
    return rows


def plot_guidance(rows: list[Row], path: Path) -> None:
    """Plot score against Frechet distance, for each model from its images without classifier-free guidance to those at
    its best scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), dpi=100, layout="constrained")
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
    """Return a grid of images from equal latents: a row for every fifth reported prompt, a column for each model.

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
    """Return the final numbers as a Markdown table."""
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
        f"{result.train_pairs} {_kind(result)} training pairs, steps of "
        f"{s['per_device_train_batch_size']} pairs, seed {s['seed']}: one seed of a toy world.",
        "",
    ]
    for trained in result.methods:
        lines.append(f"- {trained.method.label}: {trained.curves.steps[-1]} steps, {_settings_text(trained.method)}")
    return "\n".join(lines) + "\n"


def summary(result: DemoResult) -> str:
    """Return the numbers for a terminal, and what they do and do not show."""
    rows = rows_of(result)
    by_key = {row.key: row for row in rows}
    scores = {trained.method.key: trained.scores for trained in result.methods}
    width = max(len(row.label) for row in rows)
    lines = [
        f"What happens when one pushes hard: {result.settings['max_steps']} steps on {result.train_pairs} "
        f"{_kind(result)} pairs (seed {result.settings['seed']})",
        "",
        f"  {'':{width}}  score            with guidance (scale)  Frechet with  winner error",
    ]
    for row in rows:
        best = row.guided.best
        shown = f"{row.guided.plain.score}    {best.score} ({best.guidance_scale:g})"
        lines.append(f"  {row.label:{width}}  {shown:35}  {_measure(best, 'frechet'):12.3f}  {row.winner_change:>12}")
    lines += [
        "",
        "Score: mean ± standard error of the oracle's scores, the ideal is 1. Winner error: change on held-out pairs",
        "against the base model. Compared without classifier-free guidance:",
    ]
    pairs = [("sdpo", "dpo"), ("sdpo_recipe", "sdpo"), ("sdpo_gentle", "dpo_gentle")]
    for first, second in pairs:
        if first in scores:
            lines.append("  " + _comparison(by_key[first].label, by_key[second].label, scores[first] - scores[second]))
    lines.append("Compared with classifier-free guidance, each model at the best of its scales:")
    for first in (GUIDED_FROM, GUIDED_METHOD.key):
        for second in (BASE, "sdpo"):
            difference = by_key[first].guided.best.scores - by_key[second].guided.best.scores
            lines.append("  " + _comparison(by_key[first].label, by_key[second].label, difference))
    lines += [
        "This is one seed of a toy world. The safeguard acts to first order, so the winner's error can still rise.",
        "With other pairs or settings, such as those of `--gentle`, plain Diffusion-DPO can be level or ahead.",
        "",
        f"Written to {result.folder}: {CURVES_FILE}, {GUIDANCE_FILE}, {GRID_FILE}, {GUIDED_GRID_FILE}, {TABLE_FILE}, "
        f"{NUMBERS_FILE}.",
    ]
    return "\n".join(lines)


def _measure(part: Generated, name: str) -> float:
    """Return a measure of images; not a number if there is only one image of a prompt."""
    return math.nan if part.measures is None else getattr(part.measures, name)


def _comparison(first: str, second: str, difference: np.ndarray) -> str:
    """Say which model scored higher, by the mean and standard error of the paired difference from equal latents."""
    score = Score.of(difference)
    apart = abs(score.mean) > 2 * score.stderr
    verdict = ("ahead of" if score.mean > 0 else "behind") if apart else "not clearly different from"
    return f"{first} is {verdict} {second} (difference {score.mean:+.3f} ± {score.stderr:.3f})"


def _change(curve: list[float]) -> str:
    """Return the last value with its sign; zero is +0.000."""
    return f"{round(curve[-1], 3) + 0.0:+.3f}"


def _kind(result: DemoResult) -> str:
    return result.settings["pairs"].replace("_", "-")


def _settings_text(method: Method) -> str:
    return ", ".join(f"{name} {value}" for name, value in method.settings.items())
