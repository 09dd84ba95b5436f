"""Chooses losers among the winners of other pairs, never of the same prompt, by random permutations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from textwrap import shorten

import numpy as np
import torch

from ..utils.errors import UserError
from .fingerprints import digest_of
from .sources import PairSource

ROUNDS = 6  # rounds of random swaps in `derangement`
LOSERS = 3  # last of four numbers that seed a permutation; three numbers seed a pair, so seeds differ


class PermutedLosers:
    """Maps each pair to the one whose winner becomes its loser, by a new random permutation in each epoch.

    A loser never has the prompt of its pair. The permutation depends only on the seed and the epoch.

    Args:
        prompts (`np.ndarray` of shape `(P,)`): A number for each pair's prompt. No prompt may have more than half of
            the pairs.
        seed (`int`): Seed of the permutations.
    """

    def __init__(self, prompts: np.ndarray, seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._latest = (-1, prompts)  # epoch and permutation of the last call
        self.bad = torch.zeros(len(prompts), dtype=torch.uint8).share_memory_()  # mask of undecodable winners

    @classmethod
    def of(cls, source: PairSource, rows: np.ndarray, seed: int, name: str) -> PermutedLosers:
        """Return permuted losers for pairs of a source. `rows` `(P,)` are the rows of the winners, and `name` is the
        name of the data in messages.

        Raises:
            ValueError: If a prompt has more than half of the pairs, so that some would get a loser of their own prompt.
        """
        texts = source.prompts_of_rows(rows)
        digests = {text: digest_of(text) for text in set(texts)}
        prompts = np.array([digests[text] for text in texts], dtype=np.int64)
        pair, count = most_common(prompts) if len(rows) else (0, 0)
        if 2 * count > len(rows):
            prompt = shorten(texts[pair], 60, placeholder="…")
            raise UserError(
                "`losers='permute'` takes losers of other prompts, so no prompt may have more than half of the images. "
                f"In the {name} data, the prompt {prompt!r} has {count} of {len(rows)} images. Add images of other "
                "prompts, or remove some images of this prompt."
            )
        return cls(prompts, seed)

    def candidates(self, pair: int, epoch: int) -> Iterator[int]:
        """Yield the numbers of pairs whose winner may become the loser of `pair`: first the permutation's choice, then
        the next pairs with other prompts, in case the first winner cannot be decoded."""
        losers = self.of_epoch(epoch)
        first, pairs = int(losers[pair]), len(losers)
        for loser in chain(range(first, pairs), range(first)):
            if self._prompts[loser] != self._prompts[pair] and not self.bad[loser]:
                yield loser

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Return the pairs that an epoch's permutation chooses, whether or not their winners can be decoded, `(P,)`."""
        latest_epoch, losers = self._latest
        if latest_epoch != epoch:
            losers = derangement(self._prompts, [self._seed, epoch, 0, LOSERS])
            self._latest = epoch, losers
        return losers

    def in_place_of(self, bad: np.ndarray) -> np.ndarray:
        """Return a mask of the pairs that `candidates` may reach if the winners `bad`, a mask, cannot be decoded: after
        each bad one, those up to the first good ones of two prompts, one of which is not that of the pair. `(P,)`"""
        good, pairs = np.flatnonzero(~bad), len(bad)
        if not bad.any():
            return bad
        last = np.flatnonzero(self._prompts[good] != np.roll(self._prompts[good], -1))  # before another prompt
        if not len(last):
            return np.ones_like(bad)
        first = np.flatnonzero(bad)
        last = last[np.searchsorted(last, np.searchsorted(good, first) % len(good)) % len(last)]
        end = good[(last + 1) % len(good)]
        # Each part of the circle adds 1 from `first` to `end`.
        begins = np.bincount(first, minlength=pairs) - np.bincount(end + 1, minlength=pairs + 1)[:pairs]
        begins[0] += np.count_nonzero(end < first)
        in_place: np.ndarray = np.cumsum(begins) > 0
        return in_place


def most_common(values: np.ndarray) -> tuple[int, int]:
    """Return the first index of the most common value, and its count."""
    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    largest = int(counts.argmax())
    return int(first[largest]), int(counts[largest])


def derangement(values: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Return a random permutation of indices that maps each index to an index with another value.

    Indices with equal values are put side by side on a circle, and each is mapped to the index at a random distance.
    This distance is the same for all and at least the size of the largest group of equal values, so each is mapped to
    another value. Then random pairs of indices swap what they are mapped to, unless one would get its own value. Each
    swap is skipped with probability 1/2, so that their number is random and the permutation can be even or odd.

    Args:
        values (`np.ndarray` of shape `(P,)`): Value of each index. At most half of the values may be equal.
        key (`Sequence[int]`): Non-negative integers that seed the random numbers.
    """
    count = len(values)
    _, largest = most_common(values)
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
