"""Metrics of the pairs of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from ..engines.gradients import exact_dtype
from ..losses import PreferenceLossOutput, noise_bin_changes, noise_bin_of
from ..models.ema import EMAWeights
from .meters import MetricMeter
from .pair_forward import PairForward, PairPredictions

FEWEST_PAIRS = 30  # smaller evaluations use several draws of noise for each pair
MOST_DRAWS = 8


class PairEvaluation:
    """Metrics of training and change of errors in each noise bin, over the pairs of an evaluation.

    The change is relative to the reference. Without a reference, it is relative to an evaluation of the same pairs
    before the first step, if there was one. This process stores the errors of its pairs from then, in the order of the
    evaluation.
    """

    def __init__(self, forward: PairForward, num_noise_bins: int):
        self._forward = forward
        self._metrics, self._noise_bins = MetricMeter(), NoiseBinMeter(num_noise_bins)
        self._start: WeakKeyDictionary[Any, dict[str, list[torch.Tensor]]] = WeakKeyDictionary()
        self._start_errors: list[torch.Tensor] | None = None  # errors of this data set before training, per batch
        self._batch: int | None = None  # index of the next batch; `None` in an evaluation before training
        self.draws = 1  # draws of noise for each pair
        self.weights: EMAWeights | None = None  # weights that predict instead of the policy's

    def begin(
        self, dataset: Any, prefix: str, *, before_training: bool, draws: int = 1, weights: EMAWeights | None = None
    ) -> None:
        """Begin an evaluation of a data set.

        Args:
            prefix (`str`): Prefix of its metrics.
            before_training (`bool`): Whether later evaluations are compared with this one.
            draws (`int`): Draws of noise for each pair.
            weights ([`~trl_diffusion_sdpo.models.ema.EMAWeights`], *optional*): Weights that predict instead of the
                policy's.
        """
        self.draws, self.weights = draws, weights
        errors_by_prefix = self._start.setdefault(dataset, {})
        if before_training:
            errors_by_prefix[prefix] = []
        self._start_errors = errors_by_prefix.get(prefix)
        self._batch = None if before_training else 0

    def add(self, draws: Sequence[PairPredictions], real: int) -> list[PreferenceLossOutput]:
        """Add B pairs. Only the first `real` pairs count; the others are repetitions that fill up the last batch.

        Args:
            draws (`Sequence[PairPredictions]`): Predictions of the pairs at each draw of noise.
            real (`int`): Number of pairs that count.

        Returns:
            `list[PreferenceLossOutput]`: Loss of all B pairs for each draw.
        """
        measured = [self._measure(predictions, real) for predictions in draws]
        errors = [errors_of_draw for _, errors_of_draw, _ in measured]
        if all(errors_of_draw.shape[1] == 4 for errors_of_draw in errors):
            levels = [predictions.batch.noise_levels[: len(errors[0])] for predictions in draws]
            counts = real > 0 and all(comparable for *_, comparable in measured)
            self._noise_bins.add(torch.stack(levels, 1), torch.stack(errors, 1), counts=counts)
        return [outputs for outputs, *_ in measured]

    def _measure(self, predictions: PairPredictions, real: int) -> tuple[PreferenceLossOutput, torch.Tensor, bool]:
        """Add one draw to the metrics. Return the loss of all pairs, the errors of the pairs that count, and whether
        these errors can be compared with those before training."""
        outputs = measured = self._forward.loss(predictions)
        pairs = len(outputs.pair_losses)
        if 0 < real < pairs:  # reuse the predictions, because a new forward pass may need all processes
            first = torch.arange(real, device=predictions.policy.device)
            measured = self._forward.loss(predictions.take(torch.cat([first, first + pairs])))
        # Add metrics even if no pair of this process is real, because all processes must reduce the same names.
        self._metrics.add({**self._forward.logged_metrics(measured), "loss": measured.loss}, real)
        errors, comparable = measured.pair_errors, True
        if not predictions.has_reference and self._start_errors is not None:
            earlier = self._earlier(errors)
            comparable = earlier is not None
            errors = torch.cat([errors, errors if earlier is None else earlier], 1)
        return outputs, errors, comparable

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes since the last call. All processes must call it together."""
        return {**self._metrics.drain(accelerator), **self._noise_bins.drain(accelerator)}

    def _earlier(self, errors: torch.Tensor) -> torch.Tensor | None:
        """Return the errors `(B, 2)` of a batch's pairs before the first step, or `None` if that evaluation had other
        batches."""
        assert self._start_errors is not None
        if self._batch is None:
            self._start_errors.append(errors)
            return errors
        earlier = self._start_errors[self._batch] if self._batch < len(self._start_errors) else None
        self._batch += 1
        return earlier if earlier is not None and earlier.shape == errors.shape else None


class NoiseBinMeter:
    """Collects the errors and noise bins of an evaluation's pairs. Processes exchange them once, in `drain`."""

    def __init__(self, num_noise_bins: int):
        self._bins = num_noise_bins
        self._rows: list[torch.Tensor] = []

    def add(self, noise_levels: torch.Tensor, errors: torch.Tensor, counts: bool) -> None:
        """Add B pairs at D draws of noise.

        Args:
            noise_levels (`torch.Tensor` of shape `(B, D)`): Noise levels.
            errors (`torch.Tensor` of shape `(B, D, 4)`): Errors of winner and loser, first the policy's, then the
                reference's.
            counts (`bool`): Whether the pairs count. If not, no row is added, but the process must still call `add`.
        """
        exact = errors.to(exact_dtype(errors.device))
        bins = noise_bin_of(noise_levels, self._bins).unsqueeze(2).to(exact.dtype)
        rows = torch.cat([bins, exact], 2)
        self._rows.append(rows if counts else rows[:0])

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics of [`~trl_diffusion_sdpo.losses.noise_bin_changes`], and clear the meter. All processes
        must call it together."""
        if not self._rows:
            return {}
        rows, self._rows = torch.cat(self._rows), []
        rows = accelerator.gather(accelerator.pad_across_processes(rows, pad_index=-1)).cpu()
        rows = rows[rows[:, 0, 0] >= 0]  # padding has bin -1
        return noise_bin_changes(rows[..., 0].long(), rows[..., 1:])


def draws_of_noise(dataset: Any) -> int:
    """Return the number of draws of noise for each pair of an evaluation.

    It is 1 for streams and for `FEWEST_PAIRS` pairs or more. Fewer pairs get up to `MOST_DRAWS` draws, because errors
    differ more by noise than by pair.
    """
    if not isinstance(dataset, Sized) or not 0 < len(dataset) < FEWEST_PAIRS:
        return 1
    return min(MOST_DRAWS, math.ceil(2 * FEWEST_PAIRS / len(dataset)))


def real_pairs(state: GradientState, pairs: int, rank: int) -> int:
    """Return how many of the `pairs` in this process's batch are real. The others are repetitions that fill up the last
    batch of several processes. `state` holds the number of real rows in that last batch."""
    if not state.end_of_dataloader or state.remainder <= 0:
        return pairs
    return max(0, min(pairs, state.remainder - rank * pairs))
