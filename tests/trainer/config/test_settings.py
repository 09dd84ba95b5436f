"""Settings as YAML and people write them, given to the configuration itself, and what a setting says of itself."""

from dataclasses import fields

import pytest

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.trainer.config.all_arguments import settings_of
from trl_diffusion_sdpo.trainer.config.declaring import Choices, Range


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "rule"),
    [
        ("[1, inf)", [1, 7], [0, 0.5, float("nan"), "2"], "at least 1"),
        ("(0, inf)", [1e-9, 3], [0, -1, float("inf")], "greater than 0"),
        ("(0, 1]", [0.5, 1], [0, 1.1], "in (0, 1]"),
        ("[0, 1)", [0, 0.9], [-0.1, 1], "in [0, 1)"),
    ],
)
def test_a_range_holds_what_its_interval_says(interval, inside, outside, rule):
    allowed = Range(interval)
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == rule


def test_every_range_and_every_choice_is_checked(make_args):
    """Each setting that says what it may be refuses what it may not be, and its own default is allowed."""
    defaults = {field.name: field.default for field in fields(DiffusionSDPOConfig)}
    checked = 0
    for name, setting in settings_of(DiffusionSDPOConfig).items():
        words = next((fact.words for fact in setting.facts if isinstance(fact, Choices)), setting.choices)
        allowed = next((fact for fact in setting.facts if isinstance(fact, Range)), words or None)
        if allowed is not None:
            checked += 1
            assert defaults[name] is None or defaults[name] in allowed
            with pytest.raises(ValueError, match=f"`{name}` must be"):
                make_args(**{name: "nonsense" if words else -1})
            if not setting.is_optional:
                with pytest.raises(ValueError, match=f"`{name}` must be .*got None"):
                    make_args(**{name: None})
    assert checked > 20


def test_numbers_that_yaml_reads_as_text_are_numbers(make_args):
    args = make_args(learning_rate="1e-4", beta="2e3")
    assert (args.learning_rate, args.beta) == (1e-4, 2000.0)
    assert make_args(loser_noise_range=["6e-1", 1]).loser_noise_range == [0.6, 1.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"neftune_noise_alpha": 5.0},
        {"include_num_input_tokens_seen": "all"},
        {"safeguard": "parameter", "ddp_static_graph": True},
    ],
)
def test_settings_that_cannot_work_are_refused(make_args, settings):
    with pytest.raises(ValueError, match=list(settings)[-1]):
        make_args(**settings)


def test_fp16_is_refused_where_a_cpu_trains_and_can_be_planned_there(make_trainer, make_args):
    make_args(fp16=True)
    with pytest.raises(ValueError, match="`fp16=True`"):
        make_trainer(fp16=True)
