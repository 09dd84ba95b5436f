"""Tables of a plan in Markdown, and its numbers for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .plan import CARDS, USABLE, Plan

GIB = 2**30
# TFLOP/s of the fastest published trainings. Diffusion-DPO's launchers on an A100: 26 (SD 1.5) and 15 (SDXL).
# SimpleTuner's LoRAs on an H100: 9 (SD 1.5) and 22 (SDXL). The cards' peaks are 312 and 989.
PUBLISHED_TFLOPS = 25.0


def report(plan: Plan, *, tflops: float, pairs: int, processes: int) -> str:
    """Return the tables of a plan, in Markdown.

    Args:
        tflops (`float`): TFLOP/s that training reaches on one device.
        pairs (`int`): Number of pairs for the hours.
    """
    lines = ["All numbers are computed, none is measured.", "", "| stays on the device | GiB |", "|---|---:|"]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in plan.components.items()]
    lines += ["", "| moment | peak, GiB |", "|---|---:|"]
    for name, size in plan.moments.items():
        mark = " (the peak)" if name == plan.peak_moment else ""
        lines.append(f"| {name}{mark} | {size / GIB:.2f} |")
    fitting = ", ".join(f"{card} GB: {'yes' if plan.fits(card) else 'no'}" for card in CARDS)
    hours = plan.flops / plan.pairs * pairs / (tflops * 1e12 * processes) / 3600
    lines += [
        "",
        f"Trained: {plan.trained:,} of {plan.parameters:,} weights of the denoiser.",
        f"Fits ({USABLE:.0%} of a card are for tensors): {fitting}.",
        f"A pair takes {plan.flops / plan.pairs / 1e12:.2f} TFLOP. {pairs:,} pairs take at least {hours:.1f} hours on "
        f"{processes} device(s) at {tflops:g} TFLOP/s each: published trainings of this kind reach 9 to 26, far below "
        "a card's peak, because few images a step leave it waiting. Loading and evaluation come on top; `--tflops` "
        "takes the rate that you measured.",
    ]
    return "\n".join(lines)


def side_by_side(plans: Mapping[str, Plan]) -> str:
    """Return the table of what fits: peaks of several tunings, and the smallest card of each."""
    lines = ["| tuning | peak, GiB | at | smallest card |", "|---|---:|---|---|"]
    for name, plan in plans.items():
        card = next((f"{card} GB" for card in CARDS if plan.fits(card)), "none of these")
        lines.append(f"| {name} | {plan.peak / GIB:.2f} | {plan.peak_moment} | {card} |")
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan's numbers, in bytes."""
    return {
        "kind": "computed",
        "peak": plan.peak,
        "peak_moment": plan.peak_moment,
        "components": plan.components,
        "moments": plan.moments,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "flops_per_pair": plan.flops / plan.pairs,
        "fits": {str(card): plan.fits(card) for card in CARDS},
    }
