"""How AdamW's step moves the anchored error: the inner products from which [`adamw_scale`] bounds lambda.

AdamW does not move along the gradient: it adds momentum, divides by a preconditioner and decays the weights, and the
gradient was clipped before. All of these except the preconditioner and the clipping are linear in lambda; those two are
taken at the lambda of the plain rule, the largest that can result. Experimental.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class AdamWState:
    """AdamW's state of one weight or shard.

    Args:
        first, second (`torch.Tensor`, *optional*): Moments before the step; `None` before the first step.
        step (`torch.Tensor` or `float`): Steps taken.
        group (`dict[str, Any]`): `lr`, `betas`, `eps` and `weight_decay`.
    """

    first: torch.Tensor | None
    second: torch.Tensor | None
    step: torch.Tensor | float
    group: dict[str, Any]


def clip_scale(products: torch.Tensor, scale: torch.Tensor, max_norm: float | None, loss_scale: float) -> torch.Tensor:
    """Factor by which `W - scale L` is multiplied before the optimizer sees it, `()`, in the dtype of `products`.

    Args:
        products (`torch.Tensor` of shape `(n, n)`): Inner products of `W`, `L` and others.
        scale (`torch.Tensor` of shape `()`): Lambda.
        max_norm (`float`, *optional*): Of the gradient, after `loss_scale` is divided out; `None` or 0 do not clip.
        loss_scale (`float`): By which the gradients are multiplied.
    """
    square = products[0, 0] - 2 * scale * products[0, 1] + scale.square() * products[1, 1]
    unscaled = torch.full_like(square, 1.0 / loss_scale)
    if not max_norm:
        return unscaled
    norm = square.clamp(min=0).sqrt() / loss_scale
    return unscaled * (max_norm / (norm + 1e-6)).clamp(max=1.0)


def adamw_products(
    states: Sequence[AdamWState],
    weights: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor | None]],
    anchor: int,
    scale: torch.Tensor,
    clip: torch.Tensor,
) -> torch.Tensor:
    """How the step moves along the anchor `a`, linear in lambda: it lowers the anchored error by
    `history + winner - lambda loser`.

    Args:
        states, weights: For each weight or shard, in the gradients' order.
        gradients: `W`, `L` and, where there is one, `a`; `None` for a weight without a gradient.
        anchor (`int`): Index of `a` among them.
        scale (`torch.Tensor` of shape `()`): Lambda at which the preconditioner is taken.
        clip (`torch.Tensor` of shape `()`): [`clip_scale`]; its dtype is that of the sums.

    Returns:
        `torch.Tensor` of shape `(3,)`: history (momentum and decay), winner and loser, summed over these shards.
    """
    total = torch.zeros(3, dtype=clip.dtype, device=scale.device)
    clip, scale = clip.float(), scale.float()
    for state, weight, *parts in zip(states, weights, *gradients, strict=True):
        if parts[anchor] is None:
            continue
        flat = weight.detach().float().flatten()
        winner, loser, *others = (torch.zeros_like(flat) if g is None else g.float().flatten() for g in parts)
        a = (winner, loser, *others)[anchor]
        first = torch.zeros_like(flat) if state.first is None else state.first.float().flatten()
        second = torch.zeros_like(flat) if state.second is None else state.second.float().flatten()
        (beta1, beta2), group = state.group["betas"], state.group
        step = torch.as_tensor(state.step, dtype=torch.float32).to(flat.device, non_blocking=True) + 1
        second = beta2 * second + (1 - beta2) * (clip * (winner - scale * loser)).square()
        denominator = (second / (1 - beta2**step)).sqrt() + group["eps"]
        along = a * group["lr"] / (1 - beta1**step) / denominator  # the preconditioned anchor
        decay = group["lr"] * group["weight_decay"] * (a @ flat)
        history = beta1 * (along @ first) + decay
        fresh = (1 - beta1) * clip
        total += torch.stack([history, fresh * (along @ winner), fresh * (along @ loser)]).to(total)
    return total
