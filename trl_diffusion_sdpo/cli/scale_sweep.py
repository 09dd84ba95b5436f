"""A tuned model evaluated at several scales between reference and policy: rows, their file, a table and the picture of
margin and accuracy against what became of the winners."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..import_utils import require

SWEEP_FILE, PICTURE_FILE = "sweep.json", "sweep.png"
# Key of a row -> its metric, and how the table heads it.
VALUES = {
    "margin": ("rewards/margins", "margin"),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "winner_change": ("errors/winner_change", "winner change"),
    "loser_change": ("errors/loser_change", "loser change"),
}
_WINNER_AT = "errors/winner_change_relative@"


def sweep_row(scale: float, metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, Any]:
    """What an evaluation at one scale says.

    Args:
        scale (`float`): 0 is the reference, 1 the policy.
        metrics (`Mapping[str, float]`): As the trainer's `evaluate` returns them, with a reference.
        prefix (`str`): Of their names.

    Returns:
        `dict[str, Any]`: `scale`, `margin`, `accuracy`, `winner_change`, `loser_change`, `winner_change_relative` (to
        the reference's error), and `winner_change_relative_at`, the same by noise level.
    """
    row: dict[str, Any] = {"scale": scale}
    row |= {key: metrics[f"{prefix}_{metric}"] for key, (metric, _) in VALUES.items()}
    before = metrics[f"{prefix}_errors/winner"] - row["winner_change"]
    row["winner_change_relative"] = row["winner_change"] / before if before else 0.0
    start = f"{prefix}_{_WINNER_AT}"
    levels = {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}
    row["winner_change_relative_at"] = {level: levels[level] for level in sorted(levels, key=int)}
    return row


def read_sweep(file: str | Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier sweep, to be gone on with; none if there is no file.

    Args:
        file (`str` or `Path`): What [`write_sweep`] wrote.
        settings (`Mapping[str, Any]`): Under which this sweep measures.

    Raises:
        ValueError: If the file is of a sweep with other settings, or of no sweep.
    """
    file = Path(file)
    if not file.is_file():
        return []
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        rows, theirs = stored["rows"], stored["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no sweep. Remove it, or write to another folder.") from error
    ours = json.loads(json.dumps(dict(settings)))
    differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if differing:
        listed = "; ".join(f"{name} was {theirs.get(name)!r}, is {ours.get(name)!r}" for name in differing)
        raise ValueError(f"{file} is of a sweep with other settings: {listed}. Write to another folder, or remove it.")
    return rows


def write_sweep(file: str | Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the settings that they were measured under; an interruption leaves the file as it was."""
    file = Path(file)
    draft = file.with_name(f"{file.name}.new")
    draft.write_text(json.dumps({"settings": dict(settings), "rows": list(rows)}, indent=2) + "\n", encoding="utf-8")
    draft.replace(file)


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table for the eye."""
    heads = ["scale", *(head for _, head in VALUES.values()), "winner change, %", "at the worst noise level, %"]
    lines = [heads]
    for row in rows:
        worst = max(row["winner_change_relative_at"].values(), default=math.nan)
        shares = [f"{100 * share:+.3f}" for share in (row["winner_change_relative"], worst)]
        lines.append([f"{row['scale']:g}", *(f"{row[key]:.5g}" for key in VALUES), *shares])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def plot_scale_sweep(rows: Sequence[Mapping[str, Any]], num_noise_bins: int, file: str | Path) -> None:
    """Draw margin and accuracy against the winners' change: overall, with the scales, and at each noise level.

    The accuracy at scale 0 is left out: all margins are 0 there, and none is above 0.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): As [`sweep_row`] gives them; at least one.
        num_noise_bins (`int`): Number of noise levels between 0 and 1.
        file (`str` or `Path`): Picture to write.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    require("plots", "Drawing a sweep over scales")
    from matplotlib import colormaps  # seconds to import, and an extra
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["scale"])
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for (overall, by_level), height in zip(panels, ("margin", "accuracy"), strict=True):
        shown = [row for row in rows if height == "margin" or row["scale"] > 0]
        heights = [row[height] for row in shown]
        changes = [row["winner_change"] for row in shown]
        overall.plot(changes, heights, marker="o", color="C0", linewidth=1.5)
        for row, change in zip(shown, changes, strict=True):
            overall.annotate(f"{row['scale']:g}", (change, row[height]), (5, 5), textcoords="offset points")
        for level in range(num_noise_bins):
            points = [
                (100 * row["winner_change_relative_at"][str(level)], row[height])
                for row in shown
                if str(level) in row["winner_change_relative_at"]
            ]
            if points:
                label = f"{level / num_noise_bins:.3g} to {(level + 1) / num_noise_bins:.3g}"
                colour = colormaps["viridis"](level / max(1, num_noise_bins - 1))
                by_level.plot(*zip(*points, strict=True), marker=".", color=colour, linewidth=1.2, label=label)
        overall.set_ylabel(height)
        for panel in (overall, by_level):
            panel.axvline(0, color="black", linewidth=0.8)
            panel.grid(alpha=0.25)
    panels[0, 0].set_title("all noise levels; the numbers are scales")
    panels[0, 1].set_title("winners' change at each noise level")
    panels[1, 0].set_xlabel("change of the winners' error")
    panels[1, 1].set_xlabel("change of the winners' error, % of the reference's")
    if panels[0, 1].lines[:-1]:
        panels[0, 1].legend(title="share of noise", frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)
