"""A griffe extension: docstrings in the style of TRL, as mkdocstrings shows them."""

import re
from pathlib import Path
from typing import Any

import griffe

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
NOTE = re.compile(r"^> \[!NOTE\]\n((?:>.*\n?)+)", re.MULTILINE)
RAISES = re.compile(r"^( {4})`(\w+)`:", re.MULTILINE)
TYPE = re.compile(r"^( {4}\w+) \((.*?)\):", re.MULTILINE)


class TRLDocstrings(griffe.Extension):
    """Links names that stand on the API page, and leaves defaults to the signature."""

    def __init__(self) -> None:
        entries = re.findall(r"^::: (\S+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
        self.entries = {entry.rpartition(".")[2]: entry for entry in entries}

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = TYPE.sub(lambda match: f"{match[1]} ({self._type(match[2])}):", obj.docstring.value)
            text = RAISES.sub(r"\1\2:", text)
            text = re.sub(r"\[`~?([\w.]+)`\](?!\()", lambda match: self._name(match[1]), text)
            obj.docstring.value = NOTE.sub(lambda match: _note(match[1]), text)

    def _type(self, text: str) -> str:
        """`float`, *optional*, defaults to `1.0` -> float"""
        text = re.sub(r",? ?\*optional\*|, defaults to .*", "", text)
        return re.sub(r"\[`~?([\w.]+)`\]", lambda match: match[1].rpartition(".")[2], text).replace("`", "")

    def _name(self, name: str) -> str:
        last = name.rpartition(".")[2]
        return f"[`{last}`][{self.entries[last]}]" if last in self.entries else f"`{last}`"


def _note(quoted: str) -> str:
    """A quoted note as an admonition; a list in it begins after an empty line."""
    lines = [line.removeprefix(">").strip() for line in quoted.splitlines()]
    first = next((number for number, line in enumerate(lines) if line.startswith("- ")), len(lines))
    return "\n".join(["!!! note", "", *(f"    {line}" for line in [*lines[:first], "", *lines[first:]])]) + "\n"
