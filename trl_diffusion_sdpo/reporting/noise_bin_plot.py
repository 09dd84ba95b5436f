"""Change of winner and loser errors in each noise bin: reads it from logs of evaluations and plots it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NAME = re.compile(r"^(?P<prefix>.*)_errors/(?P<half>winner|loser)_change_relative@(?P<noise_bin>\d+)$")


def changes_by_noise_bin(history: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the changes in a trainer's log history.

    Args:
        history (`Sequence[Mapping]`): `TrainerState.log_history`.

    Returns:
        `dict[str, list[dict]]`: For each evaluation's prefix (such as `eval` or `eval_ema`) its evaluations in order,
        each with `step`, and under `winner` and `loser` the change relative to the reference, by noise bin.
    """
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for entry in history:
        records: dict[str, dict[str, Any]] = {}
        for name, value in entry.items():
            if match := _NAME.match(name):
                record = records.setdefault(match["prefix"], {"step": entry["step"], "winner": {}, "loser": {}})
                record[match["half"]][int(match["noise_bin"])] = value
        for prefix, record in records.items():
            evaluations.setdefault(prefix, []).append(record)
    return evaluations


def noise_bin_file(prefix: str) -> str:
    """Return the plot's file name: `noise_bins.png` for the prefix `eval`, `noise_bins_ema.png` for `eval_ema`."""
    # Characters that file systems refuse in names, or that end a link on the model card.
    name = re.sub(r'[<>:"/\\|?*\s()#%]', "_", prefix.removeprefix("eval"))
    return f"noise_bins{name}.png"


def plot_noise_bins(records: Sequence[Mapping[str, Any]], num_noise_bins: int, file: str | Path) -> None:
    """Plot the change of the errors over the noise level. Earlier evaluations are more transparent.

    Args:
        records (`Sequence[Mapping]`): Evaluations of one prefix, from [`changes_by_noise_bin`]; at least one.
        num_noise_bins (`int`): Number of noise bins.
        file (`str` or `Path`): Image file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, half in zip(figure.subplots(1, 2, sharex=True), ("winner", "loser"), strict=True):
        for age, record in enumerate(reversed(records)):
            bins = sorted(record[half])
            look = {"color": "C0" if half == "winner" else "C3", "alpha": max(0.1, 0.75**age), "linewidth": 1}
            if age == 0:
                look |= {"linewidth": 2, "marker": "o", "label": f"step {record['step']}"}
            middles = [(noise_bin + 0.5) / num_noise_bins for noise_bin in bins]
            axes.plot(middles, [100 * record[half][noise_bin] for noise_bin in bins], **look)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"{half}s' error")
        axes.set(xlabel="noise level (share of noise)", ylabel="change, % of the reference's")
        axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
