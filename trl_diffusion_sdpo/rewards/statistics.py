"""Compute win rates with confidence intervals and significance tests.

All statistics treat a prompt, not an image, as one observation, because images of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # significance level of the tests; intervals cover 95 %
RESAMPLES = 10_000  # number of bootstrap samples
BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class WinRate:
    """How often a model's image scores higher than the base model's image of the same prompt and noise.

    Args:
        rate (`float`): Win rate in `[0, 1]`, averaged over seeds and then over prompts. A tie counts one half.
        low, high (`float`): Ends of the 95 % confidence interval of `rate`, from a bootstrap over prompts.
        p_value (`float`): p-value of a two-sided exact sign test over prompts. The test ignores prompts with a win rate
            of one half.
        prompts (`int`): Number of prompts.
        ties (`int`): Number of pairs (the model's image and the base model's image) with equal scores.
        missing (`int`): Number of pairs (the model's image and the base model's image) in which an image has no score.
        mean_change (`float`): Mean of the model's scores minus the base model's scores, averaged over seeds and then
            over prompts.
        change_low, change_high (`float`): Ends of the 95 % confidence interval of `mean_change`.
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
        """Return whether the model is "better" or "worse" than the base model, or "no difference shown".

        A difference is shown if `adjusted`, the p-value after correction for several comparisons, is below 0.05 and the
        95 % interval of the win rate does not contain one half.
        """
        if adjusted >= LEVEL or self.low <= 0.5 <= self.high:
            return NO_DIFFERENCE
        return BETTER if self.rate > 0.5 else WORSE


def win_rate(scores: np.ndarray, base: np.ndarray, *, seed: int = 0) -> WinRate:
    """Return the win rate of a model against the base model, computed from the scores of both.

    Args:
        scores, base (`np.ndarray` of shape `(prompts, seeds)`): Scores of both models, with NaN for images
            without a score.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Raises:
        `ValueError`: If the shapes differ, or there is no prompt and seed for which both models have a score.
    """
    if scores.shape != base.shape:
        raise ValueError(f"Scores of both models must have the same shape, got {scores.shape} and {base.shape}.")
    difference = scores - base
    present = np.isfinite(difference)
    usable = present.any(axis=1)
    if not usable.any():
        raise ValueError(
            "A win rate needs a prompt and seed for which the images of both models have scores, but there is no such "
            "prompt and seed."
        )
    difference = np.where(present, difference, np.nan)
    wins = (np.sign(difference) + 1) / 2  # 1 for a win, 0.5 for a tie, 0 for a loss
    rates = np.nanmean(wins[usable], axis=1)  # (prompts,)
    changes = np.nanmean(difference[usable], axis=1)
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
    """Return the 95 % bootstrap interval (percentile method) of the mean of values `(N,)`."""
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 5_000_000 // len(values))  # samples are drawn in blocks of this many, to limit memory
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        means[start : start + size] = values[generator.integers(0, len(values), (size, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Return the p-value of a two-sided exact sign test, whose null hypothesis is that wins and losses are equally
    likely."""
    trials = wins + losses
    tail = sum(math.comb(trials, successes) for successes in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**trials)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests by Holm's method."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return the share of prompts on which two scorers prefer the same model.

    Args:
        first (`np.ndarray` of shape `(prompts, seeds)`): The first scorer's scores of the model minus its scores of the
            base model.
        second (`np.ndarray` of shape `(prompts, seeds)`): The second scorer's scores of the model minus its scores of
            the base model.

    Returns:
        `float`: Share in `[0, 1]`. Prompts on which a scorer prefers neither model are left out. If no prompt is left,
            the result is NaN.
    """
    one, other = (np.sign(np.nansum(np.sign(difference), axis=1)) for difference in (first, second))
    decided = (one != 0) & (other != 0)
    return float((one == other)[decided].mean()) if decided.any() else math.nan
