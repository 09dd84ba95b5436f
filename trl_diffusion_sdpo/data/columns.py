"""Readers of label columns."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

LARGEST = 1e9  # a larger score or weight would outweigh all other pairs together


class LabelError(ValueError):
    """Error for a row whose label or score is missing or unreadable."""


class ImageScores(NamedTuple):
    """Scores of the images of a row, from its label."""

    values: tuple[float, ...]  # one number per image; larger is better
    ranked: bool = True  # whether equal numbers are a tie; false if nobody compared the images that were not picked


def member_text(value: Any) -> Any:
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
    return text.strip() if isinstance(text, str) else text


def is_valid(value: Any, what: str) -> bool:
    """Convert a value to a boolean. A missing value is true. CSV and JSON files may contain booleans as text."""
    if value is None or value != value:  # NaN, as pandas reads an empty cell
        return True
    word = str(member_text(value)).lower()
    if word in ("true", "1", "1.0", "yes"):
        return True
    if word in ("false", "0", "0.0", "no"):
        return False
    raise LabelError(f"`{what}` must be true or false, got {value!r}")


def finite_number(value: Any, what: str = "label") -> float:
    """Convert a number to a float. The number may be text, or bytes from a member of an archive.

    Raises:
        LabelError: If the value is no number, not finite or larger than `LARGEST`.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise LabelError(f"`{what}` must be a number, got {value!r}") from error
    if not math.isfinite(number):
        raise LabelError(f"`{what}` must be finite, got {number}")
    if abs(number) > LARGEST:
        raise LabelError(f"`{what}` must be between -{LARGEST:g} and {LARGEST:g}, got {number:g}")
    return number


def _numbers(values: Any) -> tuple[float, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise LabelError(f"the label must be a list with one number per image, got {values!r}")
    numbers = tuple(finite_number(value) for value in values)
    if not numbers:
        raise LabelError("the label is an empty list")
    return numbers


def first_is_preferred(_: Sequence[Any]) -> ImageScores:
    return ImageScores((1.0, 0.0))


def larger_is_better(values: Sequence[Any]) -> ImageScores:
    return ImageScores(_numbers(values))


def probability_of_first(values: Sequence[Any]) -> ImageScores:
    first = finite_number(values[0])
    return ImageScores((first, 1.0 - first))


def picked_from_list(values: Sequence[Any]) -> ImageScores:
    return ImageScores(_numbers(values[0]), ranked=False)


def rank_list(values: Sequence[Any]) -> ImageScores:
    return ImageScores(tuple(-rank for rank in _numbers(values[0])))


def rank_of_row(values: Sequence[Any]) -> ImageScores:
    return ImageScores((-finite_number(values[0], "rank"),))


def check_number_columns(wanted: Sequence[str], columns: Sequence[str], name: str) -> None:
    """Raise `ValueError` if data lack columns that weights of pairs read."""
    if lacking := [column for column in wanted if column not in columns]:
        raise ValueError(
            f"`pair_weights` reads the columns {lacking}, and the {name} data have {list(columns)}. Add them, or name "
            "another column or function."
        )


def numbers_of_rows(values: Iterable[Any], column: str) -> tuple[np.ndarray, dict[int, str]]:
    """Return the finite numbers of a column, one or a list of them for each row.

    Args:
        values (`Iterable`): Values of the column, in the order of the rows. All lists must have as many numbers as the
            first good one. Numbers may be text, as in CSV files.
        column (`str`): Name of the column in reasons.

    Returns:
        `tuple`: Numbers as float64 of shape `(rows, K)`, NaN in bad rows, and the reason of each bad row by its number.
    """
    rows: list[list[float]] = []
    reasons: dict[int, str] = {}
    width = 0
    for row, value in enumerate(values):
        try:
            listed = value if isinstance(value, list | tuple | np.ndarray) else [value]
            numbers = [finite_number(each, column) for each in listed]
            width = width or len(numbers)
            if not numbers or len(numbers) != width:
                raise LabelError(f"`{column}` must have {width or 'some'} numbers, as other rows have; got {value!r}")
            rows.append(numbers)
        except LabelError as error:
            reasons[row] = str(error)
            rows.append([])
    return np.array([numbers or [np.nan] * width for numbers in rows], dtype=np.float64), reasons


def digest_of(text: str) -> int:
    """Return 64 bits of a text's hash, equal on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)
