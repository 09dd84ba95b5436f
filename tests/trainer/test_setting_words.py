"""Settings as YAML and people write them, given to the configuration itself, as a script with TRL's parser does."""

import pytest

from trl_diffusion_sdpo.cli.options import Option
from trl_diffusion_sdpo.data.checking import verify_choice

OPTION = Option(
    flags=["--switch"],
    off_flags=[],
    kinds=["bool"],
    elements="bool",
    nargs="?",
    choices=None,
    default=False,
    help=None,
)


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("safeguard", False, "none"),
        ("timestep_weighting", False, "none"),
        ("weighting_scheme", False, "none"),
        ("eval_strategy", False, "no"),
        ("save_strategy", False, "no"),
        ("random_flip", "off", False),
        ("random_flip", "No", False),
        ("random_crop", "on", True),
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


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *((word, True) for word in ("true", "True", "yes", "on", "t", "y", "1")),
        *((word, False) for word in ("false", "False", "no", "off", "f", "n", "0")),
    ],
)
def test_a_word_is_the_same_switch_wherever_it_is_written(make_args, word, meant):
    assert make_args(random_flip=word).random_flip is meant
    assert OPTION.read(word) is meant
    assert verify_choice(word) == ("all" if meant else "none")


@pytest.mark.parametrize("name", ["random_flip", "disable_tqdm", "bf16"])
def test_a_word_that_means_neither_is_refused(make_args, name):
    with pytest.raises(ValueError, match=f"`{name}` must be True or False, got 'maybe'"):
        make_args(**{name: "maybe"})


@pytest.mark.parametrize(("name", "value"), [("safeguard", True), ("loss_type", False), ("on_bad_row", False)])
def test_a_switch_that_no_choice_means_is_refused(make_args, name, value):
    with pytest.raises(ValueError, match=f"got {value}"):
        make_args(**{name: value})


def test_a_choice_that_is_misspelt_is_told_with_what_was_meant(make_args):
    with pytest.raises(ValueError, match="got 'dropp'. Did you mean `drop`?"):
        make_args(on_bad_row="dropp")
