"""The parser of all commands, and functions that read and check options."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..utils.errors import UserError
from ..utils.hints import did_you_mean, other_tools_option
from ..utils.renamed import renamed_setting

# Option -> its name in older versions of transformers.
_FORMER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
NO = ("no", "off", "false")  # what YAML 1.1 reads as false
# Settings without a choice `none`: `no` or an empty list in a YAML file chooses nothing.
_CHOSEN = ("report_to", "fsdp", "deepspeed", "resume_from_checkpoint")


class OneLineParser(argparse.ArgumentParser):
    """Parser without abbreviated options. For an unknown one, its `ValueError` suggests the most similar."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **settings})
        self._negative_number_matcher = re.compile(r"-\.?\d")  # before Python 3.14, `-1e-4` looks like an option

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        refuse_unknown(unknown, self.names())
        return parsed

    def names(self) -> list[str]:
        """Return the names of all options, without leading dashes."""
        return [flag.lstrip("-") for action in self._actions for flag in action.option_strings]

    def former_names(self) -> list[str]:
        """Return the former names of options, under which a YAML file may set them too."""
        destinations = {action.dest for action in self._actions}
        return [former for former, name in _FORMER_NAMES.items() if name in destinations]

    def names_in(self, words: Iterable[str]) -> set[str]:
        """Return the names of this parser's options among the words of a command line."""
        fields = {flag: action.dest for action in self._actions for flag in action.option_strings}
        return {fields[flag] for word in words if (flag := word.partition("=")[0]) in fields}

    def words_of(self, settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Convert the settings of a YAML file to words of a command line, so that one parser reads both.

        Returns:
            `tuple[list[str], list[str]]`: The words for this parser's options, and those for all other settings.
        """
        destinations = {action.dest for action in self._actions}
        words: list[str] = []
        others: list[str] = []
        for key, value in settings.items():
            name = str(key)
            if name not in destinations and _FORMER_NAMES.get(name) in destinations:
                name = _FORMER_NAMES[name]
            if name in _CHOSEN and (value == [] or str(value).lower() in NO):
                continue
            if isinstance(value, dict) or (
                isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
            ):
                entries = [f"--{name}={json.dumps(value, default=str)}"]
            elif isinstance(value, list):
                entries = [f"--{name}", *map(str, value)]
            elif name not in destinations and value == "true":  # a flag of `accelerate launch` takes no value
                entries = [f"--{name}"]
            else:
                entries = [f"--{name}={value}"]
            (words if name in destinations else others).extend(entries)
        return words, others


def none_for_no(choices: Iterable[str]) -> Callable[[str], str]:
    """Return the type of an option with the choice `none`, also written `no`, `off` or `false`."""
    return lambda word: "none" if word.lower() in NO and word not in choices else word


def refuse_unknown(words: Iterable[str], options: Iterable[str]) -> None:
    """Raise `ValueError`, with the most similar options, for words that a parser did not recognize."""
    known = {option.replace("-", "_") for option in options}
    for word in words:
        name = option_name(word)
        if name is None:
            raise UserError(f"Each word must belong to a `--option`, got {word!r}. Remove it.")
        moved = renamed_setting(name)
        hint = f" {moved}" if moved else other_tools_option(name, known) or did_you_mean(name, known, prefix="--")
        raise UserError(f"`--{name}` is not an option of this command.{hint} `--help` lists all options.")


def option_name(word: str) -> str | None:
    """Return the option in a word of a command line, such as `num_processes` for `--num-processes` and
    `--num_processes=4`, or `None` if the word does not begin with `--`."""
    return word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else None


def take_options(arguments: list[str], *names: str) -> tuple[dict[str, str | None], list[str]]:
    """Split a command line into the values of the options `names` and all other words."""
    parser = OneLineParser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}")
        given = [word for word in arguments if word.partition("=")[0] == f"--{name}"]
        if len(given) > 1:
            raise UserError(f"`--{name}` takes one value, and is given {len(given)} times. Keep one of them.")
    taken, rest = parser.parse_known_args(arguments)
    return vars(taken), rest


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Single values stay text, so that an option parses `no`, `1e-5` and `1.10` as on a command line. Settings without a
    value are left out.

    Raises:
        `ValueError`: If the file is not valid YAML, does not map names to values, sets a name twice, or has aliases
            (`*name`), by which a short file can stand for billions of values.
    """
    try:
        content = path.read_text(encoding="utf-8")
        for token in yaml.scan(content):
            if isinstance(token, yaml.AliasToken):
                raise UserError(f"aliases are not allowed, got `*{token.value}`. Copy the values.")
        settings = yaml.safe_load(content)
        texts = yaml.load(content, Loader=yaml.BaseLoader)
        for name in _names_set_twice(yaml.compose(content)):
            raise UserError(f"`{name}` is set twice. Remove one of them.")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"The file {path} must be valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"The file {path} must map names to values in YAML, got {type(settings).__name__}.")
    set_ones = {name: value for name, value in settings.items() if value is not None}
    return {
        name: value if isinstance(value, (dict, list)) else texts.get(name, value) for name, value in set_ones.items()
    }


def _names_set_twice(node: yaml.Node | None) -> Iterator[str]:
    """Yield the names that a mapping of a YAML file sets more than once. YAML would take the last value."""
    if isinstance(node, yaml.MappingNode):
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        yield from (name for name, count in counts.items() if count > 1)
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for each in child if isinstance(child, tuple) else (child,):
            yield from _names_set_twice(each)
