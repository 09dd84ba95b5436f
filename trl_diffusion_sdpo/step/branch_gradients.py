"""One backward pass per branch, and the safeguard that combines them.

The graph is cut at the predictions, so each branch is a separate scalar `(prediction * gradient).sum()`. Every backward
pass adds to the accumulator of its branch. After the last micro-batch of an optimizer step, inner products of the
accumulators give lambda. The backend then gets the gradient `W - lambda L`, before the engine clips it and steps.
"""

from __future__ import annotations

import torch

from ..engines.gradient_backends import GradientBackend
from ..engines.gradients import Gradient, inner_products, subtract_scaled
from ..losses import Anchor, parameter_scale

WINNER, LOSER, ANCHOR = "winner", "loser", "anchor"


class BranchGradients:
    """The gradients of an optimizer step by branch, and the lambda that combines them.

    Args:
        mu (`float`): Margin in `[0, 1]`.
        anchor (`str`): What lambda protects, `"branch"` or `"error"`. See
            [`~trl_diffusion_sdpo.losses.parameter_scale`].
    """

    def __init__(self, backend: GradientBackend, *, mu: float, anchor: Anchor):
        self.backend = backend
        self.mu = mu
        self.anchor = anchor
        self.gradients: dict[str, Gradient] = {}

    def backward(self, branch: str, objective: torch.Tensor, *, retain_graph: bool = False) -> None:
        """Add a micro-batch's gradient to `"winner"`, `"loser"` or `"anchor"`. See [`GradientBackend.backward`].

        The loser's objective must have the opposite sign of its term in the loss, so that the gradient of the loss is
        winner minus loser.
        """
        accumulated = self.gradients.get(branch)
        self.gradients[branch] = self.backend.backward(objective, accumulated, retain_graph=retain_graph)

    @torch.no_grad()
    def combine(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, Gradient | None]:
        """Set `W - lambda L` as the gradient of the step.

        Returns:
            `tuple` of three values:
            - Metrics of [`~trl_diffusion_sdpo.losses.parameter_scale`].
            - Whether all gradients are finite, a boolean scalar on the device. With fp16, some steps overflow, and the
              scaler skips them.
            - Gradient of the anchor, or `None` if no micro-batch had one.

        Raises:
            `RuntimeError`: If the backward pass of a branch reached no trained weight.
        """
        gradients, self.gradients = self.gradients, {}
        for name, gradient in gradients.items():
            if all(tensor is None for tensor in gradient):
                raise RuntimeError(
                    f"Backward passes must reach trained weights. That of the {name} reached none. Check that the "
                    "denoiser uses its trained weights."
                )
            gradients[name] = self.backend.all_reduced(gradient)
        ordered = [gradients[name] for name in (WINNER, LOSER, ANCHOR) if name in gradients]
        products = self.backend.sum_over_shards(inner_products(ordered))
        scale, metrics = parameter_scale(products, self.mu, anchor=self.anchor)
        finite = products.isfinite().all()
        # If any branch is not finite, even only the anchor, NaN in the gradient makes the scaler skip the step.
        subtract_scaled(ordered[0], ordered[1], torch.where(finite, scale, torch.nan))
        self.backend.set_gradient(ordered[0])
        return {name: torch.where(finite, value, 0) for name, value in metrics.items()}, finite, gradients.get(ANCHOR)
