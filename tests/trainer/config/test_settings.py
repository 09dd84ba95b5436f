"""Settings as YAML and people write them, given to the configuration itself, and what a setting says of itself."""

from dataclasses import fields

import pytest

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.trainer.config.all_arguments import settings_of
from trl_diffusion_sdpo.trainer.config.declaring import Choices, Range
from trl_diffusion_sdpo.utils import import_utils


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("safeguard", False, "none"),
        ("timestep_weighting", False, "none"),
        ("eval_strategy", False, "no"),
        ("random_flip", "off", False),
        ("disable_dropout", "yes", True),
        ("disable_tqdm", "on", True),
        ("bf16", "no", False),
        ("random_flip", True, True),
        ("safeguard", "parameter", "parameter"),
    ],
)
def test_a_word_is_the_switch_that_it_means_and_off_the_choice_that_means_it(make_args, name, given, meant):
    value = getattr(make_args(**{name: given}), name)
    assert value == meant and isinstance(value, type(meant))


@pytest.mark.parametrize("name", ["random_flip", "bf16"])
def test_a_word_that_means_neither_is_refused(make_args, name):
    with pytest.raises(ValueError, match=f"`{name}` must be True or False, got 'maybe'"):
        make_args(**{name: "maybe"})


@pytest.mark.parametrize(("name", "value"), [("safeguard", True), ("loss_type", False), ("losers", False)])
def test_a_switch_that_no_choice_means_is_refused(make_args, name, value):
    with pytest.raises(ValueError, match=f"got {value}"):
        make_args(**{name: value})


def test_a_number_that_yaml_reads_as_text_is_a_number_for_every_setting_of_numbers(make_args):
    args = make_args(snr_gamma="5e0", noise_offset="1e-1", max_grad_norm="2e0")
    assert (args.snr_gamma, args.noise_offset, args.max_grad_norm) == (5.0, 0.1, 2.0)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_a_learning_rate_that_spoils_every_weight_is_refused(make_args, value):
    with pytest.raises(ValueError, match="`learning_rate` must be a finite number"):
        make_args(learning_rate=value)


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


def test_optimizers_and_schedules_are_checked_with_the_settings(make_args, monkeypatch):
    with pytest.raises(ValueError, match=r"`lr_scheduler_type=cosine_with_min_lr`, got .*min_lr"):
        make_args(lr_scheduler_type="cosine_with_min_lr")
    with pytest.raises(ValueError, match=r"`lr_scheduler_type=polynomial`, got .*nonsense"):
        make_args(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"nonsense": 1})
    make_args(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-6})
    DiffusionSDPOConfig("out", report_to="none", lr_scheduler_type="polynomial")  # its rate is that of the loss
    for kind in ("inverse_sqrt", "constant", "polynomial", "cosine_with_restarts"):
        make_args(lr_scheduler_type=kind)
    monkeypatch.setattr(import_utils, "find_spec", lambda module: None)
    with pytest.raises(import_utils.MissingExtraError, match="pip install bitsandbytes"):
        make_args(optim="adamw_bnb_8bit")
