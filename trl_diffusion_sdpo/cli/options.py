"""Base class of all command-line parsers, and functions that read options from YAML files and check them."""

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

# YAML 1.1 reads unquoted off, no, on and yes as booleans. For these text options: boolean -> word that is meant.
_WORDS_OF_BOOLEANS = {
    "report_to": {False: "none"},
    "verify_images": {True: "all", False: "none"},
    "resume_from_checkpoint": {True: "true", False: "false"},
}
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

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        return super().add_argument(*flags, **with_hints(settings))

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

    def words_of(self, settings: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Convert the settings of a YAML file to words of a command line, so that the parser can read both.

        Returns:
            `tuple[list[str], dict[str, Any]]`: The words, and the settings whose names are not options of this
            parser.
        """
        # Reversed, because an option such as `--x` comes before its opposite `--no_x` and must override it here.
        actions = {action.dest: action for action in reversed(self._actions)}
        words: list[str] = []
        others: dict[str, Any] = {}
        for key, value in settings.items():
            name = str(key)
            if name not in actions and _FORMER_NAMES.get(name) in actions:
                name = _FORMER_NAMES[name]
            if name in actions:
                words += _words_of_setting(actions[name], value)
            else:
                others[name] = value
        return words, others


def _words_of_setting(action: argparse.Action, value: Any) -> list[str]:
    flag = f"--{action.dest}"
    if value is None and action.default is None:
        return []
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(entry, dict) for entry in value)):
        return [f"{flag}={json.dumps(value, default=str)}"]
    if isinstance(value, list):
        if action.nargs != "+":
            raise ValueError(f"`{action.dest}` takes one value, got the list {value}. Set only one value.")
        return [flag, *(_word(action, entry) for entry in value)]
    return [f"{flag}={_word(action, value)}"]


def _word(action: argparse.Action, value: Any) -> str:
    name = action.dest
    if isinstance(value, bool):
        word = _WORDS_OF_BOOLEANS.get(name, {}).get(value, str(value).lower())
        if action.type is str and name not in _WORDS_OF_BOOLEANS:
            raise ValueError(
                f"`{name}` must be text, got the boolean {word}. YAML reads on, off, yes and no without quotes as "
                "booleans. Put the word in quotes."
            )
        return word
    if isinstance(value, float) and action.type is str:
        raise ValueError(f"`{name}` must be text, got the number {value}. Put the value in quotes.")
    return "none" if value is None else str(value)


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
    words = list(words)
    names = [name for word in words if (name := option_name(word))]
    known = {option.replace("-", "_") for option in options}
    if names:
        hints = [other_tools_option(name, known) or did_you_mean(name, known, prefix="--") for name in names]
        listed = (
            f"`--{name}` is not an option of this command.{hint}" for name, hint in zip(names, hints, strict=True)
        )
        raise ValueError(f"{' '.join(listed)} `--help` lists all options.")
    if words:
        raise ValueError(
            f"Each word must belong to an option that begins with `--`, got: {' '.join(words)}. Remove these words."
        )


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
