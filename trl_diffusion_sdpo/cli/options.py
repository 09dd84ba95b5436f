"""The options of `train`, without importing torch.

`train_options.json` describes the parser that TRL makes from the dataclasses, for the versions of transformers, TRL and
accelerate that it names. With other versions the parser is made and described at run time, which takes seconds. After a
change of the options, `python tests/test_cli_surface.py` rewrites the file."""

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

from ..utils.hints import did_you_mean, why_absent
from ..utils.switch_words import SWITCH_WORDS

TABLE_FILE = Path(__file__).with_name("train_options.json")
DESCRIBED = ("accelerate", "transformers", "trl")
# Files that declare the fields of other libraries.
_SOURCES = {"transformers": ["training_args.py"], "trl": ["scripts/utils.py", "trainer/model_config.py"]}
_SCALARS = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}


@dataclass(frozen=True)
class Option:
    """One option."""

    flags: list[str]  # on the command line
    kinds: list[str]  # types of its values: `bool`, `int`, `float`, `str`, `list`, `dict`, `null` and `other`
    elements: str  # type of a list's elements and of a word of the command line
    off_flags: list[str]  # flags that disable it, if it is on by default
    nargs: str | None  # this and the following as in argparse
    choices: list[str] | None
    default: Any
    help: str | None

    def read(self, word: str) -> Any:
        """Converts a word of the command line to a value.

        Raises:
            ValueError: If the option does not take it; the message continues a sentence that begins with its name.
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
    """All options of `train`."""

    options: dict[str, Option]  # by name
    launch_options: dict[str, bool]  # options of `accelerate launch`, and whether each takes a value
    package_options: list[str]  # names of those that this package declares, not transformers or TRL
    groups: dict[str, list[str]]  # names under each title of the help, without those that are not listed


class OneLineParser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line that names the nearest known option."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        if "choices" in settings and "type" not in settings:
            settings["type"] = _argument_type(functools.partial(_read_choice, settings["choices"]))
        return super().add_argument(*flags, **settings)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        refuse_unknown(
            unknown, (flag.removeprefix("--") for action in self._actions for flag in action.option_strings)
        )
        return parsed


def refuse_unknown(words: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` on words that a parser did not recognize, with the nearest known options."""
    words, known = list(words), list(known)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    if flags:
        listed = (f"`{flag}` is no option of this command.{_nearest_flag(flag, known)}" for flag in flags)
        raise ValueError(f"{' '.join(listed)} `--help` lists all.")
    if words:
        raise ValueError(f"These words belong to no option: {' '.join(words)}. Options begin with `--`.")


def read_table() -> OptionTable | None:
    """The packaged table, or `None` if it describes other versions than the installed ones."""
    stored = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    if stored["versions"] != installed_versions():
        return None
    options = {name: Option(**row) for name, row in stored["options"].items()}
    return OptionTable(options, stored["launch_options"], stored["package_options"], stored["groups"])


def write_table(table: OptionTable) -> None:
    """Write the packaged table, one line per option."""
    rows = {name: asdict(option) for name, option in table.options.items()}
    TABLE_FILE.write_text(
        f'{{"versions": {json.dumps(installed_versions())},\n"package_options": {json.dumps(table.package_options)},\n'
        f'"launch_options": {json.dumps(table.launch_options)},\n"groups": {json.dumps(table.groups)},\n"options": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in rows.items())
        + "\n}}\n",
        encoding="utf-8",
    )


def installed_versions() -> dict[str, str]:
    """Versions of the libraries whose options the table describes."""
    return {library: _version(library) for library in DESCRIBED}


def names_in_sources() -> set[str] | None:
    """Names of all options of the installed versions, read from their sources as text, without importing them.

    Returns:
        `set[str]` or `None`: Possibly more names than options; `None` if the libraries' files are not as expected.
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
    found |= set(stored["package_options"])
    return found if set(stored["options"]) <= found else None


def describe(parser: argparse.ArgumentParser, dataclasses: Iterable[type]) -> dict[str, Option]:
    """The options of a parser made from dataclasses, whose annotations give the types of values in YAML."""
    hints = {name: hint for holder in dataclasses for name, hint in typing.get_type_hints(holder).items()}
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if action.dest in hints:
            actions.setdefault(action.dest, []).append(action)
    return {name: _option(same, _kinds(hints[name])) for name, same in actions.items()}


def given_parser(options: Mapping[str, Option]) -> OneLineParser:
    """A parser of the described options, whose namespace holds only those that are given."""
    parser = OneLineParser(add_help=False, argument_default=argparse.SUPPRESS)
    for name, option in options.items():
        more = {"nargs": option.nargs, "const": True} if option.nargs == "?" else {"nargs": option.nargs}
        read = _argument_type(option.read)
        parser.add_argument(*option.flags, dest=name, type=read, choices=option.choices, **more)
        if option.off_flags:
            parser.add_argument(*option.off_flags, dest=name, action="store_false", default=argparse.SUPPRESS)
    return parser


def _argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` as a `type` of argparse, which shows messages of `ArgumentTypeError` only."""

    def read_argument(word: str) -> Any:
        try:
            return read(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_argument


def _option(actions: list[argparse.Action], kinds: list[str]) -> Option:
    main, *off = actions
    scalars: list[str] = [kind for kind in ("str", "bool", "int", "float") if kind in kinds]
    return Option(
        flags=list(main.option_strings),
        off_flags=[flag for action in off for flag in action.option_strings],
        kinds=kinds,
        elements=_element_kind(main, scalars),
        nargs=None if main.nargs is None else str(main.nargs),
        choices=None if main.choices is None else [str(choice) for choice in main.choices],
        default=json.loads(json.dumps(main.default, default=str)),
        help=main.help,
    )


def _element_kind(action: argparse.Action, scalars: list[str]) -> str:
    if action.nargs == "+":
        return _SCALARS.get(typing.cast(Any, action.type), "str")
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
    return why_absent(flag) or did_you_mean(
        flag.removeprefix("--"), {name.replace("-", "_") for name in known}, prefix="--"
    )


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
