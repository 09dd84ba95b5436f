"""The logged scalars, each from a batch small enough to work out."""

import pytest
import torch

from trl_diffusion_sdpo.losses import LOSSES, diffusion_preference_loss, pair_terms
from trl_diffusion_sdpo.losses.diffusion_preference import pair_metrics, safeguard_metrics

# Two pairs of one-element predictions, target 0. Errors are squares:
#   err_w = 1, 9    ref 4, 4    d_w = -3, 5
#   err_l = 4, 16   ref 1, 4    d_l = 3, 12
MODEL = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
REFERENCE = torch.tensor([[2.0], [2.0], [1.0], [2.0]])
TARGET = torch.zeros(4, 1)

ERRORS = {"errors/winner": 5.0, "errors/loser": 10.0}
CHANGES = {"errors/winner_change": 1.0, "errors/loser_change": 7.5}
REWARDS = {  # beta 4: rewards -2 d: winners 6, -10; losers -6, -24
    "rewards/chosen": -2.0,
    "rewards/rejected": -15.0,
    "rewards/margins": 13.0,
    "rewards/accuracies": 1.0,
}


def as_numbers(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def test_pair_metrics_are_the_means_by_hand():
    metrics = pair_metrics(pair_terms(MODEL, TARGET, REFERENCE), beta=4.0)
    assert as_numbers(metrics) == pytest.approx(ERRORS | CHANGES | REWARDS)


def test_without_a_beta_there_are_no_rewards():
    metrics = pair_metrics(pair_terms(MODEL, TARGET, REFERENCE), beta=None)
    assert as_numbers(metrics) == pytest.approx(ERRORS | CHANGES)


def test_without_a_reference_rewards_are_of_the_errors_and_there_is_no_change():
    metrics = pair_metrics(pair_terms(MODEL, TARGET), beta=4.0)
    expected = {"rewards/chosen": -10.0, "rewards/rejected": -20.0, "rewards/margins": 10.0, "rewards/accuracies": 1.0}
    assert as_numbers(metrics) == pytest.approx(ERRORS | expected)


def test_accuracy_counts_strict_wins():
    # margins: a win, a tie, a loss, a win
    terms = pair_terms(torch.tensor([[1.0], [2.0], [3.0], [1.0], [2.0], [2.0], [2.0], [3.0]]), torch.zeros(8, 1))
    assert pair_metrics(terms, beta=1.0)["rewards/accuracies"].item() == 0.5


def test_timestep_weights_are_in_the_rewards_and_not_in_the_errors():
    weights = torch.tensor([0.5, 2.0])
    metrics = pair_metrics(pair_terms(MODEL, TARGET, REFERENCE, timestep_weights=weights), beta=4.0)
    # rewards 6, -10 and -6, -24 times 0.5, 2
    expected = {"rewards/chosen": -8.5, "rewards/rejected": -25.5, "rewards/margins": 17.0, "rewards/accuracies": 1.0}
    assert as_numbers(metrics) == pytest.approx(ERRORS | CHANGES | expected)


def test_safeguard_metrics_are_the_mean_lambda_and_the_share_below_one():
    scale = torch.tensor([0.0, 0.5, 1.0, 1.0])
    assert as_numbers(safeguard_metrics(scale)) == {"safeguard/scale": 0.625, "safeguard/active": 0.5}
    with_all = safeguard_metrics(scale, torch.tensor(-0.25), torch.tensor([True, False, False, False]))
    assert as_numbers(with_all) == {
        "safeguard/scale": 0.625,
        "safeguard/active": 0.5,
        "safeguard/cosine": -0.25,
        "safeguard/past_target": 0.25,
    }


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_loss_reports_the_metrics_that_have_a_meaning_for_it(loss_type: str):
    out = diffusion_preference_loss(
        MODEL.clone().requires_grad_(),
        TARGET,
        REFERENCE if LOSSES[loss_type].needs_reference else None,
        loss_type=loss_type,
        beta=4.0,
        scores=torch.tensor([1.0, 1.0, 0.0, 0.0]),
    )
    expected = set(ERRORS)
    if loss_type not in ("sft", "mapo", "simpo"):
        expected |= set(CHANGES)
    if loss_type != "sft":
        expected |= set(REWARDS) | {"safeguard/scale", "safeguard/active", "safeguard/cosine"}
    if loss_type in ("ipo", "dmpo", "capo"):
        expected.add("safeguard/past_target")
    assert set(out.metrics) == expected
    assert all(value.shape == () and not value.requires_grad for value in out.metrics.values())
    assert as_numbers(out.metrics)["errors/winner"] == pytest.approx(5.0)
