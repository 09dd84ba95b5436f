"""Sums of losses and the cap of the logit by hand, and lambda and gradients of every loss, sum and weight under every
safeguard of output space against a second implementation in float64."""

import math

import pytest
import torch
from losses.settings import BETA, SETTINGS

from trl_diffusion_sdpo.losses import (
    LOSSES,
    check_loss_kwargs,
    diffusion_preference_loss,
    loss_spec,
    loss_weights_by_name,
)

LOG3 = math.log(3)
# As in test_preference: err_w = 1, d_w = -3, err_l = 4, d_l = 3, u = 3 beta.
MODEL, REFERENCE, ZERO = torch.tensor([[1.0], [2.0]]), torch.tensor([[-2.0], [1.0]]), torch.zeros(2, 1)
BINS = torch.tensor([0, 1, 0])
PAIR_WEIGHTS, LOSER_WEIGHTS = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([0.25, 0.0, 1.0])
SCORES = torch.tensor([0.9, 0.5, 0.8, 0.3, 0.4, 0.1])  # winners first, each ahead of its loser


def one_pair(beta=LOG3 / 3, **given):
    return diffusion_preference_loss(MODEL, ZERO, REFERENCE, beta=beta, safeguard="none", **given)


# ---- Values --------------------------------------------------------------------------------------------------------


def test_a_sum_is_the_weighted_sum_of_its_parts():
    # sigmoid(log 3) = 3/4; the winner's error is 1
    expected = 2 * math.log(4 / 3) + 0.5 * 1
    assert one_pair(loss_type=["sigmoid", "sft"], loss_weights=[2.0, 0.5]).loss.item() == pytest.approx(expected)
    assert one_pair(loss_type=["sft", "sigmoid"]).loss.item() == pytest.approx(math.log(4 / 3) + 1)
    assert one_pair(loss_type="sigmoid", loss_weights=[3.0]).loss.item() == pytest.approx(3 * math.log(4 / 3))


def test_a_part_of_weight_zero_is_no_part():
    spec = loss_spec(["sigmoid", "sft"], [0.0, 2.0])
    assert not spec.uses_loser and not spec.needs_reference and not spec.uses_beta and spec.anchor == "branch"
    assert not spec.compares_images and loss_spec(["tgo", "sigmoid"]).compares_images
    given = {"loss_weights": [0.0, 2.0], "beta": None, "dmpo_alpha": 0.1}
    out = diffusion_preference_loss(MODEL, ZERO, None, loss_type=["dmpo", "sft"], **given)
    assert out.loss.item() == 2.0
    check_loss_kwargs(["dmpo", "sft"], 1.0, {"dmpo_alpha": 0.1})


def test_a_clamped_pair_has_the_loss_of_the_clamp_and_no_gradient():
    # u = log 3 = 1.0986
    for clamp, expected, is_won in ((0.5, math.log1p(math.exp(-0.5)), True), (2.0, math.log(4 / 3), False)):
        leaf = MODEL.clone().requires_grad_()
        out = diffusion_preference_loss(leaf, ZERO, REFERENCE, beta=LOG3 / 3, safeguard="none", margin_clamp=clamp)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected)
        assert bool(leaf.grad.any()) is not is_won


def test_capo_has_a_target_for_each_pair():
    # u = 3 beta = 0.6 of both pairs; calibrated scores 0.5 and 0.7 apart: one is past its target, one short of it
    model, reference = MODEL.repeat_interleave(2, 0), REFERENCE.repeat_interleave(2, 0)
    leaf = model.clone().requires_grad_()
    scores = torch.tensor([0.8, 0.8, 0.3, 0.1])
    given = {"loss_type": "capo", "beta": 0.2, "scores": scores, "safeguard": "none"}
    out = diffusion_preference_loss(leaf, torch.zeros(4, 1), reference, **given)
    out.loss.backward()
    assert out.pair_losses.tolist() == pytest.approx([0.01, 0.01], rel=1e-4)
    assert out.metrics["safeguard/past_target"].item() == 0.5
    # d/d err_w = 2 (u - target)(-beta / 2) = -+0.02, d err_w / d prediction = 2, the mean over two pairs
    assert leaf.grad.flatten().tolist() == pytest.approx([-0.02, 0.02, 0.04, -0.04], rel=1e-4)


# ---- Gradients under the safeguard, by loops -----------------------------------------------------------------------

CASES = [
    (["sigmoid", "sft"], [1.0, 0.3], {}),
    (["dmpo", "sft"], [1.0, 0.2], {}),
    (["dspo", "sigmoid"], [1.0, 1.0], {}),
    ("capo", None, {}),
    ("sigmoid", None, {"margin_clamp": 0.05}),
    (["sigmoid", "sft"], [1.0, 0.3], {"margin_clamp": 0.05}),
    (["apo_down", "sft"], [1.0, 0.4], {}),
    *((name, None, {}) for name in LOSSES if name not in ("sft", "capo", "apo_down")),
]


def parts_of(loss_type, weights):
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    return dict(zip(names, weights or [1.0] * len(names), strict=True))


def gradient_of(parts, tensors, beta, gradient_by_hand, clamp=None):
    """Return the gradient of each pair's share of the mean loss, in float64, part by part. Rows of
    pairs that the cap has won are 0."""
    model, target, ref = tensors
    total = torch.zeros(model.shape, dtype=torch.float64)
    error = (model - target).double().square().flatten(1).mean(1) - (ref - target).double().square().flatten(1).mean(1)
    logit = -beta / 2 * (error[:3] - error[3:])
    for name, weight in parts.items():
        part = gradient_by_hand(name, *tensors, beta=beta, loss_kwargs=SETTINGS.get(name, {}), scores=SCORES).clone()
        if clamp is not None and name != "sft":
            part[(logit > clamp).repeat(2)] = 0
        total += weight * part
    return total, logit


def expected_scale(granularity, plain, gradient, residual, mu, pair_weights, loser_weights):
    """Return lambda of each pair in float64, by the closed form over groups of pairs.

    If `plain`, all errors weigh alike, and residuals stand for gradients. A pair of loser weight 0 is left out.
    """
    groups = {"batch": [[0, 1, 2]], "weighted": [[0, 1, 2]], "pair": [[0], [1], [2]], "noise_bin": [[0, 2], [1]]}
    scale = [1.0] * 3
    for group in groups[granularity]:
        rows = [row for row in group if loser_weights[row] > 0 and (pair_weights[row] > 0 or not plain)]
        gain = dot = 0.0
        for row in rows:
            winner, loser = (residual[row], residual[row + 3]) if plain else (gradient[row], -gradient[row + 3])
            gain += float((residual[row] * winner).sum())
            dot += float(loser_weights[row] * (residual[row] * loser).sum())
        for row in group:
            scale[row] = min(max((1 - mu) * gain / dot, 0.0), 1.0) if dot > 1e-12 else 1.0
    return torch.tensor(scale, dtype=torch.float64)


@pytest.mark.parametrize("weighted", ["", "pair_weights", "loser_weights"])
@pytest.mark.parametrize("granularity", ["batch", "pair", "weighted", "noise_bin"])
@pytest.mark.parametrize("case", CASES, ids=[str(case) for case in CASES])
def test_lambda_and_the_gradient_are_those_of_a_loop(case, granularity, weighted, seeded_pairs, gradient_by_hand):
    """The values of the losses are those without a safeguard."""
    loss_type, weights, given = case
    tensors, beta, mu, spec = seeded_pairs(seed=1), BETA, 0.5, loss_spec(loss_type, weights)
    pair_weights = PAIR_WEIGHTS if weighted == "pair_weights" else torch.ones(3)
    loser_weights = LOSER_WEIGHTS if weighted == "loser_weights" else torch.ones(3)
    parts = parts_of(loss_type, weights)
    gradient, logit = gradient_of(parts, tensors, beta, gradient_by_hand, given.get("margin_clamp"))
    assert "margin_clamp" not in given or 0 < int((logit > 0.05).sum()) < 3
    gradient *= pair_weights.double().repeat(2).view(-1, 1, 1)
    plain = spec.equal_weights and granularity != "weighted" and (spec.positive_weights or granularity != "pair")
    residual = (tensors[0] - tensors[1]).double()
    scale = expected_scale(granularity, plain, gradient, residual, mu, pair_weights, loser_weights)
    leaf = tensors[0].clone().requires_grad_()
    settings = {"loss_type": loss_type, "loss_weights": weights, "beta": beta, "scores": SCORES, **given}
    settings |= {name: value for part in parts for name, value in SETTINGS.get(part, {}).items()}
    out = diffusion_preference_loss(
        leaf,
        *tensors[1:],
        safeguard_mu=mu,
        safeguard_granularity=granularity,
        noise_bins=BINS,
        num_noise_bins=2,
        pair_weights=pair_weights if weighted == "pair_weights" else None,
        loser_weights=loser_weights if weighted == "loser_weights" else None,
        **settings,
    )
    out.loss.backward()
    expected = gradient * torch.cat([torch.ones(3), scale * loser_weights]).view(-1, 1, 1)
    assert (leaf.grad - expected).norm() < 2e-5 * expected.norm()
    # A pair without a gradient may have any lambda.
    acts = gradient[3:].flatten(1).norm(dim=1) > 0
    assert torch.allclose(out.scale.double().expand(3)[acts], scale[acts], rtol=1e-4)
    unguarded = diffusion_preference_loss(*tensors, safeguard="none", **settings)
    assert torch.equal(out.pair_losses, unguarded.pair_losses)


# ---- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "weights", "message"),
    [
        ([], None, "`loss_type`"),
        (["sigmoid", "sft", "sigmoid"], None, "several different ones"),
        (["dspo", "dspo_sdxl"], None, "`dspo` and `dspo_sdxl`"),
        (["sigmoid", "sft"], [1.0], "`loss_weights`"),
        (["sigmoid", "sft"], [1.0, -0.1], "at least 0"),
        (["sigmoid", "sft"], [0.0, 0.0], "`loss_weights`"),
    ],
)
def test_a_wrong_list_is_refused(loss_type, weights, message):
    with pytest.raises(ValueError, match=message):
        loss_weights_by_name(loss_type, weights)
