"""Noise bins, weights by noise level and changes by bin, by hand."""

import math

import pytest
import torch

from trl_diffusion_sdpo.losses import error_moments, noise_bin_changes, noise_bin_of, noise_range_weights


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


def test_changes_are_means_and_shares_of_the_references_error():
    def row(*errors):
        return error_moments(torch.tensor(errors, dtype=torch.float64)).sum(0).tolist()

    found = noise_bin_changes(
        [row((1.5, 2.0, 0.5, 1.0), (1.5, 3.0, 1.5, 3.0)), [0.0] * 8, row((1.0, 0.5, 0.0, 1.0))],
    )
    by_hand = {
        "errors/winner_change@0": 0.5,
        "errors/winner_change_relative@0": 0.5,
        # Changes 1 and 0 where half of the earlier errors 0.5 and 1.5 is expected: 0.75 and -0.75 beside.
        "errors/winner_change_relative_stderr@0": (2 / 1 * (0.75**2 + 0.75**2)) ** 0.5 / 2,
        "errors/loser_change@0": 0.5,
        "errors/loser_change_relative@0": 0.25,
        "errors/winner_change@2": 1.0,
        "errors/winner_change_relative@2": 0.0,  # the reference has no error there
        "errors/loser_change@2": -0.5,
        "errors/loser_change_relative@2": -0.5,
        "errors/pairs": 3.0,
        "errors/winner_change_relative": 1.0,  # 2 in all, of 2
        "errors/winner_change_relative_stderr": (3 / 2 * (0.5**2 + 1.5**2 + 1.0**2)) ** 0.5 / 2,
    }
    assert found == pytest.approx(by_hand)


def test_the_standard_error_is_the_scatter_over_other_sets_of_pairs():
    """Against the scatter of the ratio over 4000 sets of 50 pairs each."""
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(4000, 50, generator=generator, dtype=torch.float64) + 0.1
    change = 0.05 * before + 0.1 * before * torch.randn(before.shape, generator=generator, dtype=torch.float64)
    errors = torch.stack([before + change, before, before, before], -1)
    found = [noise_bin_changes([error_moments(sample).sum(0).tolist()]) for sample in errors[:200]]
    stated = torch.tensor([metrics["errors/winner_change_relative_stderr"] for metrics in found]).mean()
    assert stated == pytest.approx((change.sum(1) / before.sum(1)).std().item(), rel=0.05)


def test_an_equal_error_has_no_uncertainty():
    same = error_moments(torch.tensor([[0.3, 0.5, 0.3, 0.5], [0.1, 0.2, 0.1, 0.2]])).sum(0).tolist()
    assert noise_bin_changes([same])["errors/winner_change_relative_stderr"] == 0.0


def test_an_error_that_is_no_number_has_no_uncertainty_of_nought():
    sums = error_moments(torch.tensor([[math.nan, 0.5, 0.3, 0.5], [0.1, 0.2, 0.1, 0.2]])).sum(0).tolist()
    found = noise_bin_changes([sums])
    assert all(math.isnan(found[f"errors/winner_change_relative{end}"]) for end in ("", "_stderr", "_stderr@0"))
