"""Weights of losers, which multiply lambda, and one lambda for each noise bin: by hand, and equal to the bit."""

import pytest
import torch

from trl_diffusion_sdpo.losses import LOSSES, diffusion_preference_loss

GRANULARITIES = ("batch", "pair", "weighted", "noise_bin")
SCORES = torch.tensor([2.0, 0.5, 1.5, 1.0, 0.0, -3.0])
# Residuals of three pairs, target 0. |r_w|^2 = 1, 1, 25 and <r_w, r_l> = 2, 4, 24.
THREE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [2.0, 1.0], [4.0, 0.0], [4.0, 3.0]])


def gradient(tensors, name, **given):
    leaf = tensors[0].clone().requires_grad_()
    scores = SCORES if LOSSES[name].needs_scores else None
    out = diffusion_preference_loss(leaf, *tensors[1:], loss_type=name, beta=0.8, scores=scores, **given)
    out.loss.backward()
    return leaf.grad, out


WITH_LOSER = [name for name, spec in LOSSES.items() if spec.uses_loser]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_LOSER)
def test_weights_of_one_change_no_bit_of_the_gradient(name, dtype, seeded_pairs):
    tensors = [tensor.to(dtype) for tensor in seeded_pairs()]
    noise_bins = {"noise_bins": torch.tensor([1, 0, 1]), "num_noise_bins": 2}
    for granularity in GRANULARITIES:
        given = {"safeguard_granularity": granularity, **noise_bins}
        plain, _ = gradient(tensors, name, **given)
        weighted, _ = gradient(tensors, name, **given, loser_weights=torch.ones(3))
        assert torch.equal(plain, weighted), granularity


@pytest.mark.parametrize("name", WITH_LOSER)
def test_weights_of_zero_leave_the_winners_alone(name, seeded_pairs):
    tensors = seeded_pairs()
    plain, _ = gradient(tensors, name, safeguard="none")
    noise_bins = {"noise_bins": torch.tensor([0, 1, 1]), "num_noise_bins": 2}
    for granularity in GRANULARITIES:
        given = {"safeguard_granularity": granularity, **noise_bins}
        got, out = gradient(tensors, name, **given, loser_weights=torch.zeros(3))
        assert torch.equal(got[:3], plain[:3]) and not got[3:].any(), granularity
        assert (out.scale == 1).all(), granularity  # nothing to bound


def lambda_of(granularity, mu=0.0, **given):
    return diffusion_preference_loss(
        THREE, torch.zeros(6, 2), THREE, beta=0.8, safeguard_mu=mu, safeguard_granularity=granularity, **given
    ).scale


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0, 1.0, 1.0], 27 / 30),
        ([1.0, 1.0, 0.0], 2 / 6),  # the third pair is left out of both sums
        ([0.0, 1.0, 0.0], 1 / 4),
        ([1.0, 0.5, 0.0], 2 / 4),  # half of the second loser
        ([0.0, 0.0, 0.25], 1.0),  # 25 / 6
        ([0.0, 0.0, 0.0], 1.0),
    ],
)
def test_lambda_of_the_batch_leaves_out_pairs_of_weight_zero(weights, expected):
    scale = lambda_of("batch", loser_weights=torch.tensor(weights))
    assert scale.shape == () and float(scale) == pytest.approx(expected, rel=1e-6)


def test_lambda_of_a_pair_knows_its_own_weight():
    scale = lambda_of("pair", loser_weights=torch.tensor([1.0, 0.5, 0.0]))
    assert scale.tolist() == pytest.approx([1 / 2, 1 / 2, 1.0], rel=1e-6)


@pytest.mark.parametrize(
    ("noise_bins", "weights", "mu", "expected"),
    [
        ([0, 0, 1], None, 0.0, [2 / 6, 2 / 6, 1.0]),  # 25 / 24, clamped
        ([0, 0, 1], None, 0.52, [0.48 * 2 / 6, 0.48 * 2 / 6, 0.5]),
        ([3, 1, 3], None, 0.0, [1.0, 1 / 4, 1.0]),  # 26 / 26; two of four bins are empty
        ([0, 1, 2], None, 0.0, [1 / 2, 1 / 4, 1.0]),
        ([0, 0, 1], [1.0, 0.5, 0.0], 0.0, [2 / 4, 2 / 4, 1.0]),
        ([0, 1, 1], [1.0, 1.0, 0.0], 0.0, [1 / 2, 1 / 4, 1 / 4]),
    ],
)
def test_lambda_of_a_noise_bin_is_that_of_its_pairs(noise_bins, weights, mu, expected):
    weights = None if weights is None else torch.tensor(weights)
    scale = lambda_of("noise_bin", mu, noise_bins=torch.tensor(noise_bins), num_noise_bins=4, loser_weights=weights)
    assert scale.tolist() == pytest.approx(expected, rel=1e-6)


def test_noise_bins_are_needed_where_each_has_a_lambda(seeded_pairs):
    with pytest.raises(ValueError, match="`safeguard_granularity='noise_bin'` needs `noise_bins`"):
        diffusion_preference_loss(*seeded_pairs(), safeguard_granularity="noise_bin")
    diffusion_preference_loss(
        *seeded_pairs(), safeguard_granularity="noise_bin", safeguard="none"
    )  # asks for no lambda
