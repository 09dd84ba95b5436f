"""Win rates with confidence intervals and significance tests.

One observation is a prompt, not an image: images of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev

import numpy as np

from .errors import UserError

LEVEL = 0.05  # significance level of the tests; intervals cover 95 %
FEW_PROMPTS = 30  # with fewer, only large differences show
BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"
TOO_FEW = "too few prompts to tell"
_STEP = 1 / 5040  # win rates of prompts are multiples of this if each prompt has at most ten seeds


@dataclass(frozen=True)
class WinRate:
    """How often a model's image scores higher than the base model's image of the same prompt and noise.

    Args:
        rate (`float`): Win rate in `[0, 1]`, averaged over seeds and then over prompts. A tie counts one half.
        low, high (`float`): Ends of the 95 % confidence interval of `rate`, from [`rate_interval`].
        p_value (`float`): p-value of [`permutation_test`]: how often chance alone moves `rate` this far from one half.
        prompts (`int`): Number of prompts.
        ties (`int`): Number of pairs (the model's image and the base model's) with equal scores.
        missing (`int`): Number of pairs in which an image has no score.
        mean_change (`float`): Mean of the model's scores minus the base model's, averaged over seeds and then over
            prompts.
        change_low, change_high (`float`): Ends of the 95 % confidence interval of `mean_change`, from
            [`mean_interval`]. `None` for a single prompt.
    """

    rate: float
    low: float
    high: float
    p_value: float
    prompts: int
    ties: int
    missing: int
    mean_change: float
    change_low: float | None
    change_high: float | None

    def verdict(self, adjusted: float) -> str:
        """Return whether the model is "better" or "worse" than the base model, "no difference shown", or, with fewer
        than 30 prompts, "too few prompts to tell".

        A difference is shown if `adjusted`, the p-value after correction for several comparisons, is below 0.05 and the
        95 % interval of the win rate does not contain one half.
        """
        if adjusted >= LEVEL or self.low <= 0.5 <= self.high:
            return NO_DIFFERENCE if self.prompts >= FEW_PROMPTS else TOO_FEW
        return BETTER if self.rate > 0.5 else WORSE


def win_rate(scores: np.ndarray, base: np.ndarray) -> WinRate:
    """Return the win rate of a model against the base model, from the scores of both.

    Args:
        scores, base (`np.ndarray` of shape `(prompts, seeds)`): Scores of both models, NaN for images without one.

    Raises:
        `ValueError`: If the shapes differ, or there is no prompt and seed for which both models have a score.
    """
    if scores.shape != base.shape:
        raise UserError(f"Scores of both models must have the same shape, got {scores.shape} and {base.shape}.")
    difference = scores - base
    present = np.isfinite(difference)
    usable = present.any(axis=1)
    if not usable.any():
        raise UserError(
            "A win rate needs a prompt and seed with scores for the images of both models, and there is none."
        )
    difference = np.where(present, difference, np.nan)
    wins = (np.sign(difference) + 1) / 2  # 1 for a win, 0.5 for a tie, 0 for a loss
    rates = np.nanmean(wins[usable], axis=1)  # (prompts,)
    changes = np.nanmean(difference[usable], axis=1)
    low, high = rate_interval(rates)
    change_low = None
    change_high = None
    if len(changes) > 1:
        change_low, change_high = mean_interval(changes)
    return WinRate(
        rate=float(rates.mean()),
        low=low,
        high=high,
        p_value=permutation_test(rates),
        prompts=int(usable.sum()),
        ties=int((difference == 0).sum()),
        missing=int((~present).sum()),
        mean_change=float(changes.mean()),
        change_low=change_low,
        change_high=change_high,
    )


def rate_interval(rates: np.ndarray) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of prompts' win rates `(N,)`.

    It is computed with four added prompts: two with the win rate 1 and two with 0. Without them, 40 wins of 40 would
    give an interval from 100 % to 100 %. With few prompts, Student's t-distribution makes it wider.

    Source: Agresti and Coull, Approximate is better than "exact" for interval estimation of binomial proportions, 1998.
    """
    widened = np.concatenate([rates, [0.0, 0.0, 1.0, 1.0]])
    margin = _t_quantile(len(widened) - 1) * float(widened.std()) / math.sqrt(len(widened))
    mean = float(widened.mean())
    return max(0.0, mean - margin), min(1.0, mean + margin)


def mean_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Return the confidence interval of the mean of two or more values `(N,)`, by Student's t-distribution. It covers
    95 % unless `level`, the chance to miss the mean, is another."""
    margin = _t_quantile(len(values) - 1, level) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean - margin, mean + margin


def _t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Return the quantile of Student's t-distribution that half of `level` exceeds, within 0.2 % at 5 %.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, equation 26.7.5.
    """
    if freedom == 1:
        return math.tan(math.pi / 2 * (1 - level))
    if freedom == 2:
        return (1 - level) / math.sqrt(level * (1 - level / 2))
    x = NormalDist().inv_cdf(1 - level / 2)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def permutation_test(rates: np.ndarray) -> float:
    """Return the p-value of a two-sided test whether the mean of prompts' win rates `(N,)` is one half.

    If neither model is better, exchanging the two on any prompt changes nothing. The p-value is the share of all 2^N
    exchanges that move the mean at least as far from one half, computed exactly. With one seed, it is the sign test.
    """
    steps = np.rint((rates - 0.5) / _STEP).astype(int)
    steps //= np.gcd.reduce(steps) or 1
    observed = abs(int(steps.sum()))
    # The distribution of the sum under all exchanges, from its characteristic function. A sum `s` has the index `s` or,
    # if negative, `length + s`.
    length = 2 * int(np.abs(steps).sum()) + 1
    angles = 2 * np.pi / length * np.arange(length)
    spectrum = np.ones(length)
    for step, count in zip(*np.unique(np.abs(steps), return_counts=True), strict=True):
        spectrum *= np.cos(angles * step) ** int(count)
    chances = np.fft.ifft(spectrum).real
    p_value = float(chances[observed : length - observed + 1].sum()) if observed else 1.0
    return min(1.0, max(p_value, 2.0 ** (1 - len(rates))))  # rounding errors are about 1e-15


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
        second (`np.ndarray` of shape `(prompts, seeds)`): The same of the second scorer.

    Returns:
        `float`: Share in `[0, 1]`, or NaN if no prompt is left. Prompts on which a scorer prefers neither model are
        left out.
    """
    one, other = (np.sign(np.nansum(np.sign(difference), axis=1)) for difference in (first, second))
    decided = (one != 0) & (other != 0)
    return float((one == other)[decided].mean()) if decided.any() else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two independent values, with n - 1 degrees of freedom."""
    return stdev(values) / math.sqrt(len(values))
