"""Sums of what is measured on the pairs of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from ..losses import PreferenceLossOutput
from .meters import MetricMeter, NoiseBinMeter
from .noisy_batch import PairPredictions
from .pair_forward import PairForward

FEWEST_PAIRS = 30  # of an evaluation at one draw of noise for each pair
MOST_DRAWS = 8


class PairEvaluation:
    """The metrics of training and the change of errors at each noise bin, over the pairs of an evaluation.

    The change is that to the reference. Without a reference it is that to an evaluation of the same pairs before the
    first step, if there was one: this process keeps the errors of its pairs, in the order of the evaluation.
    """

    def __init__(self, forward: PairForward, num_noise_bins: int):
        self._forward = forward
        self._metrics, self._noise_bins = MetricMeter(), NoiseBinMeter(num_noise_bins)
        self._start: WeakKeyDictionary[Any, dict[str, list[torch.Tensor]]] = WeakKeyDictionary()
        self._here: list[torch.Tensor] | None = None  # of these pairs, batch by batch
        self._batch: int | None = None  # counts the batches after the start
        self.draws = 1  # of noise, for each pair

    def begin(self, dataset: Any, prefix: str, *, before_training: bool, draws: int = 1) -> None:
        """Begin an evaluation of a data set at `draws` draws of noise a pair; its metrics will have the prefix."""
        self.draws = draws
        of_data = self._start.setdefault(dataset, {})
        if before_training:
            of_data[prefix] = []
        self._here, self._batch = of_data.get(prefix), None if before_training else 0

    def add(self, draws: Sequence[PairPredictions], real: int) -> list[PreferenceLossOutput]:
        """Add B pairs, whose first `real` ones are not repeated to fill up the last batch.

        Args:
            draws (`Sequence[PairPredictions]`): The predictions of the pairs at each draw of noise.
            real (`int`): Number of pairs that count.

        Returns:
            `list[PreferenceLossOutput]`: The loss of all B pairs, for each draw.
        """
        measured = [self._measure(predictions, real) for predictions in draws]
        errors = [found for _, found, _ in measured]
        if all(found.shape[1] == 4 for found in errors):
            levels = [predictions.batch.noise_levels[: len(errors[0])] for predictions in draws]
            counts = real > 0 and all(comparable for *_, comparable in measured)
            self._noise_bins.add(torch.stack(levels, 1), torch.stack(errors, 1), counts=counts)
        return [outputs for outputs, *_ in measured]

    def _measure(self, predictions: PairPredictions, real: int) -> tuple[PreferenceLossOutput, torch.Tensor, bool]:
        """Add one draw to the metrics. Returns the loss of all pairs, the errors of those that count, and whether these
        can be compared with earlier ones."""
        outputs = measured = self._forward.loss(predictions)
        pairs = len(outputs.pair_losses)
        if 0 < real < pairs:  # from the same predictions: under an engine, a forward pass would take all processes
            first = torch.arange(real, device=predictions.policy.device)
            measured = self._forward.loss(predictions.take(torch.cat([first, first + pairs])))
        # Also where no pair of this process is real: sums are reduced by name, and all processes must have the names.
        self._metrics.add({**self._forward.logged_metrics(measured), "loss": measured.loss}, real)
        errors, comparable = measured.pair_errors, True
        if not predictions.has_reference and self._here is not None:
            earlier = self._earlier(errors)
            comparable = earlier is not None
            errors = torch.cat([errors, errors if earlier is None else earlier], 1)
        return outputs, errors, comparable

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last call, over all processes, which must call it together."""
        return {**self._metrics.drain(accelerator), **self._noise_bins.drain(accelerator)}

    def _earlier(self, errors: torch.Tensor) -> torch.Tensor | None:
        """The errors `(B, 2)` of a batch's pairs before the first step; `None` if its pairs are not those of then."""
        assert self._here is not None
        if self._batch is None:
            self._here.append(errors)
            return errors
        kept = self._here[self._batch] if self._batch < len(self._here) else None
        self._batch += 1
        return kept if kept is not None and kept.shape == errors.shape else None


def draws_of_noise(dataset: Any) -> int:
    """Number of draws of noise for each pair of an evaluation: one for `FEWEST_PAIRS` pairs or more. Fewer pairs are
    evaluated at up to `MOST_DRAWS` draws, since their errors differ more by noise than by pair. Streams have one."""
    if not isinstance(dataset, Sized) or not 0 < len(dataset) < FEWEST_PAIRS:
        return 1
    return min(MOST_DRAWS, math.ceil(2 * FEWEST_PAIRS / len(dataset)))


def real_pairs(state: GradientState, pairs: int, rank: int) -> int:
    """How many of the `pairs` in this process's batch are not repeated to fill up the last batch of several processes,
    whose number of rows the accelerator's gradient state has."""
    if not state.end_of_dataloader or state.remainder <= 0:
        return pairs
    return max(0, min(pairs, state.remainder - rank * pairs))
