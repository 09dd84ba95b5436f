"""Switches and choices as YAML and people write them: `off` for `"none"`, `"yes"` for `True`."""

from __future__ import annotations

from dataclasses import fields
from inspect import get_annotations
from typing import TYPE_CHECKING

from ..switch_words import SWITCH_WORDS, choice_of_switch

if TYPE_CHECKING:
    from .diffusion_sdpo_config import DiffusionSDPOConfig

_CHOICES_OF_TRANSFORMERS = dict.fromkeys(("eval_strategy", "logging_strategy", "save_strategy"), ("no",))
_BOOLEAN = ("bool", "bool | None")


def read_words(args: DiffusionSDPOConfig) -> None:
    """Read words as the switches that they mean, and a switch that is off as the choice that means it.

    Raises:
        ValueError: If a switch is a word that means neither, which Python would take as on.
    """
    # Not `field.type`: making a parser of the dataclass overwrites it, and `str | bool` would then be `bool`.
    kinds = {name: kind for part in reversed(type(args).__mro__) for name, kind in get_annotations(part).items()}
    for field in fields(args):
        value, kind = getattr(args, field.name), kinds[field.name]
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        choices = field.metadata.get("choices") or _CHOICES_OF_TRANSFORMERS.get(field.name, ())
        meant = choice_of_switch(value, choices) if isinstance(value, bool) else None
        if meant is not None:
            setattr(args, field.name, meant)
        elif isinstance(value, str) and kind in _BOOLEAN:
            if value.lower() not in SWITCH_WORDS:
                raise ValueError(f"`{field.name}` must be True or False, got {value!r}.")
            setattr(args, field.name, SWITCH_WORDS[value.lower()])
