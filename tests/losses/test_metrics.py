"""The logged scalars, each from a batch small enough to work out."""

import pytest
import torch
from losses.settings import SAFEGUARD

from trl_diffusion_sdpo.losses import LOSSES, diffusion_preference_loss

# Two pairs of one-element predictions, target 0. Errors are squares:
#   err_w = 1, 9    ref 4, 4    d_w = -3, 5
#   err_l = 4, 16   ref 1, 4    d_l = 3, 12
MODEL = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
REFERENCE = torch.tensor([[2.0], [2.0], [1.0], [2.0]])
ERRORS = {"errors/winner": 5.0, "errors/loser": 10.0}
CHANGES = {"errors/winner_change": 1.0, "errors/loser_change": 7.5}


def metrics_of(model, reference=None, **settings) -> dict[str, float]:
    settings = {"beta": 4.0, "scores": torch.tensor([1.0, 1.0, 0.0, 0.0]), **settings}
    out = diffusion_preference_loss(model.clone().requires_grad_(), torch.zeros_like(model), reference, **settings)
    assert all(value.shape == () and not value.requires_grad for value in out.metrics.values())
    return {name: value.item() for name, value in out.metrics.items()}


def pair_metrics_of(*given, **settings) -> dict[str, float]:
    found = metrics_of(*given, **settings)
    return {name: value for name, value in found.items() if not name.startswith("safeguard/")}


def rewards(chosen, rejected, margins, accuracies):
    values = {"chosen": chosen, "rejected": rejected, "margins": margins, "accuracies": accuracies}
    return {f"rewards/{name}": value for name, value in values.items()}


def test_pair_metrics_are_the_means_by_hand():
    # beta 4: rewards -2 d: winners 6, -10; losers -6, -24
    expected = ERRORS | CHANGES | rewards(-2.0, -15.0, 13.0, 1.0)
    assert pair_metrics_of(MODEL, REFERENCE) == pytest.approx(expected)
    # Timestep weights are in the rewards and not in the errors: rewards 6, -10 and -6, -24 times 0.5, 2.
    weights = torch.tensor([0.5, 2.0])
    expected = ERRORS | CHANGES | rewards(-8.5, -25.5, 17.0, 1.0)
    assert pair_metrics_of(MODEL, REFERENCE, timestep_weights=weights) == pytest.approx(expected)
    # Without a reference, rewards are of the errors.
    expected = ERRORS | rewards(-10.0, -20.0, 10.0, 1.0)
    assert pair_metrics_of(MODEL, loss_type="simpo") == pytest.approx(expected)


def test_a_tie_counts_half_in_the_accuracy():
    # margins: a win, a tie, a loss, a win
    model = torch.tensor([[1.0], [2.0], [3.0], [1.0], [2.0], [2.0], [2.0], [3.0]])
    assert pair_metrics_of(model, loss_type="simpo")["rewards/accuracies"] == 2.5 / 4


def test_safeguard_metrics_are_the_mean_lambda_the_share_below_one_and_the_batchs_cosine():
    # Aligned residuals: lambda of a pair is err_w / (r_w r_l) = 1/2 and 3/4. The cosine is (2 + 12) / sqrt(10 * 20).
    found = metrics_of(MODEL, MODEL, safeguard_granularity="pair", safeguard_mu=0.0)
    assert found["safeguard/scale"] == pytest.approx(0.625) and found["safeguard/active"] == 1
    assert found["safeguard/cosine"] == pytest.approx(14 / 200**0.5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_loss_reports_the_metrics_that_have_a_meaning_for_it(loss_type: str):
    expected = set(ERRORS)
    if LOSSES[loss_type].needs_reference:
        expected |= set(CHANGES)
    if loss_type != "sft":
        expected |= set(rewards(0, 0, 0, 0)) | {"safeguard/scale", "safeguard/active", "safeguard/cosine"}
    if loss_type in ("ipo", "dmpo", "capo"):
        expected.add("safeguard/past_target")
    reference = REFERENCE if LOSSES[loss_type].needs_reference else None
    given = {"loss_type": loss_type, "safeguard": SAFEGUARD[loss_type]}
    assert set(metrics_of(MODEL, reference, **given)) == expected
