"""Reads columns of numbers, such as weights and noise seeds, and says which rows are bad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .formats import LabelError, finite_number


def numbers_of_rows(values: Iterable[Any], column: str) -> tuple[np.ndarray, dict[int, str]]:
    """Return the numbers in a column, each row a finite number or a list of them.

    Args:
        values (`Iterable`): Values of the column, in the order of the rows. Lists must be as long as the first valid
            one. Numbers may be text, as in CSV files.
        column (`str`): Name of the column in the returned reasons.

    Returns:
        `tuple`: Numbers as float64 of shape `(rows, K)`, with NaN in bad rows, and a dict from the number of each bad
            row to the reason.
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
                raise LabelError(f"`{column}` must have {width or 'some'} numbers in every row, got {value!r}")
            rows.append(numbers)
        except LabelError as error:
            reasons[row] = str(error)
            rows.append([])
    return np.array([numbers or [np.nan] * width for numbers in rows], dtype=np.float64), reasons


def bad_seeds(values: Iterable[Any], column: str) -> dict[int, str]:
    """Return a dict from row numbers to reasons, for rows whose seed is not a whole number in `[0, 2**63)`."""
    reasons = {}
    for row, value in enumerate(values):
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not is_whole or not 0 <= value < 2**63:
            reasons[row] = f"`{column}` must be the seed of a generator, got {value!r}"
    return reasons
