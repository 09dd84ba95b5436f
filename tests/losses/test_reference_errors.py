"""The reference's errors in place of its predictions: the same numbers to the bit, or a refusal with a reason."""

import pytest
import torch
from losses.settings import SAFEGUARD

from trl_diffusion_sdpo.losses import LOSSES, diffusion_preference_loss, loss_spec, mean_error, pair_terms

FROM_ERRORS = [name for name, spec in LOSSES.items() if spec.needs_reference and not spec.reads_reference_prediction]
SCORES = torch.tensor([2.0, 0.5, 1.5, 1.0, 0.0, -3.0])  # of the third pair the loser's is higher after a swap


def outcome(model: torch.Tensor, target: torch.Tensor, **settings) -> list[torch.Tensor]:
    leaf = model.clone().requires_grad_()
    out = diffusion_preference_loss(leaf, target, **settings)
    out.loss.backward()
    metrics = [out.metrics[name] for name in sorted(out.metrics)]
    return [out.loss, leaf.grad, out.scale, out.pair_losses, out.pair_rewards, out.pair_errors, *metrics]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("granularity", ["batch", "pair", "weighted"])
@pytest.mark.parametrize("loss_type", FROM_ERRORS)
def test_every_loss_is_equal_to_the_bit_with_weights_and_scores_that_swap_pairs(loss_type, granularity, seeded_pairs):
    model, target, reference = seeded_pairs()
    settings = {"loss_type": loss_type, "beta": 2.0, "safeguard_granularity": granularity, "scores": SCORES}
    settings["safeguard"] = SAFEGUARD[loss_type]
    settings["timestep_weights"] = torch.tensor([0.3, 1.7, 0.0])
    live = outcome(model, target, ref_pred=reference, **settings)
    assert_equal(outcome(model, target, ref_errors=mean_error(reference - target), **settings), live)


def test_losses_that_read_the_prediction_are_those_that_read_the_winners_shift(seeded_pairs):
    model, target, reference = seeded_pairs()
    terms = pair_terms(model, target, ref_errors=mean_error(reference - target))
    assert terms.winner_shift is None
    for name, spec in LOSSES.items():
        assert spec.reads_reference_prediction == (name in ("dspo", "dspo_sdxl"))
        if spec.reads_reference_prediction:
            with pytest.raises(ValueError, match=f"The loss '{name}' reads the reference's prediction"):
                diffusion_preference_loss(model, target, ref_errors=mean_error(reference - target), loss_type=name)
    assert not loss_spec("sft").needs_reference


def test_errors_of_another_shape_or_beside_predictions_are_refused(seeded_pairs):
    model, target, reference = seeded_pairs()
    with pytest.raises(ValueError, match=r"`ref_errors`.*\(6,\).*\(3,\)"):
        diffusion_preference_loss(model, target, ref_errors=torch.zeros(3))
    with pytest.raises(ValueError, match="`ref_pred`.*`ref_errors`"):
        diffusion_preference_loss(model, target, reference, ref_errors=torch.zeros(6))
