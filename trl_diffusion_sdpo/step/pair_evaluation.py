"""Metrics of an evaluation on pairs: those of training, and the change of errors in each noise bin."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from ..engines.gradients import exact_dtype
from ..losses import PreferenceLossOutput, noise_bin_changes, noise_bin_of
from ..models.ema import EMAWeights
from .meters import MetricMeter
from .pair_forward import PairForward, PairPredictions

FEWEST_PAIRS = 30  # evaluations of fewer pairs use several noises and timesteps for each pair
MOST_DRAWS = 8  # largest number of noises and timesteps for each pair


class PairEvaluation:
    """Computes the metrics of an evaluation: those of training, and the change of winners' and losers' errors in each
    noise bin.

    The change is the policy's error minus the reference's, or for a loss without reference minus its own before the
    first step. For that, each process stores the errors of its pairs in an evaluation before the first step; without
    one, the change is not measured.
    """

    def __init__(self, forward: PairForward):
        self._forward = forward
        self._metrics = MetricMeter()
        self._noise_bins = NoiseBinMeter()
        self._start: WeakKeyDictionary[Any, dict[str, list[torch.Tensor]]] = WeakKeyDictionary()
        self._start_errors: list[torch.Tensor] | None = None  # errors of this data set before training, for each batch
        self._batch: int | None = None  # index of the next batch; `None` in an evaluation before training
        self.draws = 1  # number of noises (with timesteps) for each pair
        self.weights: EMAWeights | None = None  # averaged weights that predict instead of the policy's

    def begin(
        self, dataset: Any, prefix: str, *, before_training: bool, draws: int = 1, weights: EMAWeights | None = None
    ) -> None:
        """Begin an evaluation of a data set.

        Args:
            before_training (`bool`): Whether later evaluations are compared with this one.
            draws (`int`): Number of noises and timesteps at which each pair is predicted.
            weights ([`~trl_diffusion_sdpo.models.ema.EMAWeights`], *optional*): Averaged weights that predict instead
                of the policy's weights.
        """
        self.draws = draws
        self.weights = weights
        errors_by_prefix = self._start.setdefault(dataset, {})
        if before_training:
            errors_by_prefix[prefix] = []
        self._start_errors = errors_by_prefix.get(prefix)
        self._batch = None if before_training else 0

    def add(self, draws: Sequence[PairPredictions], real: int) -> list[PreferenceLossOutput]:
        """Add a batch of B pairs to the evaluation. Only the first `real` count: those after them are repetitions that
        fill up the last batch.

        Args:
            draws (`Sequence[PairPredictions]`): For each noise and timestep, the predictions for the B pairs.
            real (`int`): Number of pairs that count.

        Returns:
            `list[PreferenceLossOutput]`: Loss of all B pairs for each element of `draws`.
        """
        measured = [self._measure(predictions, real) for predictions in draws]
        errors = [errors_of_draw for _, errors_of_draw, _ in measured]
        if all(errors_of_draw.shape[1] == 4 for errors_of_draw in errors):
            levels = [predictions.batch.noise_levels[: len(errors[0])] for predictions in draws]
            counts = real > 0 and all(comparable for *_, comparable in measured)
            self._noise_bins.add(torch.stack(levels, 1), torch.stack(errors, 1), counts=counts)
        return [outputs for outputs, *_ in measured]

    def _measure(self, predictions: PairPredictions, real: int) -> tuple[PreferenceLossOutput, torch.Tensor, bool]:
        """Add the predictions at one noise and timestep to the metrics. Return the loss of all pairs, the errors of the
        first `real`, and whether these can be compared with the reference's or with those before training."""
        counted = predictions
        pairs = len(predictions.policy) // 2
        if 0 < real < pairs:  # use these again: a new forward pass would need all processes
            first = torch.arange(real, device=predictions.policy.device)
            counted = predictions.take(torch.cat([first, first + pairs]))
        measured = self._forward.loss(counted, counted=real)
        outputs = measured if counted is predictions else self._forward.loss(predictions)
        # Also if all pairs of this process are repetitions (with weight 0): all processes must reduce the same metrics.
        self._metrics.add({**self._forward.logged_metrics(measured), "loss": measured.loss}, real)
        errors = measured.pair_errors
        comparable = True
        if not predictions.has_reference and self._start_errors is not None:
            earlier = self._earlier(errors)
            comparable = earlier is not None
            errors = torch.cat([errors, errors if earlier is None else earlier], 1)
        return outputs, errors, comparable

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over the pairs that all processes have added since the last call. Call it in all processes
        together."""
        return {**self._metrics.drain(accelerator), **self._noise_bins.drain(accelerator)}

    def _earlier(self, errors: torch.Tensor) -> torch.Tensor | None:
        """Return the errors `(B, 2)` of this batch's pairs before the first step, or `None` if that evaluation had no
        batch of this size at this position."""
        assert self._start_errors is not None
        if self._batch is None:
            self._start_errors.append(errors)
            return errors
        earlier = self._start_errors[self._batch] if self._batch < len(self._start_errors) else None
        self._batch += 1
        return earlier if earlier is not None and earlier.shape == errors.shape else None


class NoiseBinMeter:
    """Collects the errors and noise bins of the pairs in an evaluation. Processes exchange them once, in `drain`."""

    def __init__(self):
        self._rows: list[torch.Tensor] = []

    def add(self, noise_levels: torch.Tensor, errors: torch.Tensor, counts: bool) -> None:
        """Add the errors of B pairs, each at D noises and timesteps.

        Args:
            noise_levels (`torch.Tensor` of shape `(B, D)`): Noise levels.
            errors (`torch.Tensor` of shape `(B, D, 4)`): Errors of the policy for winner and loser, then errors of the
                reference for winner and loser.
            counts (`bool`): Whether to add the errors. A process without any must call it with `counts=False`, because
                `drain` needs all processes.
        """
        exact = errors.to(exact_dtype(errors.device))
        bins = noise_bin_of(noise_levels).unsqueeze(2).to(exact.dtype)
        rows = torch.cat([bins, exact], 2)
        self._rows.append(rows if counts else rows[:0])

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics of [`~trl_diffusion_sdpo.losses.noise_bin_changes`] over all processes, and forget the
        errors. Call it in all processes together."""
        if not self._rows:
            return {}
        rows = torch.cat(self._rows)
        self._rows = []
        rows = accelerator.gather(accelerator.pad_across_processes(rows, pad_index=-1)).cpu()
        rows = rows[rows[:, 0, 0] >= 0]  # padding has bin -1
        return noise_bin_changes(rows[..., 0].long(), rows[..., 1:])


def draws_of_noise(dataset: Any) -> int:
    """Return at how many noises and timesteps each pair of a data set is evaluated.

    It is 1 for streams and for data sets of `FEWEST_PAIRS` pairs or more, and up to `MOST_DRAWS` for smaller ones,
    because errors differ more between noises than between pairs.
    """
    if not isinstance(dataset, Sized) or not 0 < len(dataset) < FEWEST_PAIRS:
        return 1
    return min(MOST_DRAWS, math.ceil(2 * FEWEST_PAIRS / len(dataset)))


def seeds_of_draws(seeds: Sequence[int], draws: int) -> list[int]:
    """Return the seeds for the `draws` random timesteps of each pair: those of the first timestep of every pair (the
    pairs' own seeds), then those of the second, and so on."""
    later = [
        int(np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)[0] >> 1)
        for draw in range(1, draws)
        for seed in seeds
    ]
    return [*seeds, *later]


def real_pairs(state: GradientState, pairs: int, rank: int) -> int:
    """Return how many of the `pairs` pairs in this process's batch are no repetitions. accelerate repeats pairs to fill
    the last batch of all processes, and stores in `state` how many come before them."""
    if not state.end_of_dataloader or state.remainder <= 0:
        return pairs
    return max(0, min(pairs, state.remainder - rank * pairs))
