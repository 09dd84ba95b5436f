"""A plan in words, as data, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.import_utils import require
from .advice import Advice
from .plan import CARDS, USABLE, Plan

GIB = 2**30


def report(plan: Plan, *, peak_flops: float, utilisation: float, pairs: int, processes: int) -> str:
    """The tables of a plan, in Markdown.

    Args:
        peak_flops (`float`): Floating point operations a second of the device.
        utilisation (`float`): Share of them that training reaches.
        pairs (`int`): Of which the hours are computed.
    """
    kind = "All numbers are computed, none is measured."
    if processes > 1:
        kind += " Of several processes, what stays was compared with real ones, and peaks were not."
    lines = [kind, "", "| stays on the device | GiB |", "|---|---:|"]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in plan.components.items()]
    lines += ["", "| moment of a step | peak, GiB |", "|---|---:|"]
    lines += [
        f"| {name}{' (the peak)' if name == plan.peak_moment else ''} | {size / GIB:.2f} |"
        for name, size in plan.moments.items()
    ]
    fitting = ", ".join(f"{card} GB: {'yes' if plan.fits(card) else 'no'}" for card in CARDS)
    hours = hours_of(plan, peak_flops=peak_flops, utilisation=utilisation, pairs=pairs, processes=processes)
    lines += [
        "",
        f"Trained: {plan.trained:,} of {plan.parameters:,} weights of the denoiser.",
        f"Fits ({USABLE:.0%} of a card are for tensors): {fitting}.",
        f"A pair takes {plan.flops / plan.pairs / 1e12:.2f} TFLOP; {pairs:,} pairs take {hours:.1f} hours at "
        f"{utilisation:.0%} of {peak_flops / 1e12:.0f} TFLOP/s on {processes} device(s).",
        _caches(plan, pairs),
        "On disk: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in plan.disk.items()) + ".",
    ]
    return "\n".join(lines)


def _caches(plan: Plan, pairs: int) -> str:
    parts = [f"{name} {size:,} bytes" for name, size in plan.cached.items()]
    total = sum(plan.cached.values()) * pairs / GIB
    return (
        f"Caches take of a pair: {', '.join(parts)}; at most {total:.1f} GiB for {pairs:,} pairs: images and prompts "
        "of several pairs are stored once."
    )


def hours_of(plan: Plan, *, peak_flops: float, utilisation: float, pairs: int, processes: int) -> float:
    """Hours in which the devices take `pairs` pairs."""
    return plan.flops / plan.pairs * pairs / (peak_flops * utilisation * processes) / 3600


def side_by_side(plans: Mapping[str, Plan]) -> str:
    """Peaks of several plans, and the smallest card that each fits on."""
    lines = ["| tuning | peak, GiB | at | smallest card |", "|---|---:|---|---|"]
    return "\n".join(lines + [f"| {name} | {_peak(plan)} |" for name, plan in plans.items()])


def advice_table(plan: Plan, advice: list[Advice]) -> str:
    """Candidates by what they save."""
    lines = ["| change first | options | saves, GiB | peak, GiB |", "|---|---|---:|---:|"]
    for one in advice:
        saved = (plan.peak - one.plan.peak) / GIB
        lines.append(f"| {one.words} | `{options(one.changes)}` | {saved:.2f} | {one.plan.peak / GIB:.2f} |")
    return "\n".join(lines)


def options(changes: Mapping[str, Any]) -> str:
    """Changes as words of the command line."""
    return " ".join(
        f"--{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items()
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan's numbers, in bytes."""
    return {
        "kind": "computed",
        "peak": plan.peak,
        "peak_moment": plan.peak_moment,
        "components": plan.components,
        "moments": plan.moments,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "flops_per_pair": plan.flops / plan.pairs,
        "disk": plan.disk,
        "cached_per_pair": plan.cached,
        "fits": {str(card): plan.fits(card) for card in CARDS},
    }


def chart(plan: Plan, file: Path) -> None:
    """A bar for each moment: what stays, and what the moment adds."""
    require("plots", "A chart of a plan")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    stays = sum(plan.components.values()) / GIB
    names, left = list(plan.moments), 0.0
    for name, size in plan.components.items():
        axes.barh(names, size / GIB, left=left, label=name)
        left += size / GIB
    axes.barh(
        names, [max(plan.moments[name] / GIB - stays, 0) for name in names], left=left, label="activations", hatch="//"
    )
    axes.set_xlabel("GiB, computed")
    axes.legend(fontsize="small", ncols=3)
    figure.savefig(file, dpi=120)


def _peak(plan: Plan) -> str:
    card = next((f"{card} GB" for card in CARDS if plan.fits(card)), "none of these")
    return f"{plan.peak / GIB:.2f} | {plan.peak_moment} | {card}"
