"""The order of a curriculum: pairs with large gaps first, then more and more, then all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainingArguments

from .buckets import TakenAgain

logger = logging.getLogger(__name__)

CURRICULUM = 4  # the fourth part of the key of an order's random numbers; those of other orders and of pairs differ
STAGES = 10  # in which pairs enter, equally many in each


class CurriculumSampler(Sampler[int]):
    """An order in which the pairs with the largest gaps come first, and the others enter in stages of equal length.

    An epoch has as many indices as there are pairs. In stage `s` of `S` they are of the `ceil(P (s + 1) / S)` pairs
    with the largest gaps, which are shuffled and taken one after the other, and shuffled again when all were taken;
    after the stages they are of all pairs. What an epoch has taken before comes as [`TakenAgain`]. The order of an
    epoch depends on the gaps, the seed and the epoch alone, so that all processes have the same one, and a resumed run
    too.

    Args:
        gaps (`np.ndarray` of shape `(P,)`): Of the pairs' scores. Of equal ones the earlier pair enters first.
        epochs (`float`): After so many, all pairs have entered.
        seed (`int`): Of the order.
        epoch (`Callable[[], int]`): The epoch whose order is wanted.
    """

    def __init__(self, gaps: np.ndarray, epochs: float, *, seed: int, epoch: Callable[[], int]) -> None:
        self._entering = np.argsort(-gaps, kind="stable")  # pairs in the order in which they enter
        self._seed, self._epoch = seed, epoch
        pairs, stages = len(gaps), min(STAGES, len(gaps))
        # Of each stage its pairs, and its first index, counted from the beginning of training.
        self._sizes = [-(-pairs * (stage + 1) // stages) for stage in range(stages)] + [pairs]
        self._starts = [round(epochs * pairs * stage / stages) for stage in range(stages + 1)]

    def __len__(self) -> int:
        return len(self._entering)

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        for pair, times in zip(order.tolist(), _earlier(order).tolist(), strict=True):
            yield TakenAgain(pair, times) if times else pair

    def _order(self) -> np.ndarray:
        """The pairs of an epoch, `(P,)`."""
        pairs, epoch = len(self), self._epoch()
        first, last = epoch * pairs, (epoch + 1) * pairs
        parts = []
        for stage, size in enumerate(self._sizes):
            begin, end = max(first, self._starts[stage]), min(last, [*self._starts[1:], last][stage])
            generator = np.random.default_rng([self._seed, epoch, stage, CURRICULUM])
            rounds = range(-(-max(0, end - begin) // size))
            taken = [self._entering[generator.permutation(size)] for _ in rounds]
            parts += [np.concatenate(taken)[: end - begin]] if taken else []
        return np.concatenate(parts)


def _earlier(order: np.ndarray) -> np.ndarray:
    """How often each pair of an order comes before its place."""
    by_pair = np.argsort(order, kind="stable")
    _, starts, counts = np.unique(order[by_pair], return_index=True, return_counts=True)
    times = np.empty(len(order), dtype=np.int64)
    times[by_pair] = np.arange(len(order)) - np.repeat(starts, counts)
    return times


def warn_of_short_training(args: TrainingArguments, curriculum_epochs: float, steps_of_epoch: int) -> None:
    """Say where training ends before all pairs have entered."""
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / steps_of_epoch
    if epochs < curriculum_epochs:
        logger.warning(
            "`curriculum_epochs=%g`, and training takes %.3g epochs: the pairs with the smallest gaps are never "
            "trained on. Use fewer epochs for the curriculum, or train longer.",
            *(curriculum_epochs, epochs),
        )
