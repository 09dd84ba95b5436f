"""Reads the command line and the file of `--config`, and checks both against the options before anything is loaded."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from ..utils.hints import did_you_mean, why_absent
from ..utils.switch_words import choice_of_switch
from . import launch
from .options import Option, OptionTable, given_parser, names_in_sources, refuse_unknown

logger = logging.getLogger(__name__)

# Prefixes of the options of TRL's `ModelConfig` that need `use_peft`.
_ADAPTER_PREFIXES = ("lora_", "use_rslora", "use_dora", "load_in_", "bnb_", "use_bnb_")
# Options that need `eval_strategy`.
_EVALUATION_OPTIONS = ("eval_dataset_name", "test_size", "eval_steps")
# YAML 1.1 reads off, no, on and yes without quotes as booleans; their meaning for options of type str.
_WORDS_OF_BOOLEANS = {
    "report_to": {False: "none"},
    "verify_images": {True: "all", False: "none"},
    "resume_from_checkpoint": {True: "true", False: "false"},
}
_REQUIRED = {
    "model_name_or_path": "the Hub id or folder of a diffusers pipeline",
    "dataset_name": "the Hub id, folder or file of a preference data set",
}
# Options that older versions of transformers know by another name: the example configurations have the new one.
_FORMER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
_LISTS_OF_MAPPINGS = ("datasets",)  # whose dataclass checks them
_RULES = {
    **{"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"},
    **{"list": "a list", "dict": "a mapping"},
}


class Given(NamedTuple):
    """The arguments of the command."""

    words: list[str]  # of the command line, without `--config` and those of `accelerate launch`
    settings: dict[str, Any]  # of the file, converted to the options' types
    environment: dict[str, str]  # environment variables that the file sets
    typed: dict[str, Any]  # values of `words`, by option


def refuse_missing(given: Given) -> None:
    """Raise `ValueError` if the pipeline or the data set is not given."""
    values = {**given.settings, **given.typed}
    for name, what in _REQUIRED.items():
        if not values.get(name) and not (name == "dataset_name" and values.get("datasets")):
            raise ValueError(f"`--{name}` must be {what}, got none.")


def refuse_unknown_names(arguments: list[str]) -> None:
    """Refuse unknown options early, where the shipped table describes other versions than the installed ones.

    Raises:
        ValueError: With the nearest known names.
    """
    known = names_in_sources()
    file = launch.read_file(arguments)
    if known is None or launch.OPTION in file or launch.take_option(arguments, launch.OPTION)[0] is not None:
        return  # options of `accelerate launch` may follow, which its parser checks
    known |= {f"no_{name}" for name in known} | {"config", "help", *launch.keys_used_by_the_launcher()}
    names = (launch.option_of(word) for word in arguments)
    refuse_unknown([f"--{name}" for name in names if name and name not in known], known)
    keys = {_installed_name(key, known) for key in file}
    _refuse_unknown_keys({key for key in keys if key not in known | {launch.ENVIRONMENT_KEY}}, known)


def read_given(arguments: list[str], table: OptionTable) -> Given:
    """Read and check all arguments.

    Args:
        arguments (`list[str]`): Of the command, and those of `accelerate launch` with `--accelerate_config`.
        table (`OptionTable`): The known options.

    Raises:
        ValueError: If a name is unknown, a value has the wrong type, or options contradict one another.
    """
    file = launch.read_file(arguments)
    environment = file.pop(launch.ENVIRONMENT_KEY, {})
    if not isinstance(environment, dict):
        raise ValueError(f"`{launch.ENVIRONMENT_KEY}` of the file must map names to values, got {environment!r}.")
    _, words = launch.take_option(arguments, "config")
    named, words = launch.take_option(words, launch.OPTION)
    launches = named is not None or launch.OPTION in file
    launched = set(launch.keys_used_by_the_launcher())
    if launches:
        _, words = launch.separate(words, table.launch_options)
        launched |= {launch.OPTION, *table.launch_options}
    else:
        _refuse_options_of_the_launcher([*words, *(f"--{key}" for key in file if key not in launched)], table)
    typed = _read_words(words, table.options, table.launch_options if launches else ())
    ours = {_installed_name(key, table.options): value for key, value in file.items()}
    ours = {key: value for key, value in ours.items() if key not in launched or key in table.options}
    _refuse_unknown_keys({key for key in ours if key not in table.options}, table.options)
    settings = {key: setting(key, table.options[key], value) for key, value in ours.items()}
    _check_together({**settings, **typed})
    return Given(words, settings, {str(key): str(value) for key, value in environment.items()}, typed)


def _installed_name(key: str, known: Container[str]) -> str:
    """The name under which the installed transformers knows an option of a file."""
    former = _FORMER_NAMES.get(key)
    return former if former is not None and key not in known and former in known else key


def setting(name: str, option: Option, value: Any) -> Any:
    """Converts a value of the YAML file to the type of its option; `name` is for messages.

    Raises:
        ValueError: If the option does not take the value.
    """
    kinds = set(option.kinds)
    if "other" in kinds or (value is None and "null" in kinds) or (isinstance(value, dict) and "dict" in kinds):
        return value
    if isinstance(value, list) and "list" in kinds:
        if name in _LISTS_OF_MAPPINGS:
            return value
        return [_scalar(name, option, element, {option.elements}) for element in value]
    scalar = _scalar(name, option, value, kinds - {"list", "dict", "null"} or {option.elements})
    return [scalar] if kinds <= {"list", "null"} else scalar


def _scalar(name: str, option: Option, value: Any, kinds: set[str]) -> Any:
    if isinstance(value, bool) and "bool" not in kinds:
        return _word_of_boolean(name, option, value)
    if isinstance(value, bool) or (isinstance(value, float) and "float" in kinds):
        return value
    if isinstance(value, int):
        if kinds & {"int", "float"}:
            return value
        value = str(value)  # of an option of type str, such as a revision, or of a boolean one: 0 and 1
    if isinstance(value, str):
        try:
            return option.read(value)
        except ValueError as error:
            raise ValueError(f"`{name}` {error}") from error
    quote = " Write it in quotes." if "str" in kinds and isinstance(value, float) else ""
    raise ValueError(f"`{name}` must be {_rule(option)}, got {'nothing' if value is None else repr(value)}.{quote}")


def _rule(option: Option) -> str:
    return " or ".join(_RULES[kind] for kind in option.kinds if kind in _RULES)


def _word_of_boolean(name: str, option: Option, value: bool) -> str:
    word = choice_of_switch(value, option.choices or ()) or _WORDS_OF_BOOLEANS.get(name, {}).get(value)
    if word is not None:
        return word
    rule = f"one of {', '.join(option.choices)}" if option.choices else _rule(option)
    raise ValueError(
        f"`{name}` must be {rule}, got {str(value).lower()}: YAML reads on, off, yes and no as booleans. Write the "
        "word in quotes if it is meant as text."
    )


def _read_words(words: list[str], options: Mapping[str, Option], others: Iterable[str]) -> dict[str, Any]:
    """Values of the typed options; the last one of an option that is given twice."""
    typed, unknown = given_parser(options).parse_known_args(words)
    flags = {flag: name for name, option in options.items() for flag in (*option.flags, *option.off_flags)}
    refuse_unknown(unknown, [*(flag.removeprefix("--") for flag in flags), *others])
    times = Counter(flags[flag] for word in words if (flag := word.partition("=")[0]) in flags)
    for name in (name for name, count in times.items() if count > 1):
        _warn(f"`--{name}` is given {times[name]} times; the last one, {vars(typed)[name]}, counts.")
    return vars(typed)


def _check_together(given: Mapping[str, Any]) -> None:
    """Refuse adapter options without `use_peft`; warn of evaluation options without `eval_strategy`."""
    idle = [name for name, value in given.items() if name.startswith(_ADAPTER_PREFIXES) and value not in (False, None)]
    if idle and not given.get("use_peft"):
        listed = ", ".join(f"`{name}`" for name in idle)
        raise ValueError(
            f"Without `use_peft` all weights are trained, in full precision, and {listed} would do nothing. Add "
            "`--use_peft` for a LoRA, or leave the others out."
        )
    if given.get("eval_strategy", "no") == "no" and not given.get("do_eval"):
        for name in (name for name in _EVALUATION_OPTIONS if given.get(name) is not None):
            _warn(f"`{name}={given[name]}` has no effect without `eval_strategy`.")


def _warn(message: str) -> None:
    """Warn once for all processes: in the launching process, or on rank 0."""
    if launch.LAUNCHED_VARIABLE not in os.environ and os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def _refuse_options_of_the_launcher(words: list[str], table: OptionTable) -> None:
    names = {launch.option_of(word) for word in words} & set(table.launch_options)
    if names:
        listed = ", ".join(f"`--{name}`" for name in sorted(names))
        raise ValueError(f"Options of `accelerate launch` need `--{launch.OPTION}`; got {listed} without it.")


def _refuse_unknown_keys(unknown: set[str], known: Any) -> None:
    if unknown:
        listed = " ".join(
            f"`{key}` is none.{why_absent(str(key)) or did_you_mean(str(key), known)}"
            for key in sorted(map(str, unknown))
        )
        raise ValueError(
            f"The file of `--config` must hold options of the command or of `accelerate launch`: {listed}"
        )
