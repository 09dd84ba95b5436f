"""Losers drawn among the winners of other pairs, by random permutations that never map a value to an equal one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from textwrap import shorten

import numpy as np
import torch

from .sources import PairSource, digest_of

ROUNDS = 6  # rounds of exchanges
LOSERS = 3  # fourth and last part of the random key of permutations; keys of pairs have three parts


class PermutedLosers:
    """Random permutation of all pairs in each epoch. It maps a pair to the pair whose winner becomes its loser.

    No pair gets an image of its own prompt. The permutation depends on the seed and the epoch alone.

    Args:
        prompts (`np.ndarray` of shape `(P,)`): Number of each pair's prompt. No prompt has more than half of the pairs.
        images (`np.ndarray` of shape `(P, 2)`): Row and image of each pair's winner in the source.
        seed (`int`): Seed of the permutations.
    """

    def __init__(self, prompts: np.ndarray, images: np.ndarray, seed: int) -> None:
        self.images, self._prompts, self._seed = images, prompts, seed
        self._latest = (-1, prompts)  # epoch and permutation
        self.bad = torch.zeros(len(prompts), dtype=torch.uint8).share_memory_()  # winners that cannot be read

    @classmethod
    def of(cls, source: PairSource, index: np.ndarray, seed: int, name: str) -> PermutedLosers:
        """Return the losers of an index `(P, 4)` of a source. `name` is that of the data in messages.

        Raises:
            ValueError: If a prompt has more than half of the pairs. Some would then have a loser of their own prompt.
        """
        texts = source.prompts_of_rows(index[:, 0])
        digests = {text: digest_of(text) for text in set(texts)}
        prompts = np.array([digests[text] for text in texts], dtype=np.int64)
        pair, count = most_common(prompts) if len(index) else (0, 0)
        if 2 * count > len(index):
            prompt = shorten(texts[pair], 60, placeholder="…")
            raise ValueError(
                "`losers='permute'` takes losers of other prompts, so no prompt may have more than half of the images. "
                f"In the {name} data, the prompt {prompt!r} has {count} of {len(index)}. Add images of other prompts, "
                "or leave some of its images out."
            )
        return cls(prompts, index[:, :2], seed)

    def afresh(self) -> PermutedLosers:
        """Return these losers without the marks of bad images, so that all images are tried again."""
        return PermutedLosers(self._prompts, self.images, self._seed)

    def candidates(self, pair: int, epoch: int) -> Iterator[int]:
        """Yield the pair whose winner becomes the loser of `pair`, then the next pairs of other prompts. They replace
        it if it cannot be read."""
        latest_epoch, losers = self._latest
        if latest_epoch != epoch:
            losers = derangement(self._prompts, [self._seed, epoch, 0, LOSERS])
            self._latest = epoch, losers
        first, pairs = int(losers[pair]), len(losers)
        for loser in chain(range(first, pairs), range(first)):
            if self._prompts[loser] != self._prompts[pair] and not self.bad[loser]:
                yield loser


def most_common(values: np.ndarray) -> tuple[int, int]:
    """Return the first index of the most common value, and its count."""
    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    largest = int(counts.argmax())
    return int(first[largest]), int(counts[largest])


def derangement(values: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Return a random permutation of indices that maps no index to one with an equal value.

    Indices are sorted by value, with values and indices of one value in random order, and shifted by at least the count
    of the most common value. A shifted index has another value, because no value has more than half of the indices.
    Then random pairs of indices exchange their images if both still differ from their own values, so that indices of
    one value do not get neighbours. Half of the exchanges are left out: otherwise their number would decide whether the
    permutation is even or odd.

    Args:
        values (`np.ndarray` of shape `(P,)`): Values that can be sorted.
        key (`Sequence[int]`): Key of the random numbers, not negative.

    Returns:
        `np.ndarray` of shape `(P,)`, int64: Image of each index.

    Raises:
        ValueError: If a value has more than half of the indices. Then there is no such permutation.
    """
    count = len(values)
    if not count:
        return np.zeros(0, dtype=np.int64)
    _, largest = most_common(values)
    if 2 * largest > count:
        raise ValueError(f"No value may have more than half of the indices; one has {largest} of {count}.")
    numbers, generator = np.unique(values, return_inverse=True)[1].reshape(-1), np.random.default_rng(key)
    in_random_order = generator.permutation(int(numbers.max()) + 1)[numbers]
    order = np.lexsort((generator.random(count), in_random_order))
    image = np.empty(count, dtype=np.int64)
    image[order] = np.roll(order, -int(generator.integers(largest, count - largest, endpoint=True)))
    for _ in range(ROUNDS):
        first, second = generator.permutation(count)[: count // 2 * 2].reshape(2, -1)
        differ = (numbers[first] != numbers[image[second]]) & (numbers[second] != numbers[image[first]])
        is_exchanged = differ & (generator.random(len(first)) < 0.5)
        first, second = first[is_exchanged], second[is_exchanged]
        image[first], image[second] = image[second], image[first]
    return image
