"""One backward pass for winners and one for losers, and the safeguard that combines their gradients.

Winners and losers are the two branches of the loss. Its autograd graph ends at the predictions, so the backward pass of
a branch starts from the scalar `(prediction * gradient of the loss at the prediction).sum()`. Each branch's gradients
are summed over the micro-batches of an optimizer step, to W (winners) and L (losers). After the last one, the safeguard
computes lambda from the inner products of W and L, and the back end gets `W - lambda L`, which the Trainer or the
engine clips before it steps the optimizer.

The gradient of `mask_anchor` belongs to neither branch. It is summed apart, and added whole once lambda is known.
"""

from __future__ import annotations

import torch
from torch import nn

from ..engines.gradient_backends import GradientBackend, ReplicatedBackend
from ..engines.gradients import Gradient, inner_products, subtract_scaled
from ..losses import Anchor, parameter_scale
from .split_gradients import SplitGradients

WINNER = "winner"
LOSER = "loser"
ANCHOR = "anchor"
OUTSIDE = "mask anchor"


class BranchGradients:
    """Accumulates the gradients of an optimizer step separately for winners and losers, and combines them with lambda,
    the safeguard's factor of the losers' gradient.

    Args:
        mu (`float`): Strictness of the safeguard, in `[0, 1]`.
        anchor (`str`): What lambda keeps from rising: the mean of the winners' errors, weighted as in the loss
            (`"branch"`) or plain (`"error"`). See [`~trl_diffusion_sdpo.losses.parameter_scale`].
    """

    def __init__(self, backend: GradientBackend, *, mu: float, anchor: Anchor):
        self.backend = backend
        self.mu = mu
        self.anchor = anchor
        self.gradients: dict[str, Gradient] = {}

    def backward(self, branch: str, objective: torch.Tensor, *, retain_graph: bool = False) -> None:
        """Run a backward pass from `objective`, and add the gradient to the accumulated gradient of `branch`
        (`"winner"`, `"loser"`, `"anchor"` or `"mask anchor"`). See [`GradientBackend.backward`].

        The losers' objective must have the opposite sign of the losers' term in the loss, so that the gradient of the
        loss is the winners' minus the losers'.
        """
        accumulated = self.gradients.get(branch)
        self.gradients[branch] = self.backend.backward(objective, accumulated, retain_graph=retain_graph)

    def split(self, denoiser: nn.Module) -> SplitGradients | None:
        """Return what splits the gradients of a whole batch, or `None` where the engine needs one of winners and one of
        losers."""
        if not isinstance(self.backend, ReplicatedBackend) or not self.backend.splits_rows:
            return None
        return SplitGradients(denoiser, self.backend.weights)

    def backward_split(self, objective: torch.Tensor, leaves: tuple[list[torch.Tensor], list[torch.Tensor]]) -> None:
        """Run one backward pass from `objective`, whose gradient at the two lists of [`SplitGradients.leaves`] is that
        of the winners and that of the losers, the latter with the sign of [`~BranchGradients.backward`]."""
        assert isinstance(self.backend, ReplicatedBackend), "Of the other back ends, `splits_rows` is false."
        winners, losers = leaves
        into = [*self.gradients[WINNER], *self.gradients[LOSER]] if self.gradients else None
        both = self.backend.backward_at([*winners, *losers], objective, into)
        self.gradients = {WINNER: both[: len(winners)], LOSER: both[len(winners) :]}

    @torch.no_grad()
    def combine(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Set `W - lambda L`, plus the gradient of `mask_anchor`, as the gradient with which the optimizer steps.

        Returns:
            `tuple` of two values:
            - Metrics of [`~trl_diffusion_sdpo.losses.parameter_scale`].
            - Whether all gradients are finite, as a boolean scalar on the device. With fp16, gradients sometimes
              overflow, and the gradient scaler then skips the step.

        Raises:
            `RuntimeError`: If the backward pass of a branch gave no trained weight a gradient.
        """
        gradients = self.gradients
        self.gradients = {}
        for name, gradient in gradients.items():
            if all(tensor is None for tensor in gradient):
                raise RuntimeError(
                    f"Each backward pass must give trained weights a gradient, and that of the {name} gave none. Check "
                    "that the denoiser uses its trained weights."
                )
            gradients[name] = self.backend.all_reduced(gradient)
        ordered = [gradients[name] for name in (WINNER, LOSER, ANCHOR, OUTSIDE) if name in gradients]
        products = self.backend.sum_over_shards(inner_products(ordered))
        branches = len(ordered) - (OUTSIDE in gradients)
        scale, metrics = parameter_scale(products[:branches, :branches], self.mu, anchor=self.anchor)
        finite = products.isfinite().all()
        # A branch that is not finite makes the combined gradient NaN, so that the gradient scaler skips the step.
        subtract_scaled(ordered[0], ordered[1], torch.where(finite, scale, torch.nan))
        if OUTSIDE in gradients:
            subtract_scaled(ordered[0], ordered[-1], -torch.ones_like(scale))
        self.backend.set_gradient(ordered[0])
        return {name: torch.where(finite, value, 0) for name, value in metrics.items()}, finite
