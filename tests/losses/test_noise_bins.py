"""Noise bins, weights by noise level and changes by bin, by hand."""

import math

import numpy as np
import pytest
import torch

from trl_diffusion_sdpo.losses import noise_bin_changes, noise_bin_of, noise_range_weights


@pytest.mark.parametrize(
    ("bins", "expected"), [(1, [0, 0, 0, 0, 0, 0]), (4, [0, 0, 1, 2, 3, 3]), (10, [0, 2, 2, 5, 9, 9])]
)
def test_bins_are_equally_wide_and_the_last_one_holds_level_one(bins, expected):
    levels = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.99, 1.0])
    found = noise_bin_of(levels, bins)
    assert found.tolist() == expected and found.dtype == torch.int64


def test_a_range_holds_both_its_ends():
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert noise_range_weights(levels, 0.25, 0.75).tolist() == [0, 1, 1, 1, 0]


def changes_of(*bins):
    """The metrics of pairs, given by their errors, of each bin."""
    numbers = torch.tensor([number for number, rows in enumerate(bins) for _ in rows])
    return noise_bin_changes(numbers, torch.tensor([row for rows in bins for row in rows], dtype=torch.float64))


def test_changes_are_means_and_shares_of_the_references_error():
    found = changes_of([(1.5, 2.0, 0.5, 1.0), (1.5, 3.0, 1.5, 3.0)], [], [(1.0, 0.5, 0.0, 1.0)])
    widened = 1.8125  # at one degree of freedom, the least
    by_hand = {
        "errors/winner_change@0": 0.5,
        "errors/winner_change_relative@0": 0.5,
        # Without the first pair the share is 0, without the second one 2: 0.5 and 1.5 beside 0.5.
        "errors/winner_change_relative_stderr@0": (1 / 2 * (0.5**2 + 1.5**2)) ** 0.5 * widened,
        "errors/loser_change@0": 0.5,
        "errors/loser_change_relative@0": 0.25,
        "errors/winner_change@2": 1.0,
        "errors/winner_change_relative@2": 0.0,  # the reference has no error there
        "errors/loser_change@2": -0.5,
        "errors/loser_change_relative@2": -0.5,
        "errors/pairs": 3.0,
        "errors/winner_change_relative": 1.0,  # 2 in all, of 2
        # Without one pair: 1 of 1.5, 2 of 0.5, 1 of 2, in place of 1.
        "errors/winner_change_relative_stderr": (2 / 3 * ((1 / 3) ** 2 + 3**2 + 0.5**2)) ** 0.5 * widened,
        # Margins 0, 0 and -1.5: two ties and one pair in the wrong order.
        "errors/accuracy": 1 / 3,
        "errors/accuracy_stderr": (np.var([0.5, 0.5, 0, 0, 0, 1, 1]) / 7) ** 0.5,
        "errors/margin_relative": -0.75,
        # Without one pair: -1.5 of 1.5, -1.5 of 0.5, 0 of 2, in place of -0.75.
        "errors/margin_relative_stderr": (2 / 3 * (0.25**2 + 2.25**2 + 0.75**2)) ** 0.5 * widened,
    }
    assert found == pytest.approx(by_hand)


def test_draws_of_a_pair_count_as_one_pair():
    """Two draws of each of three pairs have the standard errors of the pairs' sums, not those of six pairs."""
    errors = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    drawn = noise_bin_changes(torch.zeros(3, 2, dtype=torch.int64), errors)
    summed = noise_bin_changes(torch.zeros(3, dtype=torch.int64), errors.sum(1))
    names = [name for name in summed if "stderr" in name and "accuracy" not in name]
    assert len(names) == 3 and {name: drawn[name] for name in names} == pytest.approx({n: summed[n] for n in names})
    assert drawn["errors/pairs"] == 3 and drawn["errors/winner_change@0"] == pytest.approx(
        summed["errors/winner_change@0"] / 2
    )


def test_the_standard_error_for_equal_errors_is_that_of_a_mean_by_students_distribution():
    """A table gives the quantile at 84.13 % for 1, 2, 4 and 9 degrees of freedom."""
    for pairs, quantile in ((2, 1.837), (3, 1.321), (5, 1.142), (10, 1.059)):
        changes = torch.linspace(-1, 2, pairs, dtype=torch.float64) ** 3
        found = changes_of([(2 + float(change), 1.0, 2.0, 1.0) for change in changes])
        expected = changes.std() / pairs**0.5 * quantile / 2
        assert found["errors/winner_change_relative_stderr"] == pytest.approx(expected.item(), rel=0.015)


def test_the_standard_error_is_unknown_if_only_one_pair_has_an_error():
    assert "errors/winner_change_relative_stderr" not in changes_of([(1.0, 1.0, 0.5, 0.5), (0.2, 1.0, 0.0, 1.0)])


def test_the_standard_error_of_errors_that_are_not_finite_is_not_a_number():
    found = changes_of([(math.nan, 0.5, 0.3, 0.5), (0.1, 0.2, 0.1, 0.2)])
    assert all(math.isnan(found[f"errors/winner_change_relative{end}"]) for end in ("", "_stderr", "_stderr@0"))
