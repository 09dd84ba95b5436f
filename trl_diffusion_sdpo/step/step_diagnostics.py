"""Measurements of single optimizer steps with `safeguard="parameter"` (`safeguard_diagnostics_steps`).

A measurement logs, for comparison, the lambda that `safeguard="output"` would use. A measurement also logs how the step
changes the winners' error on the step's batch: as predicted from the gradient, and as measured after the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..engines.gradient_backends import GradientBackend
from ..engines.gradients import Gradient, inner_products
from ..engines.sharding import local_tensor
from ..losses import mean_error
from .meters import MetricMeter
from .pair_forward import NoisyBatch, PairForward, PairPredictions


@dataclass(frozen=True)
class _BeforeStep:
    """State of a measured optimizer step before its weights change."""

    winners: list[tuple[NoisyBatch, torch.Tensor]]  # for each micro-batch, the winners and their mean error `()`
    weights: list[torch.Tensor]  # trained weights, or this process's shards of them
    gradient: Gradient  # gradient of the mean winner error over the step's batch
    finite: torch.Tensor  # whether the gradient is finite; if not, the optimizer skips the step
    loss_scale: float  # factor by which fp16 training has multiplied `gradient`


class StepDiagnostics:
    """Measures every `every`-th optimizer step, and adds the results to the training metrics in `meter`. `model` is the
    policy as the engine (DDP, FSDP2, DeepSpeed) wrapped it."""

    def __init__(
        self, model: nn.Module, backend: GradientBackend, forward: PairForward, meter: MetricMeter, every: int
    ):
        self._model, self._backend, self._forward = model, backend, forward
        self._meter, self._every = meter, every
        self._winners: list[tuple[NoisyBatch, torch.Tensor]] = []  # the step's micro-batches with their mean errors
        self._steps: list[_BeforeStep] = []  # at most one: the step that the optimizer takes next, if it is measured

    def is_due(self, step: int) -> bool:
        """Return whether optimizer step `step`, counted from 1, is measured."""
        return step % self._every == 0

    def record(self, winners: NoisyBatch, predictions: PairPredictions) -> None:
        """Record the winners of a micro-batch and their error, and log the lambda that `safeguard="output"` would
        use."""
        winner_pred = predictions.policy.detach().chunk(2)[0]
        self._winners.append((winners, mean_error(winners.residual(winner_pred), over_batch=True)))
        metrics = self._forward.loss(predictions, safeguard="output").metrics
        logged = {f"safeguard/output_{name}": metrics[f"safeguard/{name}"] for name in ("scale", "cosine")}
        self._meter.add(logged, len(winners.noisy))

    def before_step(self, gradient: Gradient | None, finite: torch.Tensor) -> None:
        """If the step is measured, copy the weights and store the gradient of the mean winner error. Call this method
        just before the optimizer steps."""
        if not self._winners:
            return
        assert gradient is not None, "A measured step computes the gradient of the mean winner error."
        weights = [weight.clone() for weight in self._backend.weights()]
        loss_scale = self._backend.loss_scale  # the scaler's next step may change it
        self._steps = [_BeforeStep(self._winners, weights, gradient, finite, loss_scale)]
        self._winners = []

    @torch.no_grad()
    def after_step(self) -> None:
        """Log by how much the optimizer's step has changed the winners' error, and by how much it should have changed
        according to the gradient."""
        if not self._steps:
            return
        step = self._steps.pop()
        for winners, before in step.winners:
            residual = winners.residual(self._forward.predict(self._model, winners))
            change = mean_error(residual, over_batch=True) - before
            self._meter.add({"safeguard/realised_winner_change": change}, len(winners.noisy) * step.finite)
        moves = [now - before for now, before in zip(self._backend.weights(), step.weights, strict=True)]
        gradient = [None if tensor is None else local_tensor(tensor) for tensor in step.gradient]
        products = self._backend.sum_over_shards(inner_products([_shaped_like(gradient, moves), [*moves]]))
        predicted = torch.where(step.finite, products[0, 1] / step.loss_scale, 0)
        self._meter.add({"safeguard/predicted_winner_change": predicted}, step.finite)


def _shaped_like(gradient: Gradient, moves: list[torch.Tensor]) -> Gradient:
    """Return a gradient in float32, with each tensor in the shape of its weight. Weights without a gradient get
    zeros."""
    return [
        torch.zeros_like(move) if tensor is None else tensor.float().reshape(move.shape)
        for tensor, move in zip(gradient, moves, strict=True)
    ]
