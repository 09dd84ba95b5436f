"""Which options `train` has, known before torch is imported.

`train_options.json` describes the parser that TRL makes of the dataclasses, under the versions of transformers, TRL and
accelerate that it names. Under other versions the parser is made and described, which takes seconds. After a change of
the options the file is written anew with `python tests/test_cli_surface.py`."""

from __future__ import annotations

import argparse
import enum
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..suggestions import did_you_mean
from ..switch_words import SWITCH_WORDS

TABLE_FILE = Path(__file__).with_name("train_options.json")
DESCRIBED = ("accelerate", "transformers", "trl")
# Where the fields are declared that are not this package's: library -> files.
_SOURCES = {"transformers": ["training_args.py"], "trl": ["scripts/utils.py", "trainer/model_config.py"]}
_SCALARS = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        flags (`list[str]`): How it is written on the command line.
        off_flags (`list[str]`): How it is switched off there, if it is on by default.
        kinds (`list[str]`): Which values it takes: `bool`, `int`, `float`, `str`, `list`, `dict`, `null` and `other`.
        elements (`str`): The kind of a list's elements and of a word of the command line.
        nargs (`str`, *optional*): As argparse has it.
        choices (`list[str]`, *optional*): The values that there are.
        default (`Any`): If nothing is given.
        help (`str`, *optional*): What it does.
    """

    flags: list[str]
    kinds: list[str]
    elements: str
    off_flags: list[str]
    nargs: str | None
    choices: list[str] | None
    default: Any
    help: str | None

    def read(self, word: str) -> Any:
        """A word of the command line as a value.

        Raises:
            ValueError: If it is none that the option takes; the message goes on after its name.
        """
        optional = "null" in self.kinds and self.elements != "str"
        if optional and word.lower() in ("none", "null"):
            return None
        if self.choices is not None:
            return _read_choice(self.choices, word)
        if self.elements == "bool":
            return _read_switch(word)
        try:
            return {"int": int, "float": float}.get(self.elements, str)(word)
        except ValueError:
            rule = "a whole number" if self.elements == "int" else "a number"
            raise ValueError(f"must be {rule}, got {word!r}.") from None


class OptionTable(typing.NamedTuple):
    """What can be typed after `train`.

    Attributes:
        options (`dict[str, Option]`): By name.
        launch_options (`dict[str, bool]`): Names of `accelerate launch`, and whether each takes a value.
        own (`list[str]`): Names that this package declares, and neither transformers nor TRL.
    """

    options: dict[str, Option]
    launch_options: dict[str, bool]
    own: list[str]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with what was probably meant, and which knows no abbreviations."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        if "choices" in settings and "type" not in settings:
            settings["type"] = _argument_type(functools.partial(_read_choice, settings["choices"]))
        return super().add_argument(*flags, **settings)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        refuse_unknown(
            unknown, (flag.removeprefix("--") for action in self._actions for flag in action.option_strings)
        )
        return parsed


def refuse_unknown(words: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` on words that a parser could not place, with what was probably meant."""
    words, known = list(words), list(known)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    if flags:
        told = (f"`{flag}` is no option of this command.{_nearest_flag(flag, known)}" for flag in flags)
        raise ValueError(f"{' '.join(told)} `--help` lists all.")
    if words:
        raise ValueError(f"These words belong to no option: {' '.join(words)}. Options begin with `--`.")


def read_table() -> OptionTable | None:
    """The table that ships with the package, or `None` if other versions are installed than it describes."""
    stored = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    if stored["versions"] != installed_versions():
        return None
    options = {name: Option(**row) for name, row in stored["options"].items()}
    return OptionTable(options, stored["launch_options"], stored["own"])


def write_table(table: OptionTable) -> None:
    """Write the table that ships with the package, one line for each option."""
    rows = {name: asdict(option) for name, option in table.options.items()}
    TABLE_FILE.write_text(
        f'{{"versions": {json.dumps(installed_versions())},\n"own": {json.dumps(table.own)},\n'
        f'"launch_options": {json.dumps(table.launch_options)},\n"options": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in rows.items())
        + "\n}}\n",
        encoding="utf-8",
    )


def installed_versions() -> dict[str, str]:
    """Of the libraries whose options the table describes."""
    return {library: _version(library) for library in DESCRIBED}


def names_in_sources() -> set[str] | None:
    """Names of all options under any versions, read from the installed sources as text, without an import.

    Returns:
        `set[str]` or `None`: More names than there are options, perhaps; `None` where the libraries declare their
        fields elsewhere than the table knows.
    """
    stored = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    found = set()
    for library, files in _SOURCES.items():
        spec = find_spec(library)
        paths = [Path(spec.submodule_search_locations[0]) / file for file in files] if spec else []
        if not paths or not all(path.is_file() for path in paths):
            return None
        for path in paths:
            found |= set(re.findall(r"(?m)^    (\w+):", path.read_text(encoding="utf-8")))
    own = set(stored["own"])
    return own | found if set(stored["options"]) <= own | found else None


def describe(parser: argparse.ArgumentParser, dataclasses: Iterable[type]) -> dict[str, Option]:
    """The options of a parser that was made of dataclasses.

    Args:
        parser (`argparse.ArgumentParser`): The parser.
        dataclasses (`Iterable[type]`): Of which it was made; their annotations say what YAML may hold.
    """
    hints = {name: hint for holder in dataclasses for name, hint in typing.get_type_hints(holder).items()}
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if action.dest in hints:
            actions.setdefault(action.dest, []).append(action)
    return {name: _option(same, _kinds(hints[name])) for name, same in actions.items()}


def option_parser(options: Mapping[str, Option], *, only_given: bool = False, **settings: Any) -> OneLineParser:
    """A parser of the described options, with the help of the parser that was described.

    Args:
        options (`Mapping[str, Option]`): By name.
        only_given (`bool`): Whether what is parsed holds no defaults.
        settings: Of [`OneLineParser`].
    """
    parser = OneLineParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)
    for name, option in options.items():
        more = {"nargs": option.nargs, "const": True} if option.nargs == "?" else {"nargs": option.nargs}
        default = argparse.SUPPRESS if only_given else option.default
        shown = {"choices": option.choices, "help": option.help, "default": default}
        parser.add_argument(*option.flags, dest=name, type=_argument_type(option.read), **more, **shown)
        if option.off_flags:
            parser.add_argument(
                *option.off_flags,
                dest=name,
                action="store_false",
                default=argparse.SUPPRESS if only_given else False,
                help=option.help,
            )
    return parser


def _argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which shows the messages of its own error alone."""

    def read_argument(word: str) -> Any:
        try:
            return read(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_argument


def _option(actions: list[argparse.Action], kinds: list[str]) -> Option:
    main, *off = actions
    scalars = [kind for kind in ("str", "bool", "int", "float") if kind in kinds]
    return Option(
        flags=list(main.option_strings),
        off_flags=[flag for action in off for flag in action.option_strings],
        kinds=kinds,
        elements=_element_kind(main, scalars),
        nargs=main.nargs,
        choices=None if main.choices is None else [str(choice) for choice in main.choices],
        default=json.loads(json.dumps(main.default, default=str)),
        help=main.help,
    )


def _element_kind(action: argparse.Action, scalars: list[str]) -> str:
    if action.nargs == "+":
        return _SCALARS.get(action.type, "str")
    if "float" in scalars and "str" not in scalars:
        return "float"
    return scalars[0] if scalars else "str"


def _kinds(hint: Any) -> list[str]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return sorted({kind for member in typing.get_args(hint) for kind in _kinds(member)})
    if origin is typing.Literal:
        return sorted({_SCALARS[type(value)] for value in typing.get_args(hint)})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ["str"]
    container = origin or hint
    return [_SCALARS.get(hint) or {list: "list", tuple: "list", dict: "dict"}.get(container, "other")]


def _read_choice(choices: Sequence[str], word: str) -> str:
    if word not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}, got {word!r}.{did_you_mean(word, choices)}")
    return word


def _read_switch(word: str) -> bool:
    if word.lower() not in SWITCH_WORDS:
        raise ValueError(f"must be true or false, got {word!r}.")
    return SWITCH_WORDS[word.lower()]


def _nearest_flag(flag: str, known: Iterable[str]) -> str:
    return did_you_mean(flag.removeprefix("--"), {name.replace("-", "_") for name in known}, prefix="--")


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
