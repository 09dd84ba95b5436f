"""What losers are multiplied by besides lambda, and one lambda per noise bin: gradients by hand in float64, and values
that stay equal to the bit."""

import pytest
import torch

from trl_diffusion_sdpo.losses import LOSSES, diffusion_preference_loss

GRANULARITIES = ("batch", "pair", "weighted", "noise_bin")
WEIGHTS = torch.tensor([0.25, 0.0, 1.0])
SCORES = torch.tensor([2.0, 0.5, 1.5, 1.0, 0.0, -3.0])
SETTINGS = {
    "sigmoid": (0.8, {}),
    "hinge": (0.3, {}),
    "ipo": (0.7, {}),
    "robust": (0.8, {"label_smoothing": 0.2}),
    "dspo": (0.5, {}),
    "dspo_sdxl": (0.8, {"dspo_threshold": 0.0}),
    "dmpo": (0.3, {"dmpo_alpha": 0.05}),
    "mapo": (0.4, {"mapo_scale": 0.5, "mapo_temperature": 3.0}),
    "simpo": (0.8, {"simpo_gamma": 0.3}),
    "dpop": (0.8, {"dpop_lambda": 2.0}),
    "linear": (0.3, {"linear_eta": 0.05}),
    "smpo": (0.8, {"smpo_coefficient": 3.0, "smpo_score_scale": 2.0}),
    "capo": (0.3, {}),
    "apo_zero": (0.8, {}),
    "apo_down": (0.8, {}),
}
# Residuals of three pairs, target 0. |r_w|^2 = 1, 1, 25 and <r_w, r_l> = 2, 4, 24.
THREE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [2.0, 1.0], [4.0, 0.0], [4.0, 3.0]])


@pytest.fixture
def parts_by_hand(gradient_by_differences):
    """`parts_by_hand(name, tensors)`: gradients of the mean loss at the winners and at the losers, in float64."""

    def parts(name, tensors):
        beta, loss_kwargs = SETTINGS[name]
        return gradient_by_differences(name, *tensors, beta=beta, loss_kwargs=loss_kwargs, scores=SCORES).chunk(2)

    return parts


def gradient(tensors, name="sigmoid", **given):
    beta, loss_kwargs = SETTINGS[name]
    model, target, ref = tensors
    leaf = model.clone().requires_grad_()
    out = diffusion_preference_loss(
        leaf,
        target,
        ref,
        loss_type=name,
        beta=beta,
        scores=SCORES if LOSSES[name].needs_scores else None,
        **loss_kwargs,
        **given,
    )
    out.loss.backward()
    return leaf.grad, out


def column(values, like):
    return values.view(-1, *[1] * (like.dim() - 1))


@pytest.mark.parametrize("name", SETTINGS)
def test_each_losers_gradient_is_multiplied_and_its_winners_is_not(name, seeded_pairs, parts_by_hand):
    tensors = seeded_pairs()
    pull, push = parts_by_hand(name, tensors)
    assert pull.any() and push.any()
    got, out = gradient(tensors, name, safeguard="none", loser_weights=WEIGHTS)
    expected = torch.cat([pull, column(WEIGHTS.double(), push) * push])
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=1e-6)
    assert not got[4].any()  # the loser of the pair of weight 0
    assert out.scale == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_lambda_of_the_batch_multiplies_them_besides(name, seeded_pairs, parts_by_hand):
    """Its bound compares what is left: winners of pairs whose loser trains, losers times their weights."""
    tensors = seeded_pairs()
    model, target, _ = (tensor.double() for tensor in tensors)
    pull, push = parts_by_hand(name, tensors)
    residual_w, residual_l = (model - target).chunk(2)
    plain = LOSSES[name].equal_weights
    winner, loser = (residual_w, residual_l) if plain else (pull, -push)
    count = column((WEIGHTS > 0).double(), winner)
    gain = (count * residual_w * winner).sum()
    dot = (residual_w * loser * column(WEIGHTS.double(), loser)).sum()
    assert dot > 0
    scale = min(max(0.4 * float(gain / dot), 0.0), 1.0)  # the winners of `apo_down` have a gain below 0
    got, out = gradient(tensors, name, safeguard_mu=0.6, loser_weights=WEIGHTS)
    assert float(out.scale) == pytest.approx(scale, rel=2e-5)
    expected = torch.cat([pull, scale * column(WEIGHTS.double(), push) * push])
    torch.testing.assert_close(got.double(), expected, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_of_one_change_no_bit_of_the_gradient(name, dtype, seeded_pairs):
    tensors = [tensor.to(dtype) for tensor in seeded_pairs()]
    noise_bins = {"noise_bins": torch.tensor([1, 0, 1]), "num_noise_bins": 2}
    settings = [{"safeguard_granularity": which} for which in GRANULARITIES]
    if dtype == torch.float32:  # without any scale, what DSPO reads twice is rounded to half precision twice
        settings.append({"safeguard": "none"})
    for setting in settings:
        plain, _ = gradient(tensors, name, **setting, **noise_bins)
        weighted, _ = gradient(tensors, name, **setting, **noise_bins, loser_weights=torch.ones(3))
        assert torch.equal(plain, weighted), setting


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_of_zero_leave_the_winners_alone(name, seeded_pairs):
    tensors = seeded_pairs()
    plain, _ = gradient(tensors, name, safeguard="none")
    for granularity in GRANULARITIES:
        got, out = gradient(
            tensors,
            name,
            safeguard_granularity=granularity,
            loser_weights=torch.zeros(3),
            noise_bins=torch.tensor([0, 1, 1]),
            num_noise_bins=2,
        )
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
