"""The demo's report: curves, a grid of images from equal latents, a table, the numbers, and a summary."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .pipeline import score_prompts
from .results import DemoResult, MethodResult, Score
from .world import IMAGE_SIZE

CURVES_FILE, GRID_FILE = "curves.png", "grid.png"
TABLE_FILE, NUMBERS_FILE, SUMMARY_FILE = "table.md", "results.json", "summary.txt"

# Okabe and Ito's palette for colour-blind readers, and the marker of each line.
STYLES = {
    "base": ("#000000", ""),
    "sft": ("#0072B2", "s"),
    "dpo": ("#D55E00", "v"),
    "sdpo": ("#009E73", "o"),
    "sdpo_recipe": ("#CC79A7", "P"),
    "dpo_gentle": ("#E69F00", "^"),
    "sdpo_gentle": ("#56B4E9", "D"),
}
GRID_PROMPT_EVERY = 10  # the grid shows every tenth prompt
GRID_ZOOM = 4


def write_report(result: DemoResult) -> tuple[str, tuple[Path, ...]]:
    """Write the report to the result's folder; returns the summary and the files."""
    folder = result.folder
    plot_curves(result, folder / CURVES_FILE)
    draw_grid(result).save(folder / GRID_FILE)
    (folder / TABLE_FILE).write_text(table(result), encoding="utf-8")
    (folder / NUMBERS_FILE).write_text(json.dumps(numbers(result), indent=2) + "\n", encoding="utf-8")
    text = summary(result)
    (folder / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
    names = (CURVES_FILE, GRID_FILE, TABLE_FILE, NUMBERS_FILE, SUMMARY_FILE)
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


def draw_grid(result: DemoResult) -> Image.Image:
    """A grid of images from equal latents: a row for every tenth prompt, a column for the base model and each method.

    Returns:
        `Image.Image`: With the score of each image, and the mean score of each column over all prompts.
    """
    prompts = score_prompts(result.settings["samples_per_prompt"])
    rows = range(0, len(prompts), GRID_PROMPT_EVERY * result.settings["samples_per_prompt"])
    columns = [("base", "Base", result.base, result.base_samples, result.base_scores)]
    columns += [(m.key, m.label, m.oracle, m.samples, m.scores) for m in result.methods]
    large, normal, small = (ImageFont.load_default(size) for size in (21, 15, 14))
    side, left, top, gap = GRID_ZOOM * IMAGE_SIZE, 150, 64, 14
    step_x, step_y = side + 3 * gap, side + gap + 20
    sheet = Image.new("RGB", (left + step_x * len(columns), top + step_y * len(rows) + 34), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (key, label, mean, samples, scores) in enumerate(columns):
        x = left + column * step_x
        short = label.replace("Diffusion-", "").replace(", ", " ")
        pen.text((x + side / 2, 8), short, STYLES[key][0], large, anchor="ma")
        pen.text((x + side / 2, 34), f"mean {mean.mean:.3f}", "#333333", small, anchor="ma")
        for row, index in enumerate(rows):
            y = top + row * step_y
            image = Image.fromarray(samples[index]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
            pen.rectangle((x - 1, y - 1, x + side, y + side), outline="#bbbbbb")
            pen.text((x + side / 2, y + side + 3), f"{scores[index]:.2f}", "#333333", small, anchor="ma")
    for row, index in enumerate(rows):
        words = prompts[index].split()
        text = "\n".join([" ".join(words[:3]), " ".join(words[3:])])
        pen.multiline_text((12, top + row * step_y + side / 2), text, "black", normal, anchor="lm")
    note = "Equal latents in each row. Below each image its oracle score; prompts: every tenth."
    pen.text((12, sheet.height - 28), note, "#444444", small)
    return sheet


def table(result: DemoResult) -> str:
    """The final numbers as a Markdown table."""
    lines = [
        "| method | oracle score | best evaluation | winner error change | loser error change | seconds |",
        "|---|---|---|---|---|---|",
        f"| base model | {result.base} | | 0 | 0 | |",
    ]
    for method in result.methods:
        step, best = method.best
        lines.append(
            f"| {method.label} | {method.oracle} | {best.mean:.3f} at step {step} "
            f"| {_change(method.curves.winner_change)} | {_change(method.curves.loser_change)} | {method.seconds:.0f} |"
        )
    s = result.settings
    lines += [
        "",
        f"Oracle score in [0, 1], mean ± standard error over {len(result.base_scores)} images from equal latents. "
        f"Error changes on {result.eval_pairs} held-out pairs under fixed noise, against the base model. "
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
    }


def summary(result: DemoResult) -> str:
    """The numbers, for a terminal, and what they do and do not show."""
    steps, seed = result.settings["max_steps"], result.settings["seed"]
    kind = result.settings["pairs"].replace("_", "-")
    width = max(len(method.label) for method in result.methods)
    lines = [
        f"What happens when one pushes hard: {steps} steps on {result.train_pairs} {kind} pairs (seed {seed})",
        "",
        f"  {'':{width}}  oracle score    winner error  loser error",
        f"  {'base model':{width}}  {result.base}",
    ]
    for method in result.methods:
        curves = method.curves
        changes = f"{_change(curves.winner_change):>12}  {_change(curves.loser_change):>11}"
        lines.append(f"  {method.label:{width}}  {method.oracle}  {changes}")
    lines += ["", *_interpretation(result), ""]
    lines += [f"Written to {result.folder}: {CURVES_FILE}, {GRID_FILE}, {TABLE_FILE}, {NUMBERS_FILE}."]
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
        f"Oracle score: {_comparison(sdpo, dpo)};",
        f"{_comparison(recipe, sdpo)}.",
    ]
    if "sdpo_gentle" in by_key:
        gentle = _comparison(by_key["sdpo_gentle"], by_key["dpo_gentle"])
        steps = by_key["sdpo_gentle"].curves.steps[-1]
        lines.append(f"With the gentle settings (beta 500, learning rate 1e-4), after {steps} steps:\n{gentle}.")
    else:
        lines.append("Gentle settings (beta 500, learning rate 1e-4) were not run; DPO and SDPO may lie closer there.")
    lines.append(
        "This is one seed of a toy world. The safeguard acts to first order, so the winner's error can still rise,"
    )
    lines.append("and with other pairs or settings plain Diffusion-DPO can be level or ahead.")
    return lines


def _comparison(first: MethodResult, second: MethodResult) -> str:
    """Which scored higher, by the mean and standard error of the paired difference."""
    difference = first.scores - second.scores  # from equal latents
    score = Score.of(difference)
    apart = abs(score.mean) > 2 * score.stderr
    verdict = ("ahead of" if score.mean > 0 else "behind") if apart else "not clearly different from"
    return f"{first.label} is {verdict} {second.label} (difference {score.mean:+.3f} ± {score.stderr:.3f})"


def _change(curve: list[float]) -> str:
    """The last value with its sign; zero as +0.000."""
    return f"{round(curve[-1], 3) + 0.0:+.3f}"


def _settings_text(method: MethodResult) -> str:
    return ", ".join(f"{name} {value}" for name, value in method.settings.items())
