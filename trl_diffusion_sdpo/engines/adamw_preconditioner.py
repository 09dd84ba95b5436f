"""What AdamW makes of the two branches' gradients: the products that bound lambda by the step that is really taken.

The optimizer does not move along the gradient: it adds momentum, divides by a preconditioner, decays the weights, and
the gradient was clipped before. All of these but the preconditioner and the clipping are linear in lambda; those two
are taken at the lambda of the plain rule, which is the largest that can come out. Experimental.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from ..losses import adamw_scale
from .gradients import exact_dtype
from .sharding import local


@dataclass(frozen=True)
class AdamWState:
    """AdamW's state of one weight, or of this process's shard of it.

    Args:
        first, second (`torch.Tensor`, *optional*): Its two moments before the step, this process's part of them; `None`
            before the first.
        step (`torch.Tensor` or `float`): Steps taken.
        group (`dict[str, Any]`): `lr`, `betas`, `eps` and `weight_decay`.
    """

    first: torch.Tensor | None
    second: torch.Tensor | None
    step: torch.Tensor | float
    group: dict[str, Any]

    @classmethod
    def of(cls, state: dict[str, Any], group: dict[str, Any]) -> AdamWState:
        """From an entry of a torch optimizer's `state`, which is empty before the first step."""
        moments = (state.get(name) for name in ("exp_avg", "exp_avg_sq"))
        return cls(*(None if moment is None else local(moment) for moment in moments), state.get("step", 0.0), group)

    def split(self, sizes: list[int]) -> list[AdamWState]:
        """The states of the parts of a flat shard."""
        moments = [
            [None] * len(sizes) if moment is None else moment[: sum(sizes)].split(sizes)
            for moment in (self.first, self.second)
        ]
        return [AdamWState(first, second, self.step, self.group) for first, second in zip(*moments, strict=True)]


class AdamWPreconditioner:
    """The bound of lambda by AdamW's own step.

    Args:
        optimizer (`torch.optim.AdamW`): Without wrappers.
        max_norm (`float`, *optional*): To which the gradient is clipped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None):
        check_adamw(optimizer)
        self.optimizer = optimizer
        self.max_norm = max_norm

    def clip(self, products: torch.Tensor, scale: torch.Tensor, loss_scale: float) -> torch.Tensor:
        """See [`clip_scale`]."""
        return clip_scale(products, scale, self.max_norm, loss_scale)

    def products(self, *given: Any) -> torch.Tensor:
        """See [`adamw_products`]."""
        return adamw_products(*given)

    def bound(self, products: torch.Tensor, scale: torch.Tensor, mu: float) -> torch.Tensor:
        """The smaller of `scale` and the bound that the products, summed over processes, give."""
        return torch.minimum(scale, adamw_scale(products, mu).to(scale))


def plain_optimizer(optimizer: Any) -> Any:
    """An optimizer out of the wrappers that accelerate and DeepSpeed put around it, each of which calls it so."""
    while not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def is_plain_sgd(optimizer: Any) -> bool:
    """Whether it is SGD without momentum, which keeps nothing from step to step."""
    plain = plain_optimizer(optimizer)
    return isinstance(plain, torch.optim.SGD) and not any(group["momentum"] for group in plain.param_groups)


def check_adamw(optimizer: Any) -> None:
    """Raise `ValueError` where an optimizer, unwrapped, is not torch's AdamW."""
    plain = isinstance(optimizer, torch.optim.AdamW)
    if not plain or any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups):
        raise ValueError(
            f"`safeguard_preconditioner='adamw'` needs torch's AdamW, got {type(optimizer).__name__}. Set "
            "`optim='adamw_torch'` without amsgrad, or `safeguard_preconditioner='plain'`."
        )


def clip_scale(products: torch.Tensor, scale: torch.Tensor, max_norm: float | None, loss_scale: float) -> torch.Tensor:
    """What `W - scale L` will be multiplied by before the optimizer sees it, `()`.

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
        gradients: `W`, `L` and, where there is one, `a`; a part is `None` where a weight took no part.
        anchor (`int`): Which of them is `a`.
        scale (`torch.Tensor` of shape `()`): Lambda at which the preconditioner is taken.
        clip (`torch.Tensor` of shape `()`): What the gradient is multiplied by.

    Returns:
        `torch.Tensor` of shape `(3,)`, float64: history (momentum and decay), winner and loser, of this process's
        parts.
    """
    total = torch.zeros(3, dtype=exact_dtype(scale.device), device=scale.device)
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
        along = a * group["lr"] / (1 - beta1**step) / denominator  # a, as the preconditioner sees it
        decay = group["lr"] * group["weight_decay"] * (a @ flat)
        history = beta1 * (along @ first) + decay
        fresh = (1 - beta1) * clip
        total += torch.stack([history, fresh * (along @ winner), fresh * (along @ loser)]).to(total)
    return total
