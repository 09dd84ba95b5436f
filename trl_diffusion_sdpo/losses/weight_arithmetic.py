"""Arithmetic on weights: the decay of a moving average, interpolation, the scale of a LoRA."""

from __future__ import annotations

import math

import torch


def ema_decay(step: int, max_decay: float) -> float:
    """Weight of the old average in the update after optimizer step `step`, counted from 1.

    `min(max_decay, (1 + step) / (10 + step))`, the ramp of diffusers' `EMAModel`: with a constant decay near 1, the
    average of a short run would consist mostly of the initial weights.
    """
    return min(max_decay, (1 + step) / (10 + step))


def interpolate(base: torch.Tensor, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    """`base + scale (tuned - base)`, computed in float32 and exactly `base` at 0 and `tuned` at 1. Of integer tensors,
    the nearer one.

    Returns:
        `torch.Tensor`: In the dtype of `base`.
    """
    if not base.is_floating_point():
        return base if scale < 0.5 else tuned
    return torch.lerp(base.float(), tuned.float(), scale).to(base.dtype)


def lora_scaling(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """Factor of a LoRA's product in PEFT: alpha divided by the rank, or by its square root (rsLoRA)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)
