"""One backward pass for winners and one for losers, and the safeguard that combines the two gradients.

Winners and losers are called the two branches of the loss. The autograd graph of the loss ends at the predictions, so
the backward pass of a branch starts from the scalar `(prediction * gradient of the loss at the prediction).sum()`. The
gradients of each branch are summed over the micro-batches of an optimizer step. The sums are called W (winners) and L
(losers). After the last micro-batch, the safeguard computes lambda, its factor of L, from the inner products of W and
L. The back end gets the gradient `W - lambda L`. The Trainer or the engine clips this gradient and steps the optimizer.

The gradient of `mask_anchor` belongs to neither branch. It is summed apart from W and L, and added whole after lambda
was computed.
"""

from __future__ import annotations

import torch

from ..engines.gradient_backends import GradientBackend
from ..engines.gradients import Gradient, inner_products, subtract_scaled
from ..losses import Anchor, parameter_scale

WINNER = "winner"
LOSER = "loser"
ANCHOR = "anchor"
OUTSIDE = "mask anchor"


class BranchGradients:
    """Accumulates the gradients of an optimizer step separately for winners and losers, and combines the two gradients
    with lambda, the safeguard's factor of the losers' gradient.

    Args:
        mu (`float`): Strictness of the safeguard, in `[0, 1]`.
        anchor (`str`): Quantity that lambda keeps from rising: `"branch"` (mean of the winners' errors, weighted as in
            the loss) or `"error"` (unweighted mean of the winners' errors). See
            [`~trl_diffusion_sdpo.losses.parameter_scale`].
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
        loss is the winners' gradient minus the losers' gradient.
        """
        accumulated = self.gradients.get(branch)
        self.gradients[branch] = self.backend.backward(objective, accumulated, retain_graph=retain_graph)

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
        # If the gradient of any branch is not finite, set the combined gradient to NaN, so that the gradient scaler
        # skips the step.
        subtract_scaled(ordered[0], ordered[1], torch.where(finite, scale, torch.nan))
        if OUTSIDE in gradients:
            subtract_scaled(ordered[0], ordered[-1], -torch.ones_like(scale))
        self.backend.set_gradient(ordered[0])
        return {name: torch.where(finite, value, 0) for name, value in metrics.items()}, finite
