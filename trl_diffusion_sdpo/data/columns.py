"""How values of columns are read: one by one, and all of a table as arrays, without a loop over the rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from ..utils._compat import without_selection

ROUND_ROWS = 65_536  # rows that are in memory at a time

_OF_VIEWS = {"string_view": pa.large_string(), "binary_view": pa.large_binary()}


class LabelError(ValueError):
    """A row whose label or score is missing or unreadable."""


class ImageScores(NamedTuple):
    """How a row's label ranks the row's images."""

    values: tuple[float, ...]  # one number per image; larger is better
    ranked: bool = True  # whether equal numbers are a tie: the images that nobody picked were never compared


# ---- One by one ----------------------------------------------------------------------------------------------------


def member_text(value: Any) -> Any:
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
    return text.strip() if isinstance(text, str) else text


def is_valid(value: Any, what: str) -> bool:
    """A boolean, true where it is missing. CSV and JSON files may hold it as text."""
    if value is None or value != value:  # NaN: pandas' value of an empty cell
        return True
    word = str(member_text(value)).lower()
    if word in ("true", "1", "1.0", "yes"):
        return True
    if word in ("false", "0", "0.0", "no"):
        return False
    raise LabelError(f"`{what}` must be true or false, got {value!r}")


def finite_number(value: Any, what: str = "label") -> float:
    """A finite float from a number, a numeric string or numeric bytes (archive members are text: "0.5\\n")."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise LabelError(f"`{what}` must be a number, got {value!r}") from error
    if not math.isfinite(number):
        raise LabelError(f"`{what}` must be finite, got {number}")
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


# ---- As arrays -----------------------------------------------------------------------------------------------------


class NotVectorizedError(Exception):
    """A column is of a type that is only read row by row."""


def row_codes(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """A number for every row of a data set, equal for equal values of a column, counted from 0 by first appearance."""
    base, selected = without_selection(dataset.select_columns([column]))
    tables = base.with_format("arrow").iter(batch_size=ROUND_ROWS)
    try:
        return value_codes([one_chunk(table.column(0)) for table in tables], selected)
    except NotVectorizedError:
        codes: dict[str, int] = {}
        rows = dataset.with_format(None).select_columns([column]).iter(batch_size=1000)
        return np.array([codes.setdefault(repr(value), len(codes)) for batch in rows for value in batch[column]])


def digest_of(text: str) -> int:
    """64 bits that tell texts apart, equal on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)


def digests_of_values(read: Iterable[pa.ChunkedArray], as_text: Callable[[Any], str]) -> np.ndarray:
    """The [`digest_of`] of each value of a column, int64, each distinct value of a part being read once."""
    found = [np.zeros(0, dtype=np.int64)]
    for values in read:
        encoded = values.combine_chunks().dictionary_encode()
        distinct = [digest_of(as_text(value)) for value in encoded.dictionary.to_pylist()]
        found.append(np.array(distinct, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(found)


def values_of_rows(table: datasets.Dataset, column: str, rows: np.ndarray) -> Iterator[pa.ChunkedArray]:
    """The values of a column in some rows of a table, whose numbers are sorted."""
    wanted, first = np.zeros(len(table), dtype=bool), 0
    wanted[rows] = True
    for part in table.select_columns([column]).with_format("arrow").iter(batch_size=ROUND_ROWS):
        yield without_views(part.column(0)).filter(wanted[first : first + len(part)])
        first += len(part)


def by_first_appearance(values: np.ndarray) -> np.ndarray:
    """The number of each value, equal for equal ones, counted from 0 in the order in which values appear."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[inverse]


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`[start, ..., start + count - 1]` of every span, joined."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def read_numbers(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A column as float64, and which of its values [`finite_number`] accepts."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = column.to_numpy(zero_copy_only=False).astype(np.float64)
        return values, np.isfinite(values) & are_filled(column)
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan), np.zeros(len(column), dtype=bool)
    if not (holds_text(kind) or holds_bytes(kind) or pa.types.is_decimal(kind)):
        raise NotVectorizedError
    values = _by_distinct_value(column, finite_number)
    return values, np.isfinite(values)


def check_number_columns(wanted: Sequence[str], columns: Sequence[str], name: str) -> None:
    """Raise `ValueError` if data lack columns that weights of pairs read."""
    if lacking := [column for column in wanted if column not in columns]:
        raise ValueError(
            f"`pair_weights` reads the columns {lacking}, and the {name} data have {list(columns)}. Add them, or name "
            "another column or function."
        )


def numbers_of_rows(values: Iterable[Any], column: str) -> tuple[np.ndarray, dict[int, str]]:
    """The finite numbers of a column that no format names, one or a list of them for each row.

    Args:
        values (`Iterable`): Of the column, in the order of the rows. All lists have as many numbers as the first good
            one; numbers may be written as text, as CSV files have them.
        column (`str`): Its name, in reasons.

    Returns:
        `tuple`: Numbers as float64 of shape `(rows, K)`, with NaN where a row is bad, and why a row is bad, by its
        number.
    """
    found: list[list[float]] = []
    reasons: dict[int, str] = {}
    width = 0
    for row, value in enumerate(values):
        try:
            listed = value if isinstance(value, list | tuple | np.ndarray) else [value]
            numbers = [finite_number(each, column) for each in listed]
            width = width or len(numbers)
            if not numbers or len(numbers) != width:
                raise LabelError(f"`{column}` must have {width or 'some'} numbers, as other rows have; got {value!r}")
            found.append(numbers)
        except LabelError as error:
            reasons[row] = str(error)
            found.append([])
    return np.array([numbers or [np.nan] * width for numbers in found], dtype=np.float64), reasons


def are_valid(column: pa.Array) -> np.ndarray:
    """Which values of a validity column [`is_valid`] takes for true."""
    kind = column.type
    if not (_holds_keys(kind) or pa.types.is_floating(kind) or holds_bytes(kind) or pa.types.is_null(kind)):
        raise NotVectorizedError
    return _by_distinct_value(column, lambda value: is_valid(value, "")) == 1.0


def _by_distinct_value(column: pa.Array, function: Callable[[Any], float]) -> np.ndarray:
    """`function` of each value; NaN where it finds an error."""
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    encoded, found = column.dictionary_encode(null_encoding="encode"), []
    for value in encoded.dictionary.to_pylist():
        try:
            found.append(float(function(value)))
        except LabelError:
            found.append(float("nan"))
    return np.array(found)[encoded.indices.to_numpy(zero_copy_only=False)]


def value_codes(chunks: Sequence[pa.Array], selected: np.ndarray | None) -> np.ndarray:
    """A number for each value, equal for equal ones, counted from 0 by first appearance."""
    if not chunks or not _holds_keys(chunks[0].type):
        raise NotVectorizedError
    kind = pa.large_string() if holds_text(chunks[0].type) else chunks[0].type  # whose offsets reach beyond 2 GB
    encoded = [chunk.dictionary_encode(null_encoding="encode") for chunk in chunks]
    distinct = pa.concat_arrays([chunk.dictionary.cast(kind) for chunk in encoded])  # in each chunk
    numbers = distinct.dictionary_encode(null_encoding="encode").indices.to_numpy(zero_copy_only=False)
    before = np.cumsum([0, *(len(chunk.dictionary) for chunk in encoded)])
    parts = [
        chunk.indices.to_numpy(zero_copy_only=False) + start for chunk, start in zip(encoded, before, strict=False)
    ]
    codes = numbers[np.concatenate(parts)]
    return codes.astype(np.int64) if selected is None else by_first_appearance(codes[selected])


def _holds_keys(kind: pa.DataType) -> bool:
    return holds_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def holds_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def are_filled(column: pa.Array) -> np.ndarray:
    return column.is_valid().to_numpy(zero_copy_only=False)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    column = without_views(column)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def without_views(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts and bytes in the older types, which more functions take."""
    kind = _OF_VIEWS.get(str(column.type))
    return column if kind is None else column.cast(kind)
