"""Write the demo's report: plots, images, a table, all numbers and a summary."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.statistics import holm, win_rate
from ..evaluation.report import verdict_sentence
from ..evaluation.results import Comparison
from .methods import GUIDED_FROM, GUIDED_METHOD, Method
from .oracle import oracle
from .pipeline import reported_captions
from .results import DemoResult, Guided, numbers
from .world import captions

CURVES_FILE, IMAGES_FILE = "curves.png", "images.png"
TABLE_FILE, NUMBERS_FILE = "table.md", "results.json"
BASE = "base"

# Key of a method -> colour and marker of its line in plots. Colour-blind readers can distinguish the colours.
STYLES = {
    "sft": ("#0072B2", "s"),
    "dpo": ("#D55E00", "v"),
    "sdpo": ("#009E73", "o"),
    "sdpo_recipe": ("#CC79A7", "P"),
}
PANELS = (
    ("Error on held-out winners, change", "higher = chosen images become less likely"),
    ("Error on held-out losers, change", "higher = rejected images become less likely"),
    ("Oracle score of generated images", "higher = images fit their prompts better; band: ± 1 standard error"),
    ("Scale of the loser's gradient, λ", "1 = the safeguard does not reduce the gradient"),
)
# Pairs of models that the summary compares, without classifier-free guidance (`plain`) and with it (`best`).
COMPARED = {
    "plain": (("sdpo", "dpo"), ("sdpo_recipe", "sdpo")),
    "best": (
        (GUIDED_FROM, BASE),
        (GUIDED_FROM, "sdpo"),
        (GUIDED_METHOD.key, BASE),
        (GUIDED_METHOD.key, "sdpo"),
    ),
}


def write_report(result: DemoResult) -> tuple[str, tuple[Path, ...]]:
    """Write the report into the demo's folder. Return the summary and the paths of the written files."""
    folder = result.folder
    plot_curves(result, folder / CURVES_FILE)
    (folder / TABLE_FILE).write_text(table(result), encoding="utf-8")
    (folder / NUMBERS_FILE).write_text(json.dumps(numbers(result), indent=2) + "\n", encoding="utf-8")
    write_images(result, folder / IMAGES_FILE)
    return summary(result), tuple(folder / name for name in (CURVES_FILE, IMAGES_FILE, TABLE_FILE, NUMBERS_FILE))


def write_images(result: DemoResult, path: Path) -> None:
    """Draw a row of images for each model, at the model's best guidance scale: one image of every third prompt."""
    from matplotlib.figure import Figure  # takes seconds

    rows = rows_of(result)
    samples = result.settings["samples_per_prompt"]
    captioned = zip(captions(), reported_captions(), strict=True)
    prompts = [caption.text for caption, is_reported in captioned if is_reported][::3]
    figure = Figure(figsize=(12, 1.2 * len(rows) + 0.8), dpi=100, layout="constrained")
    for panel, row in zip(figure.subplots(len(rows), 1), rows, strict=True):
        images = row.guided.best.images[::samples][::3]
        panel.imshow(np.concatenate(list(images), axis=1))
        panel.set_title(row.label, fontsize=11, loc="left")
        panel.set_xticks([])
        panel.set_yticks([])
    width = images.shape[2]
    panel.set_xticks([width * (number + 0.5) for number in range(len(prompts))], prompts, fontsize=8, rotation=20)
    figure.savefig(path)


def plot_curves(result: DemoResult, path: Path) -> None:
    """Plot four quantities over the training steps, one line per method: change of the winner error, change of the
    loser error, oracle score, and lambda."""
    from matplotlib.figure import Figure  # takes seconds

    figure = Figure(figsize=(12, 8.2), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2)
    for trained in result.methods:
        curves, (colour, marker) = trained.curves, STYLES[trained.method.key]
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": trained.method.label, "lw": 2.2, "ms": 7}
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
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))  # same y axis in both
    panels[1, 1].set_ylim(0, 1.05)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=12, frameon=False)
    title = f"Training with a high learning rate on {result.train_pairs} off-policy pairs: one seed, toy world"
    figure.suptitle(title, fontsize=15, fontweight="bold")
    figure.savefig(path)


@dataclass(frozen=True)
class Row:
    """One model's row in the tables. The changes of the errors are from the last evaluation."""

    key: str
    label: str
    guided: Guided
    winner_change: str
    loser_change: str
    seconds: float  # duration of training and evaluations


def rows_of(result: DemoResult) -> list[Row]:
    """Return one row for the base model, one for each method, and one for the recipe with preference guidance."""
    rows = [Row(BASE, "base model", result.guided[BASE], "0", "0", 0.0)]
    for trained in result.methods:
        changes = _change(trained.curves.winner_change), _change(trained.curves.loser_change)
        shown = [trained.method, GUIDED_METHOD] if trained.method.key == GUIDED_FROM else [trained.method]
        for method in shown:
            rows.append(Row(method.key, method.label, result.guided[method.key], *changes, trained.seconds))
    return rows


def table(result: DemoResult) -> str:
    """Return the final numbers of all models as a Markdown table."""
    rows = rows_of(result)
    lines = [
        "| method | score | with guidance (scale) | winner error | loser error | s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, best = row.guided.plain, row.guided.best
        lines.append(
            f"| {row.label} | {plain.score} | {best.score} ({best.guidance_scale:g}) "
            f"| {row.winner_change} | {row.loser_change} | {row.seconds:.0f} |"
        )
    settings = result.settings
    images = len(rows[0].guided.plain.scores)
    lines += [
        "",
        f"Score: the oracle's score in [0, 1], mean ± standard error over {images} images of 36 prompts. All models "
        "start from the same latents. The second score is with classifier-free guidance, at the scale with the best "
        "score on the other 36 prompts. Winner error and loser error: change of the error from the base model to the "
        f"tuned model, on {result.eval_pairs} held-out pairs under fixed noise. Preference guidance "
        f"({_settings_text(GUIDED_METHOD)}, with the base model as the reference) changes no weights. s: seconds of "
        f"training and evaluations. Training used {result.train_pairs} off-policy pairs, "
        f"{settings['per_device_train_batch_size']} pairs per step, and seed {settings['seed']}. This is one seed of a "
        "toy world.",
        "",
    ]
    for trained in result.methods:
        lines.append(f"- {trained.method.label}: {trained.curves.steps[-1]} steps, {_settings_text(trained.method)}")
    return "\n".join(lines) + "\n"


def summary(result: DemoResult) -> str:
    """Return the main numbers, and sentences that explain them, as text for a terminal."""
    rows = rows_of(result)
    width = max(len(row.label) for row in rows)
    lines = [
        f"Training with a high learning rate: {result.settings['max_steps']} steps on {result.train_pairs} "
        f"off-policy pairs (seed {result.settings['seed']})",
        "",
        f"  {'':{width}}  score            with guidance (scale)  winner error",
    ]
    for row in rows:
        best = row.guided.best
        shown = f"{row.guided.plain.score}    {best.score} ({best.guidance_scale:g})"
        lines.append(f"  {row.label:{width}}  {shown:38}  {row.winner_change:>12}")
    lines += [
        "",
        "Score: mean ± standard error of the oracle's scores; the best score is 1. Winner error: change of the error "
        "on",
        "held-out chosen images against the base model. Images of 36 prompts without classifier-free guidance:",
        *_verdicts(result, "plain"),
        "Images of the same prompts with classifier-free guidance, each model at its best scale:",
        *_verdicts(result, "best"),
        "This is one seed of a toy world. The safeguard is a first-order rule, so the winner error can still rise.",
        "With other pairs or settings, plain Diffusion-DPO can score as well or better.",
        "",
        f"Files in {result.folder}: {CURVES_FILE}, {IMAGES_FILE}, {TABLE_FILE}, {NUMBERS_FILE}.",
    ]
    return "\n".join(lines)


def _verdicts(result: DemoResult, images: str) -> list[str]:
    """Return a sentence with the win rate for each pair of models in `COMPARED`."""
    samples = result.settings["samples_per_prompt"]
    labels = {row.key: row.label for row in rows_of(result)}
    scores = {key: getattr(guided, images).scores.reshape(-1, samples) for key, guided in result.guided.items()}
    pairs = COMPARED[images]
    rates = [win_rate(scores[first], scores[second]) for first, second in pairs]
    return [
        "  " + verdict_sentence(Comparison(labels[first], oracle.name, rate, adjusted), labels[second])
        for (first, second), rate, adjusted in zip(pairs, rates, holm([rate.p_value for rate in rates]), strict=True)
    ]


def _change(curve: list[float]) -> str:
    """Return the last value of a curve as signed text with three decimals, such as +0.012 and never -0.000."""
    return f"{round(curve[-1], 3) + 0.0:+.3f}"


def _settings_text(method: Method) -> str:
    return ", ".join(f"{name} {value}" for name, value in method.settings.items())
