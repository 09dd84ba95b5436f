"""Formats a plan: as tables in Markdown, and as numbers for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .plan import CARDS, USABLE, Plan

GIB = 2**30
# TFLOP/s that fast published trainings reach. Diffusion-DPO's launchers on an A100: 26 (SD 1.5) and 15 (SDXL).
# SimpleTuner's LoRAs on an H100: 9 (SD 1.5) and 22 (SDXL). An A100 can reach 312 at most, an H100 989.
PUBLISHED_TFLOPS = 25.0


def report(plan: Plan, *, tflops: float, pairs: int, processes: int) -> str:
    """Return the tables of a plan, in Markdown.

    Args:
        tflops (`float`): TFLOP/s that training is assumed to reach on one device.
        pairs (`int`): Number of training pairs, for the estimate of the hours.
        processes (`int`): Number of processes, each on one device.
    """
    lines = ["All numbers are computed. None is measured.", "", "| stays on the device | GiB |", "|---|---:|"]
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
        f"Fits on a GPU with this memory (tensors can use {USABLE:.0%} of it): {fitting}.",
        f"A pair takes {plan.flops / plan.pairs / 1e12:.2f} TFLOP. {pairs:,} pairs take at least {hours:.1f} hours on "
        f"{processes} device(s), if each reaches {tflops:g} TFLOP/s. Published trainings of this kind reach 9 to 26 "
        "TFLOP/s. This is far below a GPU's peak, because steps with few images do not keep a GPU busy. Loading and "
        "evaluation take additional time. If you have measured the rate of your GPU, pass it as `--tflops`.",
    ]
    return "\n".join(lines)


def side_by_side(plans: Mapping[str, Plan]) -> str:
    """Return a table of several tunings in Markdown, each with its peak memory and the smallest GPU on which it
    fits."""
    lines = ["| tuning | peak, GiB | at | smallest card |", "|---|---:|---|---|"]
    for name, plan in plans.items():
        card = next((f"{card} GB" for card in CARDS if plan.fits(card)), "none of these")
        lines.append(f"| {name} | {plan.peak / GIB:.2f} | {plan.peak_moment} | {card} |")
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan's numbers as a dictionary for JSON. Memory is in bytes."""
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
