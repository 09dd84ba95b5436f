"""One backward pass per branch, and the safeguard hook after both.

The graph is cut at the predictions, so that each branch is a scalar `(prediction * gradient).sum()` of its own. Every
backward pass adds to the branch's own accumulator; after the last micro-batch of an optimizer step, a few inner
products give lambda, and the back end is handed the gradient `W - lambda L` before the engine clips and steps.
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
        anchor (`str`): `"branch"` or `"error"`, what lambda protects, as
            [`~trl_diffusion_sdpo.losses.parameter_scale`] has it.
    """

    def __init__(self, backend: GradientBackend, *, mu: float, anchor: Anchor):
        self.backend = backend
        self.mu = mu
        self.anchor = anchor
        self.gradients: dict[str, Gradient] = {}

    def backward(self, branch: str, objective: torch.Tensor, *, retain_graph: bool = False) -> None:
        """Add a micro-batch's gradient to `"winner"`, `"loser"` or `"anchor"`; see [`GradientBackend.backward`]. The
        loser's objective has the sign with which the gradient of the loss is winner minus loser."""
        into = self.gradients.get(branch)
        self.gradients[branch] = self.backend.backward(objective, into, retain_graph=retain_graph)

    @torch.no_grad()
    def combine(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, Gradient | None]:
        """The safeguard hook: set `W - lambda L` as the gradient of the step.

        Returns:
            The metrics of [`~trl_diffusion_sdpo.losses.parameter_scale`]; whether the gradients were finite, a boolean
            scalar on the device (with fp16 some steps overflow, and the scaler skips them); and the anchor's gradient
            where there is one.

        Raises:
            `RuntimeError`: If a branch reached no trained weight.
        """
        gradients, self.gradients = self.gradients, {}
        for name, gradient in gradients.items():
            if all(part is None for part in gradient):
                raise RuntimeError(f"The {name}'s backward pass reached no trained weight. Does the denoiser use any?")
            gradients[name] = self.backend.all_reduced(gradient)
        ordered = [gradients[name] for name in (WINNER, LOSER, ANCHOR) if name in gradients]
        products = self.backend.sum_over_shards(inner_products(ordered))
        scale, metrics = parameter_scale(products, self.mu, anchor=self.anchor)
        finite = products.isfinite().all()
        # Where only the anchor is not finite, the step is skipped, too: NaN in the gradient does that.
        subtract_scaled(ordered[0], ordered[1], torch.where(finite, scale, torch.nan))
        self.backend.set_gradient(ordered[0])
        return {name: torch.where(finite, value, 0) for name, value in metrics.items()}, finite, gradients.get(ANCHOR)
