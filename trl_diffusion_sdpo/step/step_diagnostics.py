"""Measurements of single optimizer steps under the parameter-space safeguard.

A measurement logs lambda of the output space for comparison. It also logs the change of the winners' error, both
predicted from the gradient and realised by the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..engines.gradient_backends import GradientBackend
from ..engines.gradients import Gradient, inner_products
from ..engines.sharding import local_tensor
from ..losses import mean_error
from .meters import MetricMeter
from .pair_forward import NoisyBatch, PairForward, PairPredictions


@dataclass
class _Measured:
    """State of a measured step before its weights change."""

    winners: list[NoisyBatch] = field(default_factory=list)  # one batch per micro-batch
    errors: list[torch.Tensor] = field(default_factory=list)  # mean error of each micro-batch's winners, `()`
    weights: list[torch.Tensor] = field(default_factory=list)  # trained weights, or this process's shards of them
    gradient: Gradient = field(default_factory=list)  # gradient of the mean winner error over the step's batch
    finite: torch.Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))  # False if the step skips
    loss_scale: float = 1.0  # factor that `gradient` contains


class StepDiagnostics:
    """Measures every `every`-th optimizer step and adds the result to the meter of training. `model` is the policy as
    the engine wrapped it."""

    def __init__(
        self, model: nn.Module, backend: GradientBackend, forward: PairForward, meter: MetricMeter, every: int
    ):
        self._model, self._backend, self._forward = model, backend, forward
        self._meter, self._every = meter, every
        self._measured: _Measured | None = None  # set while a step is being measured

    def is_due(self, step: int) -> bool:
        """Whether optimizer step `step`, counted from 1, is measured."""
        return step % self._every == 0

    def record(self, winners: NoisyBatch, predictions: PairPredictions) -> None:
        """Record a micro-batch's winners and their error, and log lambda of the output space."""
        self._measured = self._measured or _Measured()
        self._measured.winners.append(winners)
        winner_pred = predictions.policy.detach().chunk(2)[0]
        self._measured.errors.append(mean_error(winner_pred - winners.target.float(), over_batch=True))
        metrics = self._forward.loss(predictions, safeguard="output").metrics
        logged = {f"safeguard/output_{name}": metrics[f"safeguard/{name}"] for name in ("scale", "cosine")}
        self._meter.add(logged, len(winners.noisy))

    def before_step(self, gradient: Gradient | None, finite: torch.Tensor) -> None:
        """Copy the weights and store the gradient of the mean winner error if the step is measured."""
        if self._measured is None:
            return
        assert gradient is not None, "A measured step computes the anchor's gradient."
        self._measured.gradient, self._measured.finite = gradient, finite
        self._measured.loss_scale = self._backend.loss_scale  # the scaler's next step may change it
        self._measured.weights = [weight.clone() for weight in self._backend.weights()]

    @torch.no_grad()
    def after_step(self) -> None:
        """Log the change of the winners' error by the optimizer's step, and the change that its gradient predicts."""
        measured, self._measured = self._measured, None
        if measured is None:
            return
        for winners, before in zip(measured.winners, measured.errors, strict=True):
            residual = self._forward.predict(self._model, winners) - winners.target.float()
            change = mean_error(residual, over_batch=True) - before
            self._meter.add({"safeguard/realised_winner_change": change}, len(winners.noisy) * measured.finite)
        moves = [now - before for now, before in zip(self._backend.weights(), measured.weights, strict=True)]
        gradient = [None if tensor is None else local_tensor(tensor) for tensor in measured.gradient]
        products = self._backend.sum_over_shards(inner_products([_shaped_like(gradient, moves), [*moves]]))
        predicted = torch.where(measured.finite, products[0, 1] / measured.loss_scale, 0)
        self._meter.add({"safeguard/predicted_winner_change": predicted}, measured.finite)


def _shaped_like(gradient: Gradient, moves: list[torch.Tensor]) -> Gradient:
    """Return a gradient in float32 and in the shapes of the weights. Weights without a gradient get zeros."""
    return [
        torch.zeros_like(move) if tensor is None else tensor.float().reshape(move.shape)
        for tensor, move in zip(gradient, moves, strict=True)
    ]
