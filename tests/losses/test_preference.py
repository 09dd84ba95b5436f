"""The loss table: values derived by hand, a second implementation in float64, limits and identities."""

import math
from dataclasses import replace

import pytest
import torch
from losses.settings import BETA, SAFEGUARD, SETTINGS

from trl_diffusion_sdpo.families.loss_defaults import FALLBACK, STABLE_DIFFUSION_DEFAULTS
from trl_diffusion_sdpo.losses import (
    LOSSES,
    LossSpec,
    PairTerms,
    check_loss_kwargs,
    diffusion_preference_loss,
    loss_spec,
    pair_terms,
)

LOG3 = math.log(3)

# One pair of one-element predictions with target 0: prediction 1 and reference -2 of the winner, 2 and 1 of the loser.
# err_w = 1, ref_err_w = 4, err_l = 4, ref_err_l = 1; so d_w = -3, d_l = 3, m = -6 and u = -(beta / 2) m = 3 beta.
# With beta = log(3) / 3 the logit is log 3, hence sigmoid(u) = 3/4 and sigmoid(-u) = 1/4.
# The winner's residual is 1 and its shift from the reference 1 - (-2) = 3.
MODEL, REFERENCE = [[1.0], [2.0]], [[-2.0], [1.0]]
BY_HAND = {
    "sigmoid": (LOG3 / 3, {}, math.log(4 / 3)),
    "hinge": (0.25, {}, 0.25),  # u = 3/4
    "ipo": (0.5, {}, 4.0),  # u = 3/2: (3 - 1)^2
    "robust": (LOG3 / 3, {"label_smoothing": 0.25}, 2 * (0.75 * math.log(4 / 3) - 0.25 * math.log(4))),
    "dspo": (LOG3 / 3, {}, (1 - LOG3 / 3 / 4 * 3) ** 2),
    "dspo_sdxl": (LOG3 / 3, {}, (3 / 4) ** 2),  # shift^2 = 9 >= 0.1: (1/4 * 3)^2
    "dmpo": (LOG3 / 3, {"dmpo_alpha": 0.1}, 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)),
    "sft": (None, {}, 1.0),
    # s = log 2: f(1) = log 2 / (2 - 1), f(4) = 4 log 2 / (16 - 1), f(1) - f(4) = 11/15 log 2; T = 15/11: sigmoid = 2/3
    "mapo": (0.1, {"mapo_scale": math.log(2), "mapo_temperature": 15 / 11}, 1 + 0.1 * math.log(3 / 2)),
    "simpo": (2.0, {"simpo_gamma": 3 - LOG3}, math.log(4 / 3)),  # -(1)(1 - 4) - 3 + log 3
    "dpop": (LOG3 / 3, {"dpop_lambda": 7.0}, math.log(4 / 3)),  # d_w < 0: nothing is charged
    "linear": (0.25, {}, -0.6),  # weight 0.2 * 0.25 * (-6) + 0.5 = 0.2, times 1 - 4
    "smpo": (LOG3 / 3, {"smpo_coefficient": 2.0}, math.log(4 / 3)),  # scores log 3 apart: p = 3/4, 2 (2p - 1) = 1
    "capo": (0.25, {}, (0.75 - LOG3) ** 2),  # u = 3/4, and the scores are log 3 apart
    # beta 2/3 log 3: r_w = -(beta / 2) d_w = log 3 and r_l = -log 3, hence u = 2 log 3 = log 9
    "apo_zero": (LOG3 / 1.5, {}, 1 / 4 + 1 / 4),
    "apo_down": (LOG3 / 1.5, {}, 3 / 4 + 1 / 10),
    # the same rewards: sigma(r_w) = sigma(-r_l) = 3/4
    "tgo": (LOG3 / 1.5, {}, math.log(4 / 3)),
    # z = max(0, (3 - 3) / 2) = 0, so x_w = x_l = log 3
    "kto": (LOG3 / 1.5, {"kto_loser_weight": 0.5}, (1 / 4 + 0.5 * 1 / 4) / 2),
}
SCORES = torch.tensor([LOG3, 0.0])

MILD_SCORES = torch.tensor([2.0, 0.5, 1.0, 1.0, 0.0, -3.0])  # winners first, each ahead of its loser


def terms_of_errors(winner, loser, ref_winner=0.0, ref_loser=0.0) -> PairTerms:
    """Terms of pairs given by their errors alone, in float64; the residual is that of one-element predictions."""
    errors = [torch.as_tensor(error, dtype=torch.float64).view(-1) for error in (winner, loser, ref_winner, ref_loser)]
    return PairTerms(*torch.broadcast_tensors(*errors), winner_residual=errors[0].sqrt().view(-1, 1))


def plain(model_pred, target, ref_pred, loss_type, beta, loss_kwargs=None, scores=None):
    given = {"loss_type": loss_type, "beta": beta, "scores": scores, **(loss_kwargs or {})}
    return diffusion_preference_loss(model_pred, target, ref_pred, safeguard="none", **given)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_value_is_the_one_derived_by_hand(loss_type: str):
    beta, loss_kwargs, expected = BY_HAND[loss_type]
    model, reference = torch.tensor(MODEL), torch.tensor(REFERENCE)
    out = plain(model, torch.zeros(2, 1), reference, loss_type, beta, loss_kwargs, SCORES)
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_of_a_batch_agree_with_a_second_implementation(loss_type: str, seeded_pairs, losses_by_hand):
    given = {"beta": BETA, "loss_kwargs": SETTINGS.get(loss_type, {}), "scores": MILD_SCORES}
    model, target, reference = seeded_pairs()
    out = plain(model, target, reference, loss_type, **given)
    expected = losses_by_hand(loss_type, model, target, reference, **given)
    assert out.pair_losses.tolist() == pytest.approx(expected, rel=2e-6)
    assert out.loss.item() == pytest.approx(math.fsum(expected) / 3, rel=2e-6)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        *((name, math.log(2)) for name in ("sigmoid", "robust", "dpop", "smpo")),
        ("hinge", 1.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("tgo", math.log(2)),
        ("kto", 0.5),
        ("ipo", 1 / (2 * 5000) ** 2),
        ("dspo_sdxl", 0.25),  # shift 0: the branch without it
        ("dmpo", 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_equal_to_reference_has_margin_zero_exactly(loss_type, expected, dtype, seeded_pairs):
    model, target, _ = seeded_pairs()
    model, target = model.to(dtype), target.to(dtype)
    given = {"loss_type": loss_type, "safeguard": SAFEGUARD[loss_type]}
    out = diffusion_preference_loss(model, target, model, scores=MILD_SCORES, **given)
    assert out.metrics["rewards/margins"].item() == 0
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_huge_logits_give_finite_losses_and_gradients(loss_type: str, sign: int):
    good, bad = torch.full((1, 4), 0.1), torch.full((1, 4), 9.0)
    model = torch.cat([good, bad] if sign > 0 else [bad, good]).requires_grad_()
    reference = torch.ones(2, 4)
    given = {"loss_type": loss_type, "safeguard": SAFEGUARD[loss_type], "scores": torch.tensor([1.0, 0.0])}
    out = diffusion_preference_loss(model, torch.zeros(2, 4), reference, beta=1e6, **given)
    out.loss.backward()
    assert out.loss.isfinite()
    assert model.grad.isfinite().all()


def test_dspo_sdxl_chooses_its_form_on_the_whole_batch():
    # Shifts 3 and 0 of two pairs: mean square 4.5. Both logits are log 3, so sigmoid(-u) = 1/4.
    # Winner 2: prediction 1, reference 1, d_w = 0; loser: 2.5^2 - 0.5^2 = 6 = d_l; u = (beta / 2) 6 = 3 beta as well.
    model, reference = torch.tensor([[1.0], [1.0], [2.0], [2.5]]), torch.tensor([[-2.0], [1.0], [1.0], [0.5]])
    for threshold, expected in ((4.5, [9 / 16, 0.0]), (4.6, [1 / 16, 1 / 16])):
        loss_kwargs = {"dspo_threshold": threshold}
        out = plain(model, torch.zeros(4, 1), reference, "dspo_sdxl", LOG3 / 3, loss_kwargs)
        assert out.pair_losses.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("error", [1e-12, 1.9e-4, 2.1e-4, 1.0, 50.0])
def test_mapo_of_a_perfect_winner_compares_with_exactly_one(error: float):
    # err_w = 0, f(0) = 1: loss = -logsigmoid(T (1 - f(err_l))), f at both sides of where a series takes over
    terms = terms_of_errors(0.0, error)
    loss = LOSSES["mapo"].pair_losses(terms, beta=1.0, mapo_temperature=1.0, mapo_scale=0.5).item()
    half = 0.5 * error
    assert loss == pytest.approx(math.log1p(math.exp(half / math.expm1(half) - 1)), rel=1e-13)


@pytest.mark.parametrize(
    ("loss_type", "winner_gradient", "loser_gradient"),
    [
        # beta 2: r = -change, so the winner's change of -log 3 is r_w = log 3; r_l = -log 9, u = log 27.
        # sigma' is 3/16 at log 3, 9/100 at log 9 and 27/784 at log 27; d r / d err = -1.
        ("apo_zero", 3 / 16, -9 / 100),
        ("apo_down", 27 / 784 - 3 / 16, -27 / 784),  # the winner's error is raised as well
        ("tgo", (1 / 4) / 2, -(1 / 10) / 2),  # -(1 - sigma), of a mean of two
        # z = max(0, (log 3 - log 9) / 2) = 0
        ("kto", (3 / 16) / 2, -(9 / 100) / 2),
    ],
)
def test_each_branch_is_weighed_by_its_own_reward(loss_type: str, winner_gradient: float, loser_gradient: float):
    winner = torch.tensor([5 - LOG3], dtype=torch.float64, requires_grad=True)
    loser = torch.tensor([1 + 2 * LOG3], dtype=torch.float64, requires_grad=True)
    LOSSES[loss_type].pair_losses(terms_of_errors(winner, loser, 5.0, 1.0), beta=2.0).sum().backward()
    assert (winner.grad.item(), loser.grad.item()) == pytest.approx((winner_gradient, loser_gradient), rel=1e-12)


def test_tgo_weighs_each_image_by_the_distance_of_its_score_from_the_threshold():
    # As above, r_w = log 3 and r_l = -log 9. With 5 as published, the weights are 1 + 5 * 0.3 and 1 + 5 * 0.1.
    winner = torch.tensor([5 - LOG3], dtype=torch.float64, requires_grad=True)
    loser = torch.tensor([1 + 2 * LOG3], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[0.3], [-0.1]], dtype=torch.float64)
    terms = replace(terms_of_errors(winner, loser, 5.0, 1.0), scores=scores)
    loss = LOSSES["tgo"].pair_losses(terms, beta=2.0, tgo_distance_weight=5.0)
    assert loss.item() == pytest.approx((2.5 * math.log(4 / 3) + 1.5 * math.log(10 / 9)) / 2, rel=1e-12)
    loss.sum().backward()
    assert winner.grad.item() == pytest.approx(2.5 * (1 / 4) / 2, rel=1e-12)
    assert loser.grad.item() == pytest.approx(-1.5 * (1 / 10) / 2, rel=1e-12)


def test_tgo_needs_scores_only_to_weigh_images():
    model, reference = torch.tensor(MODEL), torch.tensor(REFERENCE)
    weighed = {"tgo_distance_weight": 2.0}
    # Both terms are log(4/3), and the weights 1 + 2 log 3 and 1.
    out = plain(model, torch.zeros(2, 1), reference, "tgo", LOG3 / 1.5, weighed, SCORES)
    assert out.loss.item() == pytest.approx((2 + 2 * LOG3) / 2 * math.log(4 / 3))
    with pytest.raises(ValueError, match="'tgo' needs `scores`"):
        plain(model, torch.zeros(2, 1), reference, "tgo", LOG3 / 1.5, weighed)
    with pytest.raises(ValueError, match="tgo_distance_weight.*at least 0"):
        check_loss_kwargs("tgo", 1.0, {"tgo_distance_weight": -1.0})
    with pytest.raises(ValueError, match="not a setting of the loss 'kto'"):
        check_loss_kwargs("kto", 1.0, weighed)


# Gains of winners 4 and 8 and of losers 0 and 4, so z = 4; b = beta / 2 = 1/2: x_w = 0 and 2, x_l = 2 and 0.
UTILITIES = {  # h of the two winners, then of the two losers
    "sigmoid": ([0.5, 1 / (1 + math.exp(-2))], [1 / (1 + math.exp(-2)), 0.5]),
    "loss_averse": ([-math.log(2), -math.log1p(math.exp(-2))], [-math.log1p(math.exp(-2)), -math.log(2)]),
    "risk_seeking_1": ([math.log(2), math.log1p(math.exp(2))], [-math.log1p(math.exp(-2)), -math.log(2)]),
    "risk_seeking_2": ([0.0, math.exp(0.02) - 1], [-math.exp(-0.02) - 1, -2.0]),
    "risk_seeking_3": ([math.log(2), math.log1p(math.exp(2))], [math.log1p(math.exp(2)), math.log(2)]),
}


@pytest.mark.parametrize("utility", UTILITIES)
def test_kto_has_five_utilities(utility: str):
    terms = terms_of_errors([6.0, 2.0], [5.0, 1.0], 10.0, 5.0)
    found = LOSSES["kto"].pair_losses(terms, beta=1.0, kto_utility=utility, kto_loser_weight=3.0)
    winners, losers = UTILITIES[utility]
    expected = [(1 - better + 3 * (1 - worse)) / 2 for better, worse in zip(winners, losers, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_that_compares_no_images_has_a_gradient_for_each_that_the_other_does_not_change(loss_type: str):
    """Both errors above the reference's, where the mean gain of `kto` counts as 0."""
    gradients = []
    for loser in (2.0, 7.0):
        winner = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
        shift = torch.ones(1, 1, dtype=torch.float64)
        terms = replace(terms_of_errors(winner, loser, 1.0, 1.0), winner_shift=shift, scores=SCORES.view(2, 1))
        loss = loss_spec(loss_type).pair_losses(terms, beta=0.5, **SETTINGS.get(loss_type, {}))
        gradients.append(torch.autograd.grad(loss.sum(), winner)[0].item())
    assert (gradients[0] != gradients[1]) == LOSSES[loss_type].compares_images


def test_kto_compares_with_the_mean_of_all_processes_and_never_with_a_loss():
    terms = terms_of_errors([6.0], [5.0], 10.0, 5.0)  # gains 4 and 0
    for mean, z in ((2.5, 2.5), (-1.0, 0.0)):
        found = LOSSES["kto"].pair_losses(replace(terms, average=lambda own, mean=mean: own * 0 + mean), beta=2.0)
        expected = (1 / (1 + math.exp(4 - z)) + 1 / (1 + math.exp(z))) / 2
        assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", ["brave", 1.0])
def test_a_setting_that_is_a_word_is_checked(value):
    with pytest.raises(ValueError, match=r"kto_utility.*one of sigmoid.*" + str(value)):
        check_loss_kwargs("kto", 1.0, {"kto_utility": value})
    with pytest.raises(ValueError, match="kto_loser_weight.*at least 0"):
        check_loss_kwargs("kto", 1.0, {"kto_loser_weight": "sigmoid"})


@pytest.mark.parametrize(("margin", "weight"), [(-6.0, 0.4), (6.0, 0.6), (0.5, 0.525)])
def test_linear_clamps_its_weight_and_does_not_differentiate_it(margin: float, weight: float):
    # beta 0.25: 0.05 m + 0.5, i.e. 0.2, 0.8 and 0.525, clamped to [0.4, 0.6]
    winner = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    loser = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    terms = terms_of_errors(winner, loser, 5 - margin)
    loss = LOSSES["linear"].pair_losses(terms, beta=0.25, linear_eta=0.4)
    loss.sum().backward()
    assert loss.item() == pytest.approx(5 * weight)
    assert (winner.grad.item(), loser.grad.item()) == pytest.approx((weight, -weight))


def test_smpo_relabels_pairs_that_the_scores_rank_the_other_way(seeded_pairs):
    model, target, reference = seeded_pairs(pairs=2)
    swap_first = torch.tensor([2, 1, 0, 3])  # the first pair's sides exchanged
    scores = torch.tensor([1.5, 0.2, -0.5, 0.1])
    losses, gradients = [], []
    for order in (torch.arange(4), swap_first):
        leaf = model[order].clone().requires_grad_()
        out = plain(leaf, target[order], reference[order], "smpo", 0.8, {"smpo_coefficient": 3.0}, scores[order])
        out.loss.backward()
        losses.append(out.pair_losses)
        gradients.append(leaf.grad)
    assert torch.equal(*losses) and torch.equal(gradients[0][swap_first], gradients[1])


def test_the_reference_and_the_target_are_constants(seeded_pairs):
    model, target, reference = (tensor.requires_grad_() for tensor in seeded_pairs())
    for loss_type in SAFEGUARD:
        given = {"loss_type": loss_type, "safeguard": SAFEGUARD[loss_type], "scores": MILD_SCORES}
        diffusion_preference_loss(model, target, reference, **given).loss.backward()
    assert model.grad is not None
    assert target.grad is None and reference.grad is None


def test_mapo_of_perfect_predictions_has_a_finite_gradient():
    winner, loser = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    terms, settings = terms_of_errors(winner, loser), {"mapo_temperature": 1000.0, "mapo_scale": 0.5}
    LOSSES["mapo"].pair_losses(terms, beta=0.1, **settings).sum().backward()
    # f'(0) = -s/2 = -1/4; d/d err_w = 1 + beta T s/4 = 1 + 0.1 * 0.5 * 1000 * 0.25, d/d err_l = -12.5
    assert (winner.grad.item(), loser.grad.item()) == pytest.approx((13.5, -12.5))


def test_timestep_weights_multiply_errors(seeded_pairs, losses_by_hand):
    # a residual times the root of w has w times its mean square, whatever the loss
    model, target, reference = seeded_pairs()
    weights = torch.tensor([0.25, 1.0, 4.0])
    root = weights.sqrt().repeat(2).view(-1, 1, 1)
    rows = (root * (model - target), torch.zeros_like(target), root * (reference - target))
    for loss_type in SAFEGUARD:
        kwargs = SETTINGS.get(loss_type, {})
        given = {"loss_type": loss_type, "beta": BETA, "scores": MILD_SCORES, **kwargs}
        given["safeguard"] = SAFEGUARD[loss_type]
        out = diffusion_preference_loss(model, target, reference, timestep_weights=weights, **given)
        expected = losses_by_hand(loss_type, *rows, beta=BETA, loss_kwargs=kwargs, scores=MILD_SCORES)
        assert out.pair_losses.tolist() == pytest.approx(expected, rel=5e-6), loss_type


def test_pair_terms_are_float32_means_over_all_but_the_batch():
    model = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]], dtype=torch.bfloat16)
    terms = pair_terms(model, torch.zeros_like(model), torch.ones_like(model))
    assert terms.winner_error.tolist() == [7.5] and terms.loser_error.tolist() == [1.0]  # 30 / 4 and 4 / 4
    assert terms.winner_change.tolist() == [6.5] and terms.loser_change.tolist() == [0.0]
    assert terms.logit(2.0).tolist() == [-6.5]
    assert terms.winner_shift.tolist() == [[[0.0, 1.0], [2.0, 3.0]]]
    assert {terms.winner_error.dtype, terms.ref_loser_error.dtype, terms.winner_residual.dtype} == {torch.float32}


def test_before_the_first_step_a_loss_lowers_the_winners_error_if_its_row_says_so(seeded_pairs):
    model, target, _ = seeded_pairs()
    for loss_type, spec in LOSSES.items():
        leaf = model.clone().requires_grad_()
        given = {"scores": MILD_SCORES, "beta": 1e-3, "safeguard": "none"}
        diffusion_preference_loss(leaf, target, model, loss_type=loss_type, **given).loss.backward()
        falls = float((leaf.grad * (model - target)).chunk(2)[0].sum())
        assert (falls > 0) == spec.lowers_winner, loss_type


def test_a_loss_that_does_not_lower_the_winners_error_takes_no_safeguard():
    model, reference = torch.tensor(MODEL), torch.tensor(REFERENCE)
    with pytest.raises(ValueError, match="apo_down.*safeguard='none'"):
        diffusion_preference_loss(model, torch.zeros(2, 1), reference, loss_type="apo_down")
    summed = diffusion_preference_loss(model, torch.zeros(2, 1), reference, loss_type=["apo_down", "sft"])
    assert summed.loss.isfinite()


def test_a_row_without_flags_gets_lambda_from_its_gradients(monkeypatch):
    def unequal(terms):
        return 3 * terms.winner_error - terms.loser_error

    monkeypatch.setitem(LOSSES, "unequal", LossSpec(unequal))
    # lambda = 3 |r_w|^2 / <r_w, r_l> = 3 / 6, half of it with mu 0.5, in a batch as in a pair
    model = torch.tensor([[1.0], [6.0]], requires_grad=True)
    for granularity in ("batch", "pair"):
        given = {"loss_type": "unequal", "safeguard_mu": 0.5, "safeguard_granularity": granularity}
        out = diffusion_preference_loss(model, torch.zeros(2, 1), torch.zeros(2, 1), **given)
        assert float(out.scale) == 0.25
    assert loss_spec("unequal").anchor == "error"


def test_default_betas_are_the_published_ones_and_half_of_diffusion_dpos_for_capo():
    published = {"dspo": 0.001, "dmpo": 2000.0, "mapo": 0.1, "linear": 100.0, "capo": 2500.0}
    for loss_type, beta in published.items():
        assert STABLE_DIFFUSION_DEFAULTS[loss_type].beta == beta
    assert STABLE_DIFFUSION_DEFAULTS[FALLBACK].beta == 5000.0


@pytest.mark.parametrize(
    ("loss_type", "setting", "value", "rule"),
    [
        ("robust", "label_smoothing", 0.5, r"in \[0, 0.5\)"),
        ("dspo_sdxl", "dspo_threshold", -1.0, "at least 0"),
        ("mapo", "mapo_scale", math.nan, "greater than 0"),
        ("mapo", "mapo_temperature", math.inf, "greater than 0"),
    ],
)
def test_settings_out_of_range_are_refused(loss_type: str, setting: str, value: float, rule: str):
    with pytest.raises(ValueError, match=f"`{setting}` must be {rule}"):
        check_loss_kwargs(loss_type, 1.0, {setting: value})
