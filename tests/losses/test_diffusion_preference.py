"""The one call from predictions to a loss: shapes, pair weights, half precision, and refusals."""

import pytest
import torch

from trl_diffusion_sdpo.losses import diffusion_preference_loss


def test_the_result_has_the_documented_shapes_and_only_the_loss_has_a_gradient(seeded_pairs):
    model, target, reference = seeded_pairs()
    for granularity, shape in (("batch", ()), ("pair", (3,)), ("weighted", ())):
        out = diffusion_preference_loss(model.requires_grad_(), target, reference, safeguard_granularity=granularity)
        assert out.loss.shape == () and out.loss.requires_grad
        assert out.scale.shape == shape and not out.scale.requires_grad
        assert out.pair_losses.shape == (3,) and not out.pair_losses.requires_grad
        assert {out.loss.dtype, out.scale.dtype, out.pair_losses.dtype} == {torch.float32}


def test_pair_weights_multiply_losses_before_the_mean(seeded_pairs):
    model, target, reference = seeded_pairs()
    weights = torch.tensor([0.0, 1.0, 3.0])
    leaf = model.clone().requires_grad_()
    out = diffusion_preference_loss(leaf, target, reference, beta=1.0, pair_weights=weights)
    plain = diffusion_preference_loss(model, target, reference, beta=1.0)
    assert torch.equal(out.pair_losses, plain.pair_losses)
    second, third = plain.pair_losses.tolist()[1:]
    assert out.loss.item() == pytest.approx((second + 3 * third) / 3, rel=1e-6)
    out.loss.backward()
    assert not leaf.grad[[0, 3]].any() and leaf.grad[[1, 2, 4, 5]].any()


def test_bfloat16_and_published_beta_leave_no_noise_in_the_logit(seeded_pairs, losses_by_hand):
    tensors = [tensor.bfloat16() for tensor in seeded_pairs(residual=0.1, shift=0.01, shape=(4, 8, 8))]
    out = diffusion_preference_loss(*tensors, beta=5000.0)
    expected = losses_by_hand("sigmoid", *tensors, beta=5000.0)
    assert out.pair_losses.tolist() == pytest.approx(expected, rel=1e-4)  # errors of 1e-2 times 2500, in float32


@pytest.mark.parametrize("granularity", ["batch", "pair", "weighted"])
def test_lambda_acts_on_bfloat16_predictions_without_being_rounded_itself(granularity: str, seeded_pairs):
    model, target, reference = (tensor.bfloat16() for tensor in seeded_pairs(shape=(4, 16, 16)))

    def gradient(**settings) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = model.clone().requires_grad_()
        out = diffusion_preference_loss(leaf, target, reference, beta=0.5, **settings)
        out.loss.backward()
        return leaf.grad.float().chunk(2), out.scale.view(-1, 1, 1, 1)

    (winner, loser), scale = gradient(safeguard_mu=0.6, safeguard_granularity=granularity)
    (plain_winner, plain_loser), _ = gradient(safeguard="none")
    assert scale.max() < 1 and torch.equal(winner, plain_winner)
    # single roundings to bfloat16 are off by up to 2^-9 but cancel along the tensor; a rounded lambda does not
    for got, plain, factor in zip(loser, plain_loser, scale.expand(3, 1, 1, 1), strict=True):
        assert ((got * plain).sum() / plain.square().sum()).item() == pytest.approx(factor.item(), rel=3e-4)


@pytest.mark.parametrize("rows", [5, 0])
def test_predictions_that_are_not_pairs_are_refused(rows, seeded_pairs):
    model, target, reference = (tensor[:rows] for tensor in seeded_pairs())
    with pytest.raises(ValueError, match="`model_pred` and `target`"):
        diffusion_preference_loss(model, target, reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "orpo"}, "`loss_type`.*'orpo'"),
        ({"loss_type": "sigmoid", "ref_pred": None}, "'sigmoid' needs `ref_pred`"),
        ({"loss_type": "dmpo", "beta": None}, "'dmpo' needs `beta`"),
        ({"beta": 0.0}, "`beta`"),
        ({"dmpo_alpha": 0.01}, "`dmpo_alpha`"),
        ({"pair_weights": torch.ones(3, 1)}, r"`pair_weights` must have shape \(3,\)"),
        ({"timestep_weights": torch.ones(())}, r"`timestep_weights` must have shape \(3,\)"),
        ({"safeguard_granularity": "noise_bin"}, "`safeguard_granularity='noise_bin'` needs `noise_bins`"),
    ],
)
def test_wrong_settings_are_refused(settings, message, seeded_pairs):
    model, target, reference = seeded_pairs()
    with pytest.raises(ValueError, match=message):
        diffusion_preference_loss(model, target, **{"ref_pred": reference, **settings})
