"""Curves from the log history of a run: loss, change of the errors, accuracy, lambda and scores of sample images."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .sample_scores import PREFIX, WIN_RATE

CURVES_FILE = "curves.png"
_CHANGE = "change of the error, % of the reference's"
# Panel -> its curves, each a label and a metric. The second panel shows the metrics' changes.
_PANELS = {
    "loss": [("loss", "loss")],
    _CHANGE: [("winners", "errors/winner"), ("losers", "errors/loser")],
    "accuracy": [("accuracy", "rewards/accuracies")],
    "lambda": [("lambda", "safeguard/scale")],
}
_IMAGES = "win rate of the sample images"
_SHARES = ("accuracy", "lambda", _IMAGES)
_EVALUATION = re.compile(r"(eval.*_)loss")

History = Sequence[Mapping[str, Any]]
Points = list[tuple[int, float]]


def has_curves(history: History) -> bool:
    """Return whether training was logged at two steps or more."""
    return sum("loss" in entry for entry in history) > 1


def curves_of(history: History) -> dict[str, dict[str, Points]]:
    """Return the curves in a trainer's log history.

    Args:
        history (`Sequence[Mapping]`): `TrainerState.log_history`.

    Returns:
        `dict[str, dict[str, list]]`: Curves of each panel by label, as points of step and value. The label is "winners"
        in training and "winners, eval" in evaluations of that prefix. Changes are in per cent of the reference's error.
        Without a reference, the panel has the errors themselves.
    """
    prefixes = [match[1] for entry in history for match in map(_EVALUATION.fullmatch, entry) if match]
    relative = any(f"{prefix}errors/winner_change" in entry for entry in history for prefix in ("", *prefixes))
    panels: dict[str, dict[str, Points]] = {}
    for panel, curves in _PANELS.items():
        title = "error" if panel == _CHANGE and not relative else panel
        for prefix in ("", *dict.fromkeys(prefixes)):
            for label, metric in curves:
                points = _points(history, f"{prefix}{metric}", change=panel == _CHANGE and relative)
                if points:
                    panels.setdefault(title, {})[f"{label}, {prefix[:-1]}" if prefix else label] = points
    rates = [name for entry in history for name in entry if name.startswith(PREFIX) and name.endswith(WIN_RATE)]
    for name in dict.fromkeys(rates):
        points = [point for point in _points(history, name, change=False) if math.isfinite(point[1])]
        if points:
            panels.setdefault(_IMAGES, {})[name.removeprefix(PREFIX).removesuffix(WIN_RATE)] = points
    return panels


def plot_curves(history: History, file: str | Path) -> None:
    """Plot the curves of a run. Those of evaluations have markers.

    Args:
        history (`Sequence[Mapping]`): `TrainerState.log_history`.
        file (`str` or `Path`): Image file to write.
    """
    from matplotlib.figure import Figure

    panels = curves_of(history)
    figure = Figure(figsize=(5 * min(2, len(panels)), 3.2 * -(-len(panels) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False)
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        _plot_panel(axes, title, curves)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(file, dpi=120)


def _plot_panel(axes: Any, title: str, curves: Mapping[str, Points]) -> None:
    if title == _IMAGES:
        axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    evaluations = list(dict.fromkeys(label.partition(", ")[2] for label in curves if ", " in label))
    for index, (label, points) in enumerate(curves.items()):
        first, _, evaluation = label.partition(", ")
        look: dict[str, Any] = {"color": "C3" if first == "losers" else "C0", "label": label}
        if title == _IMAGES:
            look |= {"color": f"C{index}", "marker": "o", "markersize": 3}
        elif evaluation:
            look |= {"marker": "o", "markersize": 3, "linestyle": ("-", "--", ":")[evaluations.index(evaluation) % 3]}
        else:
            look |= {"linewidth": 0.8, "alpha": 0.6}
        axes.plot(*zip(*points, strict=True), **look)
    axes.set(title=title, xlabel="optimizer step")
    if title in _SHARES:
        axes.set_ylim(-0.04, 1.04)
    axes.grid(alpha=0.25)
    if len(curves) > 1 or title == _IMAGES:
        for label in axes.legend(frameon=False, fontsize=8).get_texts():
            label.set_parse_math(False)  # a set's name may have a dollar sign


def _points(history: History, metric: str, *, change: bool) -> Points:
    """Return step and value of each log of a metric, or of its change in per cent of the reference's."""
    if not change:
        return [(entry["step"], entry[metric]) for entry in history if metric in entry]
    entries = [entry for entry in history if f"{metric}_change" in entry]
    changes = [(entry["step"], entry[f"{metric}_change"], entry[metric]) for entry in entries]
    return [(step, 100 * change / (error - change)) for step, change, error in changes if error != change]
