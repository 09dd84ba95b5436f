"""The settings of sums of losses, the cap of the logit and the automatic beta: forms, refusals, warnings, defaults."""

import pytest

from trl_diffusion_sdpo.families.stable_diffusion import StableDiffusionFamily
from trl_diffusion_sdpo.trainer.config.complete import loss_defaults


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ("dmpo", "dmpo"),
        (["dmpo"], "dmpo"),
        (("sigmoid", "sft"), ["sigmoid", "sft"]),
        (["sigmoid", "sft"], ["sigmoid", "sft"]),
    ],
)
def test_one_name_is_a_word_and_several_are_a_list(make_args, given, settled):
    assert make_args(loss_type=given).loss_type == settled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": ["sigmoid", "sigmo"]}, "`loss_type`"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "`loss_weights`"),
        ({"loss_weights": [1.0, 2.0]}, "`loss_weights`"),
        ({"margin_clamp": 0}, "`margin_clamp`"),
        ({"loss_type": "mapo", "margin_clamp": 1.0}, "`margin_clamp`.*mapo"),
        ({"loss_type": ["sigmoid", "sft"], "loss_kwargs": {"mapo_scale": 1.0}}, "`mapo_scale`"),
        ({"loss_type": ["sft", "mapo"], "loss_weights": [1, 0], "winner_budget": 0.1}, "`winner_budget`"),
        ({"loss_type": ["dspo", "sigmoid"], "precompute_ref_errors": True}, "'dspo'"),
    ],
)
def test_what_cannot_act_is_refused(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


@pytest.mark.parametrize(
    ("settings", "mu", "beta"),
    [
        ({}, 0.9, 5000.0),
        ({"loss_type": "dspo"}, 0.2, 0.001),
        ({"loss_type": "sft"}, 0.9, None),
        ({"loss_type": ["sigmoid", "sft"]}, 0.9, 5000.0),
        ({"loss_type": ["sft", "dspo"]}, 0.2, 0.001),  # that of the part with a loser
        ({"loss_type": ["mapo", "dspo"], "beta": 0.1}, 0.9, None),  # the strictest; a given beta stays
        ({"loss_type": ["dmpo", "sigmoid"], "loss_weights": [1.0, 0.0]}, 0.9, 2000.0),
    ],
)
def test_the_defaults_of_a_sum_are_those_of_its_parts(make_args, settings, mu, beta):
    args = make_args(**settings)
    assert loss_defaults(args, StableDiffusionFamily, full=True) == (mu, beta)


def test_parts_with_different_default_betas_need_one_that_is_given(make_args):
    args = make_args(loss_type=["dmpo", "sigmoid"])
    with pytest.raises(ValueError, match="defaults differ: 2000 of dmpo, 5000 of sigmoid. Set `beta`"):
        loss_defaults(args, StableDiffusionFamily, full=True)
