"""Switches and choices as YAML and people write them: `off` for `"none"`, `"yes"` for `True`."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .diffusion_sdpo_config import DiffusionSDPOConfig

SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_OFF = ("none", "no")  # what a choice may call it
_CHOICES_OF_TRANSFORMERS = dict.fromkeys(("eval_strategy", "logging_strategy", "save_strategy"), ("no",))
_BOOLEAN = ("bool", "bool | None")


def read_words(args: DiffusionSDPOConfig) -> None:
    """Read words as the switches that they mean, and a switch that is off as the choice that means it.

    Raises:
        ValueError: If a switch is a word that means neither, which Python would take as on.
    """
    for field in fields(args):
        value = getattr(args, field.name)
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        choices = field.metadata.get("choices") or _CHOICES_OF_TRANSFORMERS.get(field.name, ())
        off = next((word for word in _OFF if word in choices), None)
        if value is False and off is not None:
            setattr(args, field.name, off)
        elif isinstance(value, str) and kind in _BOOLEAN:
            if value.lower() not in SWITCHES:
                raise ValueError(f"`{field.name}` must be True or False, got {value!r}.")
            setattr(args, field.name, SWITCHES[value.lower()])
