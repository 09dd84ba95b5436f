"""Noise bins, weights by noise level and changes by bin, by hand."""

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


def test_changes_are_means_and_shares_of_the_references_error():
    found = noise_bin_changes([[3.0, 5.0, 2.0, 4.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 1.0, 1.0]])
    assert found == {
        "errors/winner_change@0": 0.5,
        "errors/winner_change_relative@0": 0.5,
        "errors/loser_change@0": 0.5,
        "errors/loser_change_relative@0": 0.25,
        "errors/winner_change@2": 1.0,
        "errors/winner_change_relative@2": 0.0,  # the reference has no error there
        "errors/loser_change@2": -0.5,
        "errors/loser_change_relative@2": -0.5,
    }
