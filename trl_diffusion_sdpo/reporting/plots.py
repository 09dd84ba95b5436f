"""Plots metrics of a run's log history: curves over the steps, and the change of the errors in each noise bin."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..losses import NOISE_BINS
from .history import History, evaluation_prefixes
from .sample_scores import PREFIX, WIN_RATE

Points = list[tuple[int, float]]

# ---- Curves ----------------------------------------------------------------------------------------------------------

CURVES_FILE = "curves.png"
_CHANGE = "change of the error, % of the reference's"
# Title of a panel -> its curves, each as (label, metric). The panel `_CHANGE` shows the change of these metrics in per
# cent of the reference's value.
_PANELS = {
    "loss": [("loss", "loss")],
    _CHANGE: [("winners", "errors/winner"), ("losers", "errors/loser")],
    "accuracy": [("accuracy", "rewards/accuracies")],
    "lambda": [("lambda", "safeguard/scale")],
}
_IMAGES = "win rate of the sample images"
_SHARES = ("accuracy", "lambda", _IMAGES)


def has_curves(history: History) -> bool:
    """Return whether the training loss was logged at least twice."""
    return sum("loss" in entry for entry in history) > 1


def curves_of(history: History) -> dict[str, dict[str, Points]]:
    """Return the points of all curves to plot, from a trainer's log history.

    Args:
        history (`Sequence[Mapping]`): `TrainerState.log_history`.

    Returns:
        `dict[str, dict[str, list]]`: Title of a panel -> label of a curve -> its points (step, value). A training curve
            has a label such as "winners", and the same curve of evaluations with the prefix `eval_` has the label
            "winners, eval". Changes of errors are in per cent of the reference's error. If the run has no reference,
            the panel shows the errors instead of changes.
    """
    prefixes = dict.fromkeys(prefix for entry in history for prefix in evaluation_prefixes(entry, "loss"))
    starts = {"": "", **{f"{prefix}_": f", {prefix}" for prefix in prefixes}}  # of metrics -> end of a curve's label
    relative = any(f"{start}errors/winner_change" in entry for entry in history for start in starts)
    panels: dict[str, dict[str, Points]] = {}
    for panel, curves in _PANELS.items():
        title = "error" if panel == _CHANGE and not relative else panel
        for start, evaluation in starts.items():
            for label, metric in curves:
                points = _points(history, f"{start}{metric}", change=panel == _CHANGE and relative)
                if points:
                    panels.setdefault(title, {})[f"{label}{evaluation}"] = points
    rates = [name for entry in history for name in entry if name.startswith(PREFIX) and name.endswith(WIN_RATE)]
    for name in dict.fromkeys(rates):
        points = [point for point in _points(history, name, change=False) if math.isfinite(point[1])]
        if points:
            panels.setdefault(_IMAGES, {})[name.removeprefix(PREFIX).removesuffix(WIN_RATE)] = points
    return panels


def plot_curves(history: History, file: str | Path) -> None:
    """Plot the curves of a run into an image file. Curves of evaluations have a marker at each evaluation."""
    from matplotlib.figure import Figure

    panels = curves_of(history)
    rows = -(-len(panels) // 2)
    columns = min(2, len(panels))
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for label, points in curves.items():
            marker = "o" if ", " in label or title == _IMAGES else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3, linewidth=1)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.25)
        if title in _SHARES:
            axes.set_ylim(-0.04, 1.04)
        for label in axes.legend(frameon=False, fontsize=8).get_texts():
            label.set_parse_math(False)  # names of evaluation sets may contain "$", which starts a formula
    figure.savefig(file, dpi=120)


def _points(history: History, metric: str, *, change: bool) -> Points:
    """Return the points (step, value) of a metric's curve.

    Args:
        change (`bool`): Whether to return the metric's change in per cent of the reference's value.
    """
    if not change:
        return [(entry["step"], entry[metric]) for entry in history if metric in entry]
    entries = [entry for entry in history if f"{metric}_change" in entry]
    changes = [(entry["step"], entry[f"{metric}_change"], entry[metric]) for entry in entries]
    return [(step, 100 * change / (error - change)) for step, change, error in changes if error != change]


# ---- Noise bins ------------------------------------------------------------------------------------------------------

_BIN = re.compile(r"^(?P<prefix>.*)_errors/(?P<half>winner|loser)_change_relative@(?P<noise_bin>\d+)$")


def changes_by_noise_bin(history: History) -> dict[str, dict[str, Any]]:
    """Return how the errors in each noise bin have changed, from the last evaluations in a trainer's log history.

    Returns:
        `dict[str, dict]`: Prefix of an evaluation's metrics, such as `eval` or `eval_ema` -> the last evaluation with
            this prefix: its optimizer `step`, and under `winner` and `loser` the relative change of the error in each
            noise bin.
    """
    evaluations: dict[str, dict[str, Any]] = {}
    for entry in history:
        records: dict[str, dict[str, Any]] = {}
        for name, value in entry.items():
            if match := _BIN.match(name):
                record = records.setdefault(match["prefix"], {"step": entry["step"], "winner": {}, "loser": {}})
                record[match["half"]][int(match["noise_bin"])] = value
        evaluations |= records
    return evaluations


def noise_bin_file(prefix: str) -> str:
    """Return the file name of a noise bin plot: `noise_bins.png` for metrics with the prefix `eval`,
    `noise_bins_ema.png` for `eval_ema`."""
    # Replace characters that file systems refuse in names, or that end a Markdown link on the model card.
    name = re.sub(r'[<>:"/\\|?*\s()#%]', "_", prefix.removeprefix("eval"))
    return f"noise_bins{name}.png"


def plot_noise_bins(record: Mapping[str, Any], file: str | Path) -> None:
    """Plot the change of the errors, relative to the reference's errors, over the noise level.

    Args:
        record (`Mapping`): An evaluation from [`changes_by_noise_bin`].
        file (`str` or `Path`): Image file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, half in zip(figure.subplots(1, 2, sharex=True), ("winner", "loser"), strict=True):
        bins = sorted(record[half])
        middles = [(noise_bin + 0.5) / NOISE_BINS for noise_bin in bins]
        changes = [100 * record[half][noise_bin] for noise_bin in bins]
        axes.plot(middles, changes, color="C0" if half == "winner" else "C3", marker="o")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"{half}s' error at step {record['step']}")
        axes.set(xlabel="noise level (share of noise)", ylabel="change, % of the reference's")
    figure.savefig(file, dpi=120)
