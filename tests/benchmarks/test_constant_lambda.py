"""A constant in place of lambda: its factors, its steps to the bit, and evaluations."""

import sys
from pathlib import Path

import pytest
import torch
from step.walks import walked

from trl_diffusion_sdpo import DiffusionSDPOTrainer, UserError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from constant_lambda import constant_lambda


@pytest.fixture
def build(make_trainer, monkeypatch):
    """`build(share, **settings)`: a trainer with the constant, or without one if `share` is `None`."""

    def trainer_of(share, **settings):
        with monkeypatch.context() as patch:
            if share is not None:
                patch.setattr(DiffusionSDPOTrainer, "pair_forward_class", constant_lambda(share))
            return make_trainer(**{"safeguard": "none", "beta": 50.0, **settings})

    return trainer_of


def test_a_constant_multiplies_the_factors_of_a_range(build):
    levels = torch.tensor([0.1, 0.5, 0.9])
    assert build(0.25).pair_forward.loser_weights(levels).tolist() == [0.25, 0.25, 0.25]
    ranged = build(0.25, loser_noise_range=[0.3, 0.7])
    assert ranged.pair_forward.loser_weights(levels).tolist() == [0, 0.25, 0]


def test_a_constant_of_one_changes_no_bit_and_a_smaller_one_does(build):
    plain, _ = walked(build(None))
    assert torch.equal(plain, walked(build(1.0))[0])
    assert not torch.equal(plain, walked(build(0.5))[0])


def test_an_evaluation_has_the_loss_that_it_has_without_the_constant(build, make_pairs):
    losses = [build(share, eval_dataset=make_pairs(4, seed=1)).evaluate()["eval_loss"] for share in (None, 0.5)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_constant_that_is_no_share_is_refused(share):
    with pytest.raises(UserError, match="share"):
        constant_lambda(share)
