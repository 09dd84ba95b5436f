"""How a setting is declared.

Its field holds the default; its annotation the choices as a `Literal`, the allowed numbers as a [`Range`], and the
lists of settings that it belongs to; its paragraph of the class's docstring is its help. (The parser of transformers
hands all metadata of a field to `argparse`: nothing but its arguments can be there.)
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Annotated, TypeVar, get_args, get_origin, get_type_hints

RESUME = "resume"  # The setting changes the trajectory: resuming compares it, and the model card shows it.
EVALUATION = "evaluation"  # An evaluation of saved weights depends on the setting.


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be.

    Args:
        interval (`str`): Such as `"(0, 1]"`; `"[1, inf)"` has no upper end.
        advice (`str`): Ends the error message.
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
    """The words that a list may hold. A command line may also pass one of them alone.

    Args:
        words (`tuple[str, ...]`): All of them.
    """

    words: tuple[str, ...]


@dataclass(frozen=True)
class Keys:
    """The keys that a mapping may have: fields of the dataclass that it becomes the arguments of.

    Args:
        of (`type`): A dataclass, which has the defaults and checks the values.
        names (`tuple[str, ...]`): Those of its fields that are keys.
    """

    of: type
    names: tuple[str, ...]


Group = TypeVar("Group", bound=type)


def documented(group: Group) -> Group:
    """Make the paragraphs of a dataclass's docstring the help of its fields, with the words of [`Choices`] and, as that
    parser takes no default of a list but from a factory, their default.

    Raises:
        `ValueError`: If a field has no paragraph.
    """
    text = inspect.getdoc(group) or ""
    paragraphs = dict(re.findall(r"^    (\w+) \(.*?\):\s+(.*?)(?=^    \w|\Z)", text, re.DOTALL | re.MULTILINE))
    hints = get_type_hints(group, include_extras=True)
    for setting in fields(group):
        if setting.name not in group.__annotations__:
            continue
        if setting.name not in paragraphs:
            raise ValueError(f"Each setting needs a paragraph in the docstring of {group.__name__}: {setting.name}.")
        paragraph = " ".join(paragraphs[setting.name].split())
        facts = get_args(hints[setting.name]) if get_origin(hints[setting.name]) is Annotated else ()
        words = [fact.words for fact in facts if isinstance(fact, Choices)]
        more = {"choices": words[0], "default": setting.default} if words else {}
        setting.metadata = MappingProxyType({"help": paragraph.replace("%", "%%"), **more})
    return group
