"""Guidance along the line from a reference's prediction to the policy's."""

from __future__ import annotations

import torch


def guidance_shift(reference: torch.Tensor, policy: torch.Tensor, scale: float) -> torch.Tensor:
    """What guidance adds to the policy's prediction: `(scale - 1) (policy - reference)`, float32.

    Added to the conditional and to the unconditional prediction alike, it is added once to what classifier-free
    guidance makes of them at any scale, since its weights of the two sum to 1.
    """
    return (scale - 1.0) * (policy.float() - reference.float())


def shifted(prediction: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`prediction + shift`, added in float32 and in the dtype of the prediction."""
    return (prediction.float() + shift).to(prediction.dtype)
