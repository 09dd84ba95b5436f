"""The one call from predictions to a loss: reductions, precision, and what it refuses."""

import pytest
import torch

from trl_diffusion_sdpo.losses import diffusion_preference_loss

SCORES = torch.tensor([2.0, 0.5, 1.5, 1.0, 0.0, -3.0])


def test_the_result_has_the_documented_shapes_and_is_detached_but_for_the_loss(seeded_pairs):
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


def test_without_a_batch_axis_of_pairs_nothing_is_computed(seeded_pairs):
    model, target, reference = seeded_pairs()
    rule = "`model_pred` and `target`"
    for bad_model, bad_target in (
        (model[:5], target[:5]),  # odd
        (model[:0], target[:0]),  # empty
        (model, target[:4]),
        (model[:, 0, 0], target[:, 0, 0]),  # no dimension to average over
    ):
        with pytest.raises(ValueError, match=rule):
            diffusion_preference_loss(bad_model, bad_target, reference)


@pytest.mark.parametrize("loss_type", ["sigmoid", "dspo"])
def test_a_missing_reference_is_refused_by_losses_that_read_one(loss_type: str, seeded_pairs):
    model, target, _ = seeded_pairs()
    with pytest.raises(ValueError, match=f"The loss '{loss_type}' needs `ref_pred`"):
        diffusion_preference_loss(model, target, loss_type=loss_type, scores=SCORES)


def test_a_missing_beta_is_refused_except_by_sft(seeded_pairs):
    with pytest.raises(ValueError, match="'dmpo' needs `beta`"):
        diffusion_preference_loss(*seeded_pairs(), loss_type="dmpo", beta=None)
    assert diffusion_preference_loss(*seeded_pairs(), loss_type="sft", beta=None).loss.isfinite()


@pytest.mark.parametrize("name", ["pair_weights", "timestep_weights"])
@pytest.mark.parametrize("shape", [(3, 1), ()])
def test_weights_of_another_shape_are_refused_rather_than_broadcast(name: str, shape, seeded_pairs):
    with pytest.raises(ValueError, match=rf"`{name}` must have shape \(3,\)"):
        diffusion_preference_loss(*seeded_pairs(), **{name: torch.ones(shape)})


def test_unknown_names_are_refused_with_those_there_are(seeded_pairs):
    tensors = seeded_pairs()
    with pytest.raises(ValueError, match="`loss_type`.*'kto'"):
        diffusion_preference_loss(*tensors, loss_type="kto")
    with pytest.raises(ValueError, match="`dmpo_alpha`"):
        diffusion_preference_loss(*tensors, dmpo_alpha=0.01)
    with pytest.raises(ValueError, match="`beta`"):
        diffusion_preference_loss(*tensors, beta=0.0)
