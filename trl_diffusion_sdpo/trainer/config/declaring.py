"""Each setting is declared once. Its field holds the default; its annotation the choices (a `Literal`), the [`Range`]
and the mark [`RESUME`]; its paragraph in the docstring of the class is the help text.

Choices and ranges are not in the field's metadata, all of which transformers' parser passes to `argparse`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from ...utils.errors import UserError
from ...utils.hints import did_you_mean

Built = TypeVar("Built")
Group = TypeVar("Group", bound=type)
RESUME = "resume"  # marks settings that change the trained weights; a resumed run compares them


@dataclass(frozen=True)
class Range:
    """Interval of the numbers that a setting allows.

    Args:
        interval (`str`): Interval such as `"(0, 1]"`, or `"[1, inf)"` if there is no largest number.
        advice (`str`): What to do, for the end of the error message.
    """

    interval: str
    advice: str = ""

    def __contains__(self, value: object) -> bool:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        if not isinstance(value, (int, float)):
            return False
        above = value > low if self.interval[0] == "(" else value >= low
        return above and (value < high if self.interval[-1] == ")" else value <= high)

    def __str__(self) -> str:
        low, _, high = self.interval[1:-1].partition(", ")
        if high != "inf":
            return f"in {self.interval}"
        return f"greater than {low}" if self.interval[0] == "(" else f"at least {low}"


@dataclass(frozen=True)
class Choices:
    """Words that a setting allows, alone or in a list."""

    words: tuple[str, ...]


def from_kwargs(kind: type[Built], setting: str, values: dict[str, Any], *arguments: Any) -> Built:
    """Return `kind(*arguments, **values)` for the `values` of a setting such as `inversion_kwargs`, checked by
    [`check_kwargs`]."""
    check_kwargs(kind, setting, values, given=len(arguments))
    return kind(*arguments, **values)


def check_kwargs(kind: type, setting: str, values: dict[str, Any], *, given: int = 0) -> None:
    """Check the names and types of the constants in a setting such as `inversion_kwargs`. The dataclass `kind` itself
    checks ranges and words.

    Args:
        given (`int`): How many of the first fields of `kind` the setting cannot set.

    Raises:
        `ValueError`: If a name in `values` is no optional field of `kind`, or a value is not a number of the field's
            type.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)[given:] if field.default is not MISSING]
    for name, value in values.items():
        if name not in names:
            raise UserError(f"`{setting}` takes {', '.join(names)}; got {name!r}.{did_you_mean(str(name), names)}")
        if hints[name] not in (int, float):
            continue
        if isinstance(value, bool) or not isinstance(value, int if hints[name] is int else (int, float)):
            expected = "a whole number" if hints[name] is int else "a number"
            raise UserError(f"`{name}` of `{setting}` must be {expected}, got {value!r}.")


def naming(**words: Iterable[str]) -> Callable[[Group], Group]:
    """Return a decorator that replaces placeholders in a class's docstring by words, such as the names of losses. Write
    it below [`documented`]."""

    def fill(group: Group) -> Group:
        for placeholder, names in words.items():
            *first, last = (f"`{name}`" for name in names)
            group.__doc__ = (group.__doc__ or "").replace(placeholder, f"{', '.join(first)} and {last}")
        return group

    return fill


def documented(group: Group) -> Group:
    """Set the help text of each field of a dataclass of settings to its paragraph in the docstring.

    A field with [`Choices`] also gets its words and its default as metadata, because transformers' parser reads the
    default of a list only from a `default_factory`.
    """
    text = inspect.getdoc(group) or ""
    paragraphs = dict(re.findall(r"^    (\w+) \(.*?\):\s+(.*?)(?=^    \w|\Z)", text, re.DOTALL | re.MULTILINE))
    hints = get_type_hints(group, include_extras=True)
    for setting in fields(group):
        if setting.name not in group.__annotations__:
            continue
        paragraph = " ".join(paragraphs[setting.name].split())
        facts = get_args(hints[setting.name]) if get_origin(hints[setting.name]) is Annotated else ()
        words = [fact.words for fact in facts if isinstance(fact, Choices)]
        parser_arguments = {"choices": words[0], "default": setting.default} if words else {}
        setting.metadata = MappingProxyType({"help": paragraph.replace("%", "%%"), **parser_arguments})
    return group
