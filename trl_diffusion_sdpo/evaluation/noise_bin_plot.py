"""The change of winner and loser errors at each noise level, as evaluation logs it, and its picture."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..import_utils import require

_NAME = re.compile(r"^(?P<prefix>.*)_errors/(?P<change>winner|loser)_change_relative@(?P<level>\d+)$")


def changes_by_noise_bin(history: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Changes by noise level out of a trainer's log history.

    Args:
        history (`Sequence[Mapping]`): As `TrainerState.log_history`.

    Returns:
        `dict[str, list[dict]]`: For each evaluation's prefix (such as `eval` or `eval_ema`) its evaluations in order,
        each with `step`, and under `winner` and `loser` the change relative to the reference by level.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in history:
        here: dict[str, dict[str, Any]] = {}
        for name, value in entry.items():
            if match := _NAME.match(name):
                record = here.setdefault(match["prefix"], {"step": entry["step"], "winner": {}, "loser": {}})
                record[match["change"]][int(match["level"])] = value
        for prefix, record in here.items():
            found.setdefault(prefix, []).append(record)
    return found


def plot_noise_bins(records: Sequence[Mapping[str, Any]], num_noise_bins: int, file: str | Path) -> None:
    """Draw the change of the errors over the noise levels: the last evaluation strong, earlier ones faint.

    Args:
        records (`Sequence[Mapping]`): Evaluations of one prefix, as [`changes_by_noise_bin`] gives them; at least one.
        num_noise_bins (`int`): Number of levels between 0 and 1.
        file (`str` or `Path`): Picture to write.

    Raises:
        `MissingExtraError`: If matplotlib is not installed.
    """
    require("plots", "Drawing noise levels")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, change in zip(figure.subplots(1, 2, sharex=True), ("winner", "loser"), strict=True):
        for age, record in enumerate(reversed(records)):
            levels = sorted(record[change])
            heights = [100 * record[change][level] for level in levels]
            middles = [(level + 0.5) / num_noise_bins for level in levels]
            look = {"color": "C0" if change == "winner" else "C3", "linewidth": 2 if age == 0 else 1}
            label = f"step {record['step']}" if age == 0 else None
            axes.plot(
                middles, heights, marker="o" if age == 0 else None, alpha=max(0.1, 0.75**age), label=label, **look
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            title=f"{change}s' error", xlabel="noise level (share of noise)", ylabel="change, % of the reference's"
        )
        axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
