"""Random permutations that never put a value in the place of an equal one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 6  # of exchanges; a place takes part in half of them


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
