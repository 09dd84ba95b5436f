"""A sweep over scales of a run's weights: a row of numbers for each scale, its file, its table and its plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_atomically
from .verdict import Estimate, Measurement

SWEEP_FILE, PLOT_FILE = "sweep.json", "sweep.png"
# Key of a row -> its metric, and its heading in the table.
VALUES = {
    "margin": ("rewards/margins", "margin"),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "winner_change": ("errors/winner_change", "winner change"),
    "loser_change": ("errors/loser_change", "loser change"),
}
_RELATIVE = "winner_change_relative"


def sweep_row(scale: float, metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, Any]:
    """The metrics of `evaluate`, with a reference, at one scale as a row of the sweep.

    Returns:
        `dict[str, Any]`: `scale`, `margin`, `accuracy`, `winner_change`, `loser_change`, `winner_change_relative` (to
        the reference's error) and `winner_change_relative_stderr` (its standard error over the pairs, `None` if
        unknown), both also by noise bin with `_at` at the end of their names, and `pairs`, their number.
    """
    row: dict[str, Any] = {"scale": scale}
    row |= {key: metrics[f"{prefix}_{metric}"] for key, (metric, _) in VALUES.items()}
    before = metrics[f"{prefix}_errors/winner"] - row["winner_change"]
    row[_RELATIVE] = row["winner_change"] / before if before else 0.0
    row[f"{_RELATIVE}_stderr"] = metrics.get(f"{prefix}_errors/{_RELATIVE}_stderr")
    for key in (_RELATIVE, f"{_RELATIVE}_stderr"):
        start = f"{prefix}_errors/{key}@"
        bins = {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}
        row[f"{key}_at"] = {noise_bin: bins[noise_bin] for noise_bin in sorted(bins, key=int)}
    row["pairs"] = metrics.get(f"{prefix}_errors/pairs")
    return row


def word_of(row: Mapping[str, Any]) -> str:
    """The verdict's word on the winners at a row's scale, `"better"`, `"unchanged"`, `"worse"`, `"ruined"` or
    `"unknown"`, by the rule of [`~trl_diffusion_sdpo.reporting.verdict.judge`]."""
    stderrs = row.get(f"{_RELATIVE}_stderr_at", {})
    changes = row[f"{_RELATIVE}_at"].items()
    return Measurement(
        step=0,
        error=1 + row[_RELATIVE],
        before=1.0,
        since="of the base",
        stderr=row.get(f"{_RELATIVE}_stderr"),
        bins={int(noise_bin): Estimate(value, stderrs.get(noise_bin)) for noise_bin, value in changes},
        pairs=row.get("pairs"),
    ).word


def percent(value: float, stderr: float | None) -> str:
    """A relative change in per cent, with its standard error if that is known."""
    return f"{100 * value:+.2f}%" + ("" if stderr is None else f" ± {100 * stderr:.2f}%")


def read_sweep(file: str | Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier sweep, which this one continues; none if there is no file.

    Raises:
        ValueError: If the file is not of a sweep, or of one with other settings.
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


def write_sweep(
    file: str | Path,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    recommended: Mapping[str, Any] | None = None,
) -> None:
    """Write the rows with their settings, and what is recommended once that is known, atomically."""
    content: dict[str, Any] = {"settings": dict(settings), "rows": list(rows)}
    if recommended is not None:
        content["recommended"] = dict(recommended)
    write_atomically(Path(file), json.dumps(content, indent=2).encode() + b"\n")


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for the terminal."""
    of_winners = ("winner change ± error", "in the worst noise bin", "verdict")
    heads = ["scale", *(head for _, head in VALUES.values()), *of_winners]
    lines = [heads]
    for row in rows:
        worst = max(row[f"{_RELATIVE}_at"].values(), default=math.nan)
        shares = [percent(row[_RELATIVE], row.get(f"{_RELATIVE}_stderr")), percent(worst, None)]
        lines.append([f"{row['scale']:g}", *(f"{row[key]:.5g}" for key in VALUES), *shares, word_of(row)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def plot_scale_sweep(rows: Sequence[Mapping[str, Any]], num_noise_bins: int, file: str | Path) -> None:
    """Plot margin and accuracy of one or more rows against the winners' change: overall, and for each noise bin.

    The accuracy at scale 0 is left out: all margins are 0 there, and none is above 0.
    """
    from matplotlib import colormaps  # seconds to import, and an extra
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["scale"])
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for (overall, by_bin), metric in zip(panels, ("margin", "accuracy"), strict=True):
        shown = [row for row in rows if metric == "margin" or row["scale"] > 0]
        overall.plot([row["winner_change"] for row in shown], [row[metric] for row in shown], marker="o")
        for row in shown:
            at = (row["winner_change"], row[metric])
            overall.annotate(f"{row['scale']:g}", at, (5, 5), textcoords="offset points")
        for noise_bin in range(num_noise_bins):
            points = [
                (100 * row["winner_change_relative_at"][str(noise_bin)], row[metric])
                for row in shown
                if str(noise_bin) in row["winner_change_relative_at"]
            ]
            if points:
                label = f"{noise_bin / num_noise_bins:.3g} to {(noise_bin + 1) / num_noise_bins:.3g}"
                colour = colormaps["viridis"](noise_bin / max(1, num_noise_bins - 1))
                by_bin.plot(*zip(*points, strict=True), marker=".", color=colour, linewidth=1.2, label=label)
        overall.set_ylabel(metric)
        for panel in (overall, by_bin):
            panel.axvline(0, color="black", linewidth=0.8)
            panel.grid(alpha=0.25)
    panels[0, 0].set_title("all noise levels; the numbers are scales")
    panels[0, 1].set_title("winners' change in each noise bin")
    panels[1, 0].set_xlabel("change of the winners' error")
    panels[1, 1].set_xlabel("change of the winners' error, % of the reference's")
    if panels[0, 1].lines[:-1]:
        panels[0, 1].legend(title="noise level", frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)
