"""Sums of what is measured on the pairs of an evaluation."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from ..losses import PreferenceLossOutput
from .meters import MetricMeter, NoiseBinMeter
from .pair_forward import PairForward, PairPredictions


class PairEvaluation:
    """The metrics of training and the change of errors at each noise bin, over the pairs of an evaluation."""

    def __init__(self, forward: PairForward, num_noise_bins: int):
        self._forward = forward
        self._metrics, self._noise_bins = MetricMeter(), NoiseBinMeter(num_noise_bins)

    def add(self, predictions: PairPredictions, real: int) -> PreferenceLossOutput:
        """Add the predictions of B pairs, whose first `real` ones are not repeated to fill up the last batch; returns
        the loss of all B pairs."""
        outputs = measured = self._forward.loss(predictions)
        pairs = len(outputs.pair_losses)
        if 0 < real < pairs:  # from the same predictions: under an engine, a forward pass would take all processes
            first = torch.arange(real, device=predictions.policy.device)
            measured = self._forward.loss(predictions.take(torch.cat([first, first + pairs])))
        # Also where no pair of this process is real: sums are reduced by name, and all processes must have the names.
        self._metrics.add({**self._forward.logged_metrics(measured), "loss": measured.loss}, real)
        if predictions.has_reference:
            noise_levels = predictions.batch.noise_levels[: len(measured.pair_errors)]
            self._noise_bins.add(noise_levels, measured.pair_errors, counts=real > 0)
        return outputs

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last call, over all processes, which must call it together."""
        return {**self._metrics.drain(accelerator), **self._noise_bins.drain(accelerator)}


def real_pairs(state: GradientState, pairs: int, rank: int) -> int:
    """How many of the `pairs` in this process's batch are not repeated to fill up the last batch of several processes,
    whose number of rows the accelerator's gradient state has."""
    if not state.end_of_dataloader or state.remainder <= 0:
        return pairs
    return max(0, min(pairs, state.remainder - rank * pairs))
