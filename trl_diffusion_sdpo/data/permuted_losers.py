"""Losers drawn among the winners of other pairs, by random permutations that never put a value in the place of an equal
one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from textwrap import shorten

import numpy as np
import torch

from .columns import digest_of
from .sources import PairSource

ROUNDS = 6  # of exchanges; a place takes part in half of them
LOSERS = 3  # ends the key of the permutations' random numbers; those of pairs have no fourth part


class PermutedLosers:
    """Choice of the pair whose winner is the loser of each pair in each epoch.

    It is a permutation of all pairs of a data set, by which none gets an image of its own prompt. It depends on the
    seed and the epoch alone.

    Args:
        prompts (`np.ndarray` of shape `(P,)`): Equal for pairs of one prompt, none of which has more than half of them.
        images (`np.ndarray` of shape `(P, 2)`): Row and image of each pair's winner in the source.
        seed (`int`): Of the permutations.
    """

    def __init__(self, prompts: np.ndarray, images: np.ndarray, seed: int) -> None:
        self.images, self._prompts, self._seed, self._kept = images, prompts, seed, (-1, prompts)
        self.bad = torch.zeros(len(prompts), dtype=torch.uint8).share_memory_()  # winners that cannot be read

    @classmethod
    def of(cls, source: PairSource, index: np.ndarray, seed: int, name: str) -> PermutedLosers:
        """Return the losers of an index `(P, 4)` of a source; `name` is that of the data in messages.

        Raises:
            ValueError: If a prompt has more than half of the pairs: then some would have a loser of their own prompt.
        """
        rows, place = np.unique(index[:, 0], return_inverse=True)
        texts = source.prompts_of_rows(rows)
        digests = {text: digest_of(text) for text in set(texts)}
        prompts = np.array([digests[text] for text in texts], dtype=np.int64)[place.reshape(-1)]
        pair, count = most_common(prompts) if len(index) else (0, 0)
        if 2 * count > len(index):
            prompt = shorten(source.prompt(int(index[pair, 0])), 60, placeholder="…")
            raise ValueError(
                "`losers='permute'` gives every image a loser of another prompt, so that no prompt may have more than "
                f"half of the images. In the {name} data {prompt!r} has {count} of {len(index)}. Add images of other "
                "prompts, or leave some of these out."
            )
        return cls(prompts, index[:, :2], seed)

    def afresh(self) -> PermutedLosers:
        """Return the same losers, of which none is known to be unreadable."""
        return PermutedLosers(self._prompts, self.images, self._seed)

    def candidates(self, pair: int, epoch: int) -> Iterator[int]:
        """Yield the pair whose winner a pair gets, and then those that take its place if that cannot be read: the next
        ones of another prompt, whichever process reads it first."""
        kept, given = self._kept
        if kept != epoch:
            given = derangement(self._prompts, [self._seed, epoch, 0, LOSERS])
            self._kept = epoch, given
        first, pairs = int(given[pair]), len(given)
        for loser in chain(range(first, pairs), range(first)):
            if self._prompts[loser] != self._prompts[pair] and not self.bad[loser]:
                yield loser

    def of_pair(self, pair: int, epoch: int) -> int | None:
        """Return the first of the [`candidates`]; `None` if there is none."""
        return next(self.candidates(pair, epoch), None)


def most_common(values: np.ndarray) -> tuple[int, int]:
    """The first place of the most common of some values, `(P,)` with P at least 1, and how often it is there."""
    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    largest = int(counts.argmax())
    return int(first[largest]), int(counts[largest])


def derangement(values: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """A random permutation of places, under which no place gets one of an equal value; so none gets itself.

    Places are sorted by value, values and places of one value in a random order, and shifted by at least as many as the
    most common value has: the shifted place is beyond its own value's, and not yet around to them, as no value has more
    than half. Then random pairs of places exchange what they got, wherever both stay different from their own value, so
    that places of one value do not get neighbours of one other. An exchange is as likely as the one back, and half of
    them are left out: otherwise their number would decide whether the permutation is even or odd.

    Args:
        values (`np.ndarray` of shape `(P,)`): Any that can be sorted.
        key (`Sequence[int]`): Of the random numbers; none is negative.

    Returns:
        `np.ndarray` of shape `(P,)`, int64: For each place, the place that it gets.

    Raises:
        ValueError: If a value has more than half of the places: then there is no such permutation.
    """
    count = len(values)
    if not count:
        return np.zeros(0, dtype=np.int64)
    _, largest = most_common(values)
    if 2 * largest > count:
        raise ValueError(f"No value may have more than half of the places; one has {largest} of {count}.")
    numbers, generator = np.unique(values, return_inverse=True)[1].reshape(-1), np.random.default_rng(key)
    in_random_order = generator.permutation(int(numbers.max()) + 1)[numbers]
    order = np.lexsort((generator.random(count), in_random_order))
    given = np.empty(count, dtype=np.int64)
    given[order] = np.roll(order, -int(generator.integers(largest, count - largest, endpoint=True)))
    for _ in range(ROUNDS):
        one, other = generator.permutation(count)[: count // 2 * 2].reshape(2, -1)
        differ = (numbers[one] != numbers[given[other]]) & (numbers[other] != numbers[given[one]])
        taken = differ & (generator.random(len(one)) < 0.5)
        one, other = one[taken], other[taken]
        given[one], given[other] = given[other], given[one]
    return given
