"""Win rates by hand, and the intervals and tests on simulated scores."""

import itertools
import math

import numpy as np
import pytest

from trl_diffusion_sdpo.utils.statistics import (
    NO_DIFFERENCE,
    TOO_FEW,
    agreement,
    holm,
    mean_interval,
    permutation_test,
    rate_interval,
    win_rate,
)


def test_seeds_are_averaged_within_a_prompt_and_ties_count_half():
    base = np.zeros((3, 2))
    scores = np.array([[1.0, 1.0], [1.0, -1.0], [0.0, 2.0]])
    result = win_rate(scores, base)
    assert result.rate == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert result.mean_change == pytest.approx((1 + 0 + 1) / 3)
    assert result.ties == 1 and result.missing == 0 and result.prompts == 3
    assert result.p_value == 0.5  # two wins, no loss


def test_missing_scores_are_left_out_and_counted():
    scores = np.array([[1.0, math.nan], [math.nan, math.nan], [-1.0, -1.0]])
    result = win_rate(scores, np.zeros((3, 2)))
    assert result.rate == 0.5 and result.prompts == 2 and result.missing == 3
    with pytest.raises(ValueError, match="needs a prompt and seed"):
        win_rate(np.full((2, 1), math.nan), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="shape"):
        win_rate(np.zeros((2, 1)), np.zeros((3, 1)))


@pytest.mark.parametrize(
    ("wins", "losses", "expected"), [(0, 0, 1.0), (5, 0, 2 / 32), (1, 4, 12 / 32), (3, 3, 1.0), (60, 40, 0.05689)]
)
def test_with_one_seed_the_test_of_the_mean_is_the_sign_test(wins, losses, expected):
    rates = np.array([1.0] * wins + [0.5] * 3 + [0.0] * losses)  # ties count for neither
    assert permutation_test(rates) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seeds", [1, 2, 3, 7])
def test_the_test_of_the_mean_is_the_share_of_all_exchanges(seeds):
    rates = np.random.default_rng(seeds).integers(0, 2 * seeds + 1, 11) / (2 * seeds)
    rates[0] = 1.0
    moves = np.array(list(itertools.product((1, -1), repeat=11))) @ (rates - 0.5)
    expected = np.mean(np.abs(moves) >= abs((rates - 0.5).sum()) - 1e-9)
    assert permutation_test(rates) == pytest.approx(expected)


def test_direction_and_p_value_come_from_the_same_statistic():
    """32 prompts lose one of four seeds more than they win, and 13 win all: the mean is above one half, and a sign test
    would call the many small losses significant against it."""
    rates = np.array([[1.0, 1.0, 1.0, 1.0]] * 13 + [[1.0, -1.0, -1.0, 0.0]] * 32)
    result = win_rate(rates, np.zeros_like(rates))
    assert result.rate > 0.5
    assert math.comb(45, 13) / 2**45 < 0.01  # the sign test's p-value is at least twice the sum of such terms
    assert result.p_value > 0.05 and result.verdict(result.p_value) == NO_DIFFERENCE


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_agreement_is_over_prompts_on_which_both_scorers_prefer_one():
    first = np.array([[1.0], [1.0], [-1.0], [0.0]])
    second = np.array([[2.0], [-2.0], [-2.0], [2.0]])
    assert agreement(first, second) == pytest.approx(2 / 3)
    assert math.isnan(agreement(first * 0, second))


@pytest.mark.parametrize(("rate", "prompts"), [(0.5, 20), (0.7, 30), (0.9, 50), (0.97, 20), (0.97, 30), (0.97, 50)])
@pytest.mark.parametrize("seeds", [1, 2])
def test_the_interval_covers_the_truth_as_often_as_it_says(rate, prompts, seeds):
    """A 95 % interval covers the truth at least 93 times in 100: the standard error over 1000 evaluations is .7 %."""
    generator = np.random.default_rng(0)
    chances = generator.beta(2 * rate, 2 * (1 - rate), (1000, prompts))  # some prompts are easier to win
    ends = [rate_interval(rates) for rates in generator.binomial(seeds, chances) / seeds]
    assert np.mean([low <= rate <= high for low, high in ends]) >= 0.93


def test_forty_wins_of_forty_leave_room_for_a_loss():
    # By hand: 42 of 44 = .9545, standard deviation sqrt(.9545 * .0455) = .2083, t(43) = 2.0167.
    low, high = rate_interval(np.ones(40))
    assert low == pytest.approx(0.9545 - 2.0167 * 0.2083 / 44**0.5, abs=1e-4) and high == 1.0


def test_six_wins_of_six_are_the_fewest_that_show_a_difference():
    five, six = (win_rate(np.ones((prompts, 1)), np.zeros((prompts, 1))) for prompts in (5, 6))
    assert (five.verdict(five.p_value), six.verdict(six.p_value)) == (TOO_FEW, "better")


@pytest.mark.parametrize(("values", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262), (31, 2.042)])
def test_the_interval_of_the_mean_change_is_by_students_t(values, quantile):
    changes = np.arange(values, dtype=float)
    spread = (values * (values + 1) / 12) ** 0.5  # standard deviation of 0, 1, ..., N - 1
    low, high = mean_interval(changes)
    assert (high - low) / 2 == pytest.approx(quantile * spread / values**0.5, rel=0.002)
    assert (low + high) / 2 == pytest.approx((values - 1) / 2)


def test_of_one_prompt_the_interval_of_the_change_is_unknown():
    result = win_rate(np.ones((1, 1)), np.zeros((1, 1)))
    assert (result.change_low, result.change_high, result.low) == (None, None, 0.0)


def test_few_prompts_without_a_difference_are_too_few_to_tell():
    few, many = (win_rate(np.tile([[1.0], [-1.0]], (half, 1)), np.zeros((2 * half, 1))) for half in (4, 15))
    assert (few.verdict(1.0), many.verdict(1.0)) == (TOO_FEW, NO_DIFFERENCE)


def test_equal_models_are_rarely_told_apart():
    """Under the null, 5 % of evaluations with five scorers may show a difference; without Holm's method 12 % do. The
    standard error over 300 evaluations is 1.3 %."""
    generator = np.random.default_rng(1)
    false = without_holm = 0
    for _ in range(300):
        results = [win_rate(*generator.standard_normal((2, 40, 2))) for _ in range(5)]
        p_values = [result.p_value for result in results]
        false += any(one.verdict(value) != NO_DIFFERENCE for one, value in zip(results, holm(p_values), strict=True))
        without_holm += any(one.verdict(value) != NO_DIFFERENCE for one, value in zip(results, p_values, strict=True))
    assert false / 300 <= 0.05 + 2 * 0.013
    assert without_holm / 300 > 0.1


def test_a_clear_difference_is_shown_and_a_small_one_is_not():
    generator = np.random.default_rng(2)
    base = generator.standard_normal((200, 1))
    clear = win_rate(generator.standard_normal((200, 1)) + 1.0, base)
    small = win_rate(generator.standard_normal((200, 1)) + 0.02, base)
    assert clear.verdict(clear.p_value) == "better"
    assert win_rate(base - 1.0, base).verdict(0.0) == "worse"
    assert small.verdict(small.p_value) == NO_DIFFERENCE
    assert clear.low < clear.rate < clear.high
