"""Base class of all command-line parsers, and functions that read and check options."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..utils.hints import CHOICE_ALIASES, did_you_mean, other_tools_option
from ..utils.switch_words import SWITCH_WORDS, choice_of_switch

# Name of an option -> its name in older versions of transformers.
_FORMER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


class OneLineParser(argparse.ArgumentParser):
    """Parser that accepts no abbreviated options. For an unknown option, it raises a `ValueError` that suggests the
    most similar option."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        refuse_unknown(unknown, self.names())
        return parsed

    def names(self) -> list[str]:
        """Return the names of all options, without leading dashes."""
        return [flag.lstrip("-") for action in self._actions for flag in action.option_strings]

    def names_in(self, words: Iterable[str]) -> set[str]:
        """Return the names of the options that occur among the words of a command line."""
        fields = {flag: action.dest for action in self._actions for flag in action.option_strings}
        return {fields[flag] for word in words if (flag := word.partition("=")[0]) in fields}

    def words_of(self, settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Convert the settings of a YAML file to words of a command line, so that the parser can read both.

        Returns:
            `tuple[list[str], list[str]]`: The words of this parser's options, and the words of all other settings.
        """
        destinations = {action.dest for action in self._actions}
        words: list[str] = []
        others: list[str] = []
        for key, value in settings.items():
            name = str(key)
            if name not in destinations and _FORMER_NAMES.get(name) in destinations:
                name = _FORMER_NAMES[name]
            if name in destinations:
                words += _words_of_setting(name, value)
            else:  # possibly an option of `accelerate launch`, where a switch takes no value
                others += [f"--{name}"] if value is True else _words_of_setting(name, value)
        return words, others


def _words_of_setting(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(entry, dict) for entry in value)):
        return [f"--{name}={json.dumps(value, default=str)}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]


def with_hints(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `add_argument`, changed for an option with choices.

    An option with choices also accepts aliases of the choices, and words like `on` and `off`. For a wrong value, the
    error message suggests the most similar choice.
    """
    choices = settings.get("choices")
    return settings if choices is None else {**settings, "type": _choice_reader([str(choice) for choice in choices])}


def _choice_reader(choices: list[str]) -> Callable[[str], str]:
    def read(word: str) -> str:
        if CHOICE_ALIASES.get(word) in choices:
            return CHOICE_ALIASES[word]
        switch = SWITCH_WORDS.get(word.lower())
        chosen = word if word in choices or switch is None else choice_of_switch(switch, choices)
        if chosen not in choices:
            near = did_you_mean(word, choices)
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(choices)}, got {word!r}.{near}")
        return chosen

    return read


def refuse_unknown(words: Iterable[str], options: Iterable[str]) -> None:
    """Raise `ValueError` if a parser did not recognize some words. The message suggests the most similar options."""
    known = {option.replace("-", "_") for option in options}
    for word in words:
        name = option_name(word)
        if name is None:
            raise ValueError(f"Each word must belong to an option that begins with `--`, got {word!r}. Remove it.")
        hint = other_tools_option(name, known) or did_you_mean(name, known, prefix="--")
        raise ValueError(f"`--{name}` is not an option of this command.{hint} `--help` lists all options.")


def option_name(word: str) -> str | None:
    """Return the name in an option, such as `num_processes` for `--num_processes`, `--num-processes` and
    `--num_processes=4`. Return `None` if the word is not an option."""
    return word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else None


def take_options(arguments: list[str], *names: str) -> tuple[dict[str, str | None], list[str]]:
    """Return the values of the named options, and all other words of a command line."""
    parser = OneLineParser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}")
    taken, rest = parser.parse_known_args(arguments)
    return vars(taken), rest


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The file {path} must be valid YAML, and reading it failed: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"The file {path} must map names to values in YAML, got {type(settings).__name__}.")
    return settings


def set_environment(variables: Any) -> None:
    """Set the environment variables in the entry `env` of a YAML file of settings."""
    if not isinstance(variables, dict):
        raise ValueError(f"`env` in the file of settings must map names to values, got {variables!r}.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
