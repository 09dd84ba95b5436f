"""One backward pass per branch, and the safeguard hook after both.

The graph is cut at the predictions, so that each branch is a scalar `(prediction * gradient).sum()` of its own. Every
backward pass adds to the branch's own accumulator; after the last micro-batch of an optimizer step, a few inner
products give lambda, and the back end is handed the gradient `W - lambda L` before the engine clips and steps.
"""

from __future__ import annotations

import torch

from ..engines.gradient_backends import GradientBackend
from ..engines.gradients import Gradient, inner_products, subtract_scaled
from ..engines.sharding import local_tensor
from ..losses import Anchor, adamw_scale, parameter_scale
from ..losses.adamw import adamw_products, clip_scale

WINNER, LOSER, ANCHOR = "winner", "loser", "anchor"


class BranchGradients:
    """The gradients of an optimizer step by branch, and the lambda that combines them.

    Args:
        mu (`float`): Margin in `[0, 1]`.
        anchor (`str`): `"branch"` or `"error"`, what lambda protects, as
            [`~trl_diffusion_sdpo.losses.parameter_scale`] has it.
        adamw (`torch.optim.AdamW`, *optional*): Bounds lambda by its step as well; without wrappers.
        max_norm (`float`, *optional*): The gradient is clipped to it before that step.
    """

    def __init__(
        self,
        backend: GradientBackend,
        *,
        mu: float,
        anchor: Anchor,
        adamw: torch.optim.AdamW | None = None,
        max_norm: float | None = None,
    ):
        self.backend, self.mu, self.anchor = backend, mu, anchor
        self.adamw, self.max_norm = adamw, max_norm
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
        if self.adamw is not None:
            scale = metrics["safeguard/scale"] = self._bounded_by_adamw(ordered, products, scale)
            metrics["safeguard/active"] = (scale < 1).to(scale)
        finite = products.isfinite().all()
        # Where only the anchor is not finite, the step is skipped, too: NaN in the gradient does that.
        subtract_scaled(ordered[0], ordered[1], torch.where(finite, scale, torch.nan))
        self.backend.set_gradient(ordered[0])
        return {name: torch.where(finite, value, 0) for name, value in metrics.items()}, finite, gradients.get(ANCHOR)

    def _bounded_by_adamw(self, ordered: list[Gradient], products: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        parts = [[None if part is None else local_tensor(part) for part in gradient] for gradient in ordered]
        states = self.backend.adam_states(self.adamw)
        clip = clip_scale(products, scale, self.max_norm, self.backend.loss_scale)
        anchored = -1 if self.anchor == "error" else 0
        sums = adamw_products(states, self.backend.weights(), parts, anchored, scale, clip)
        return torch.minimum(scale, adamw_scale(self.backend.sum_over_shards(sums), self.mu).to(scale))
