"""Weights of pairs and calibrated scores, with values computed by hand."""

import math

import pytest
import torch

from trl_diffusion_sdpo.losses import WEIGHT_FUNCTIONS, calibrated_scores, score_gaps, with_mean_one


def scores(*pairs):
    """`(P, 2, 1)` from winner and loser of each pair."""
    return torch.tensor(pairs, dtype=torch.float64)[:, :, None]


def weights(name, given, sorts_by_scores=False):
    return WEIGHT_FUNCTIONS[name].function(given, sorts_by_scores=sorts_by_scores).tolist()


def test_a_label_against_the_scores_has_no_gap_unless_the_loss_goes_by_scores():
    given = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    assert score_gaps(given, sorts_by_scores=False).tolist() == [2, 0, 0]
    assert score_gaps(given, sorts_by_scores=True).tolist() == [2, 0, 2]


def test_gap_weights_are_the_gaps():
    given = scores((3, 1), (1, 1), (0, 2), (5, 1))
    assert weights("gap", given) == [2, 0, 0, 4]
    assert weights("gap", given, sorts_by_scores=True) == [2, 0, 2, 4]


@pytest.mark.parametrize("shift", [0, 700, -3000])  # 2^700 is no float32, and 2^3000 no float64
def test_gain_weights_are_the_gaps_of_powers_of_two_whatever_is_added_to_all_scores(shift):
    """4 - 2, 2 - 1 and 1 - 2, which counts as 0, or as 1 where the loss exchanges the images."""
    given = scores((2, 1), (1, 0), (0, 1)) + shift
    assert with_mean_one(torch.tensor(weights("gain", given))).tolist() == [2, 1, 0]
    exchanged = with_mean_one(torch.tensor(weights("gain", given, sorts_by_scores=True)))
    assert exchanged.tolist() == [1.5, 0.75, 0.75]


@pytest.mark.parametrize("scale", [1, 0.01])
def test_inverse_gap_weights_halve_at_the_mean_gap_whatever_the_scale(scale):
    given = scale * scores((0, 0), (1, 0), (3, 1), (2, 1))  # the mean gap is 1
    assert weights("inverse_gap", given) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2])


@pytest.mark.parametrize("given", [(0.29, 0.1), (0.1, 0.29)])
def test_rarity_weights_fall_with_the_number_of_alike_scores_of_winner_and_loser(given):
    """The bins of 0.29, 0.10 and 0.57 hold 1, 4 and 3 of the eight scores. 0.29 and 0.57 divided by 0.01 in binary
    fall just below 29 and 57."""
    alike = scores(given, (0.57, 0.1), (0.573, 0.098), (0.568, 0.102))
    third = 1 / math.sqrt(3 * 4)
    for sorts in (False, True):
        assert weights("rarity", alike, sorts) == pytest.approx([1 / 2, third, third, third])


def test_agreement_weights_fall_with_the_spread_of_the_scorers():
    """Two scorers have the differences (1, 1) and (3, -1), and mean distances of 2 and 1. That makes (0.5, 1) and
    (1.5, -1), with standard deviations of 0.25 and 1.25."""
    given = torch.tensor([[[2.0, 5.0], [1.0, 4.0]], [[3.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    for sorts in (False, True):
        assert weights("agreement", given, sorts) == pytest.approx([1 / 1.25, 1 / 2.25])


def test_the_mean_of_weights_becomes_one_and_ones_stay_ones_to_the_bit():
    assert with_mean_one(torch.tensor([1.0, 3.0, 0.0, 4.0])).tolist() == [0.5, 1.5, 0, 2]
    assert torch.equal(with_mean_one(torch.ones(7)), torch.ones(7))
    assert with_mean_one(torch.full((3,), 0.1, dtype=torch.float64)).float().tolist() == [1, 1, 1]


def test_calibrated_scores_of_two_images_are_complements():
    """sigma(log 3) is 3/4."""
    assert calibrated_scores(torch.tensor([math.log(3), 0.0])).tolist() == pytest.approx([0.75, 0.25])
    assert calibrated_scores(torch.tensor([2.0])).tolist() == [0.5]


def test_calibrated_scores_are_means_over_the_other_images():
    """The rewards (log 3, 0, 0) give (3/4 + 3/4) / 2 and (1/4 + 1/2) / 2. There are two prompts."""
    rewards = torch.tensor([[math.log(3), 0.0, 0.0], [0.0, 0.0, math.log(3)]])
    expected = torch.tensor([[0.75, 0.375, 0.375], [0.375, 0.375, 0.75]])
    torch.testing.assert_close(calibrated_scores(rewards), expected)
