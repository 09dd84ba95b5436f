"""Compute the decay of a moving average of weights, interpolated weights, and the scaling factor of a LoRA."""

from __future__ import annotations

import math

import torch


def ema_decay(step: int, max_decay: float) -> float:
    """Return the decay of the moving average after optimizer step `step`: the weight of the old average.

    The decay is `min(max_decay, (1 + step) / (10 + step))`, as in diffusers' `EMAModel`. Steps count from 1. With a
    constant decay near 1, the average of a short run would consist mostly of the initial weights.
    """
    return min(max_decay, (1 + step) / (10 + step))


def interpolate(base: torch.Tensor, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `base + scale (tuned - base)` in the dtype of `base`.

    The sum is computed in float32. At scale 0 the result is exactly `base`, and at scale 1 exactly `tuned`. Integer
    tensors are not interpolated: the result is `base` if the scale is below 0.5, else `tuned`.
    """
    if not base.is_floating_point():
        return base if scale < 0.5 else tuned
    return torch.lerp(base.float(), tuned.float(), scale).to(base.dtype)


def lora_scaling(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """Return PEFT's scaling factor of a LoRA: alpha divided by the rank, or by the rank's square root (rsLoRA)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)
