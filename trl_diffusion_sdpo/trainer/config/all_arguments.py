"""The class of all settings, and the parsers of their text from YAML or a command line."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from ...data.images import MIN_SIDE
from ...losses import NAMED_SETTINGS
from ...utils.errors import UserError
from ...utils.hints import CHOICE_ALIASES
from ...utils.renamed import refuse_renamed
from ...utils.score_scale import score_scale
from .data_arguments import DataArguments, RunArguments
from .model_arguments import MemoryArguments, PipelineArguments
from .sample_arguments import SampleArguments
from .step_arguments import LossArguments, NoiseArguments, WinnerArguments


@dataclass
class AllArguments(  # type: ignore[misc]  # `dataloader_num_workers` may be `None` here
    PipelineArguments,
    MemoryArguments,
    NoiseArguments,
    LossArguments,
    DataArguments,
    WinnerArguments,
    SampleArguments,
    RunArguments,
    TrainingArguments,
):
    """All settings as plain fields. The subclass [`DiffusionSDPOConfig`] parses and checks their values."""

    def __new__(cls, *args: Any, **settings: Any) -> AllArguments:
        refuse_renamed(settings)  # the generated `__init__` would only say that it does not know it
        return super().__new__(cls)


@dataclass(frozen=True)
class Setting:
    """Type annotation of a setting, parsed."""

    types: frozenset[Any]  # without `None`
    is_optional: bool  # whether the setting may be `None`
    choices: tuple[str, ...]  # words of the `Literal`
    facts: tuple[Any, ...]  # metadata of the `Annotated`, such as a `Range`


def settings_of(config: type) -> dict[str, Setting]:
    """Return the [`Setting`] of each field of a configuration class, by name."""
    hints = get_type_hints(config, include_extras=True)
    return {field.name: _setting(hints[field.name]) for field in fields(config)}


def _setting(hint: Any) -> Setting:
    facts: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *facts = get_args(hint)
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    choices = tuple(word for word in words if isinstance(word, str))
    return Setting(frozenset(members) - {type(None)}, type(None) in members, choices, tuple(facts))


def _number_or_name(value: str) -> float | str:
    try:
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        return value


def settled_number(name: str, value: Any) -> float:
    """Return a value of the setting `name`, such as the text `"1e-4"`, as a number. Raise `ValueError` if it is
    not one."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"`{name}` must be a number or a list of numbers, got {value!r}.") from error


def settled_loss_type(value: Any) -> str | list[str]:
    """Return `loss_type` as a string if it is one name, and as a list if there are several. (A command line passes one
    name as a list too.) `"dpo"` becomes `"sigmoid"`, the loss of Diffusion-DPO."""
    names = [CHOICE_ALIASES.get(name) or name for name in (value if isinstance(value, (list, tuple)) else [value])]
    return names[0] if len(names) == 1 else names


def settled_mapping(name: str, value: Any) -> dict[str, Any]:
    """Return the value of the setting `name` as a dictionary, with text such as `"1e-3"` as numbers (YAML reads `1e-3`
    as text). `None` becomes an empty dictionary.

    Raises:
        `ValueError`: If `value` is not a mapping.
    """
    if value is not None and not isinstance(value, dict):
        raise UserError(f'`{name}` must map names to values, got {value!r}. Write `{{"name": 1}}` on a command line.')
    return {key: _number_or_name(item) if isinstance(item, str) else item for key, item in (value or {}).items()}


def settled_loss_kwargs(value: Any) -> dict[str, float | str]:
    """Return the constants in `loss_kwargs`, as numbers but for those of `NAMED_SETTINGS`.

    Raises:
        `ValueError`: If `value` is no mapping to such values.
    """
    numbers = settled_mapping("loss_kwargs", value)
    if isinstance(numbers.get("smpo_score_scale"), str):
        numbers["smpo_score_scale"] = score_scale(numbers["smpo_score_scale"])
    for name, number in numbers.items():
        if name not in NAMED_SETTINGS and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise UserError(
                f"`{name}` of `loss_kwargs` must be a number, got {number!r}. Set a number, or leave `{name}` out."
            )
    return numbers


def settled_resolution(value: Any) -> list[int] | None:
    """Return `resolution`, the size of training images, as `[height, width]`.

    Args:
        value (`int`, `list[int]` or `tuple[int, int]`, *optional*): Size from Python, YAML or a command line, which
            passes a single number as a list.

    Raises:
        `ValueError`: If `value` is not one or two whole numbers of at least 8 pixels.
    """
    if value is None:
        return None
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    integers = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not integers or len(sides) not in (1, 2) or min(sides) < MIN_SIDE:
        raise UserError(
            f"`resolution` must be one number or a height and a width, at least {MIN_SIDE} pixels; got {value!r}. "
            "Write `1024` or `768 1344` on a command line, `1024` or `[768, 1344]` in YAML."
        )
    return [sides[0], sides[-1]]


@contextlib.contextmanager
def temporarily(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object within the context, and restore them afterwards."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
