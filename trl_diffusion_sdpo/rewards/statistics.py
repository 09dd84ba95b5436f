"""Win rates with confidence intervals and tests.

The unit of all statistics is the prompt, because images of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # significance level of the tests; intervals cover 95 %
RESAMPLES = 10_000
BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class WinRate:
    """How often a model's image scores higher than the base model's image of the same prompt and noise.

    Args:
        rate (`float`): Win rate in `[0, 1]`, averaged over seeds and then over prompts. A tie counts one half.
        low, high (`float`): Ends of the rate's 95 % interval, from a bootstrap over prompts.
        p_value (`float`): p-value of a two-sided exact sign test over prompts. Prompts with a rate of one half are
            ignored.
        prompts (`int`): Number of prompts.
        ties (`int`): Number of image pairs with equal scores.
        missing (`int`): Number of image pairs in which an image has no score.
        mean_change (`float`): Mean difference between the model's and the base's scores, averaged like the rate.
        change_low, change_high (`float`): Ends of the 95 % interval of `mean_change`.
    """

    rate: float
    low: float
    high: float
    p_value: float
    prompts: int
    ties: int
    missing: int
    mean_change: float
    change_low: float
    change_high: float

    def verdict(self, adjusted: float) -> str:
        """Return "better", "worse" or "no difference shown".

        A difference is shown if the adjusted p-value is below 0.05 and the 95 % interval does not contain one half.
        """
        if adjusted >= LEVEL or self.low <= 0.5 <= self.high:
            return NO_DIFFERENCE
        return BETTER if self.rate > 0.5 else WORSE


def win_rate(scores: np.ndarray, base: np.ndarray, *, seed: int = 0) -> WinRate:
    """Compare a model's scores with the base model's.

    Args:
        scores, base (`np.ndarray` of shape `(prompts, seeds)`): Scores of both models. NaN if an image has none.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Raises:
        `ValueError`: If the shapes differ, or in every image pair a score is missing.
    """
    if scores.shape != base.shape:
        raise ValueError(f"Both models need scores of the same images, got shapes {scores.shape} and {base.shape}.")
    difference = scores - base
    present = np.isfinite(difference)
    usable = present.any(axis=1)
    if not usable.any():
        raise ValueError("A win rate needs image pairs in which both images have a score, and there are none.")
    wins = np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))
    count = present.sum(axis=1)[usable]
    rates = np.where(present, wins, 0.0).sum(axis=1)[usable] / count  # (prompts,)
    changes = np.where(present, difference, 0.0).sum(axis=1)[usable] / count
    low, high = bootstrap_interval(rates, seed=seed)
    change_low, change_high = bootstrap_interval(changes, seed=seed)
    return WinRate(
        rate=float(rates.mean()),
        low=low,
        high=high,
        p_value=sign_test(int((rates > 0.5).sum()), int((rates < 0.5).sum())),
        prompts=int(usable.sum()),
        ties=int((difference == 0).sum()),
        missing=int((~present).sum()),
        mean_change=float(changes.mean()),
        change_low=change_low,
        change_high=change_high,
    )


def bootstrap_interval(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `(N,)` values, by resampling them."""
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 5_000_000 // len(values))  # resamples per block, to limit memory
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        means[start : start + size] = values[generator.integers(0, len(values), (size, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided exact p-value of `wins` against `losses`, if both were equally likely."""
    trials = wins + losses
    tail = sum(math.comb(trials, successes) for successes in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**trials)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for several tests by Holm's method."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return the share of prompts on which two scorers prefer the same model.

    Args:
        first, second (`np.ndarray` of shape `(prompts, seeds)`): For each scorer, the model's scores minus the base
            model's.

    Returns:
        `float`: Share in `[0, 1]`, among prompts on which both scorers have a preference. NaN if there are none.
    """
    signs = []
    for difference in (first, second):
        present = np.isfinite(difference)
        signs.append(np.sign(np.where(present, np.sign(difference), 0.0).sum(axis=1)))
    decided = (signs[0] != 0) & (signs[1] != 0)
    return float((signs[0] == signs[1])[decided].mean()) if decided.any() else math.nan
