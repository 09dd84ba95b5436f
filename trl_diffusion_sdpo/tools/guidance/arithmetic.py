"""Guidance along the line from the reference's to the policy's prediction or weights."""

from __future__ import annotations

import torch


def guidance_shift(reference: torch.Tensor, policy: torch.Tensor, scale: float) -> torch.Tensor:
    """Return what guidance adds to the policy's prediction: `(scale - 1) (policy - reference)`, float32.

    Add it to both the conditional and the unconditional prediction: classifier-free guidance combines them with weights
    that sum to 1, so the result contains it exactly once.
    """
    return (scale - 1.0) * (policy.float() - reference.float())


def shifted(prediction: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return `prediction + shift`, computed in float32 and cast to the dtype of the prediction."""
    return (prediction.float() + shift).to(prediction.dtype)


def interpolate(base: torch.Tensor, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `base + scale (tuned - base)` in the dtype of `base`, computed in float32.

    At scale 0 this is exactly `base`, and at scale 1 exactly `tuned`. Integer tensors are not interpolated: below 0.5
    the result is `base`, else `tuned`.
    """
    if not base.is_floating_point():
        return base if scale < 0.5 else tuned
    return torch.lerp(base.float(), tuned.float(), scale).to(base.dtype)
