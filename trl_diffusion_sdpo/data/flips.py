"""Draws flips and empty prompts of millions of pairs at once, equal to those of [`PairDraws.from_key`], which takes
15 us each.

NumPy seeds one generator at a time. Here, arrays go through the same arithmetic, which NumPy promises to keep (NEP 19):
`SeedSequence` mixes the key, and `PCG64` makes numbers of it. The third is the flip, the fourth the dropout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from .transforms import PairDraws

AT_ONCE = 2**16  # pairs whose arrays fit into a processor's cache
WORD = 2**32
POOL = 4  # words of a `SeedSequence`
POOL_HASH = 0x43B0D7E5, 0x931E8875  # first constant, and the factor of the next ones
STATE_HASH = 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
STEP = 0x2360ED051FC65DA44385DF649FCCF645  # factor of the generator's 128-bit state
SEEDING = 2  # steps of the generator until the first number
FLIP, DROPOUT = "flip", "dropout"
NUMBERS = {FLIP: 2, DROPOUT: 3}  # how many numbers come before
HALF, QUARTER = np.uint64(32), np.uint32(16)  # of a number's bits, and of a word's


def mirrored(seed: int, epoch: int, pairs: int) -> np.ndarray:
    """Return a mask of the pairs whose images an epoch mirrors if flips are on, `(pairs,)`.

    Args:
        seed (`int`, not negative): Seed of all random draws.
        epoch (`int`, not negative): Number of the epoch.
        pairs (`int`): Number of pairs.
    """
    return _below(0.5, FLIP, seed, epoch, pairs)


def emptied(seed: int, epoch: int, pairs: int, prompt_dropout: float) -> np.ndarray:
    """Return a mask of the pairs whose prompt an epoch empties, `(pairs,)`. For the arguments, see [`mirrored`]."""
    return _below(prompt_dropout, DROPOUT, seed, epoch, pairs)


def _below(bound: float, name: str, seed: int, epoch: int, pairs: int) -> np.ndarray:
    key = [*_words(seed), *_words(epoch)]
    if len(key) >= POOL or pairs > WORD:  # a seed of more than 64 bits
        draws = (getattr(PairDraws.from_key(seed, epoch, pair), name) < bound for pair in range(pairs))
        return np.fromiter(draws, dtype=bool, count=pairs)
    starts = range(0, pairs, AT_ONCE)
    parts = (np.arange(start, min(start + AT_ONCE, pairs), dtype=np.uint32) for start in starts)
    return np.concatenate([np.empty(0, dtype=bool), *(_numbers(key, part, NUMBERS[name]) < bound for part in parts)])


def _numbers(key: Sequence[int], pairs: np.ndarray, before: int) -> np.ndarray:
    """Return the number in `[0, 1)` that comes after `before` others, for each pair."""
    words = [*(np.full_like(pairs, word) for word in key), pairs]
    pool = _mixed(words + [np.zeros_like(pairs)] * (POOL - len(words)))
    constants = _constants(*STATE_HASH)
    state = [_hashed(word, next(constants)).astype(np.uint64) for word in pool * 2]
    low_first = [low | high << HALF for low, high in zip(state[::2], state[1::2], strict=True)]
    start, stream = (low_first[0], low_first[1]), (low_first[2], low_first[3])  # 128-bit numbers, the high half first
    stream = stream[0] << np.uint64(1) | stream[1] >> np.uint64(63), stream[1] << np.uint64(1) | np.uint64(1)
    # All steps at once: state -> state * STEP + stream, from start + stream.
    steps = before + SEEDING
    of_start, of_stream = pow(STEP, steps, 2**128), sum(pow(STEP, power, 2**128) for power in range(steps + 1))
    high, low = _sum(_times(start, of_start), _times(stream, of_stream % 2**128))
    bits, rotation = high ^ low, high >> np.uint64(58)
    bits = bits >> rotation | bits << (np.uint64(64) - rotation & np.uint64(63))  # rotated to the right
    return (bits >> np.uint64(11)) * 2.0**-53


def _words(number: int) -> list[int]:
    words = [number % WORD]
    while number := number // WORD:
        words.append(number % WORD)
    return words


def _constants(constant: int, factor: int) -> Iterator[tuple[np.uint32, np.uint32]]:
    """Yield the constants with which a `SeedSequence` hashes one word after the other."""
    while True:
        following = constant * factor % WORD
        yield np.uint32(constant), np.uint32(following)
        constant = following


def _hashed(word: np.ndarray, constants: tuple[np.uint32, np.uint32]) -> np.ndarray:
    word = (word ^ constants[0]) * constants[1]
    return word ^ word >> QUARTER


def _mixed(words: list[np.ndarray]) -> list[np.ndarray]:
    constants = _constants(*POOL_HASH)
    pool = [_hashed(word, next(constants)) for word in words]
    for source, target in itertools.permutations(range(POOL), 2):
        word: np.ndarray = pool[target] * MIX_LEFT - _hashed(pool[source], next(constants)) * MIX_RIGHT
        pool[target] = word ^ word >> QUARTER
    return pool


def _times(number: tuple[np.ndarray, np.ndarray], factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the last 128 bits of a product."""
    (high, low), mask = number, np.uint64(WORD - 1)
    factor_high, factor_low = np.uint64(factor >> 64), np.uint64(factor % 2**64)
    (a, b), (c, d) = (low >> HALF, low & mask), (factor_low >> HALF, factor_low & mask)
    middle = a * d + (b * d >> HALF)
    carry = (middle & mask) + b * c
    of_low = a * c + (middle >> HALF) + (carry >> HALF)
    return of_low + high * factor_low + low * factor_high, low * factor_low


def _sum(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    low = one[1] + other[1]
    return one[0] + other[0] + (low < one[1]).astype(np.uint64), low
