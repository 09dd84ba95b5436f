"""Makes a `datasets.Dataset` with undecoded images of what a user passes, a data set or a list of dicts."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image

from ..utils.errors import UserError
from .data_report import DataReport
from .formats import resolve_format
from .images import BAD_IMAGE, UndecodableImageError, decode_image


def as_table(rows: Any, dataset_format: str | None, name: str) -> datasets.Dataset:
    """Return a user's rows as a `datasets.Dataset`. `name` is their name in messages.

    Raises:
        ValueError: If the data have an unsupported type, a transform, or no rows.
    """
    if isinstance(rows, dict):
        raise UserError(
            f"The {name} data must be one split, got a {type(rows).__name__} with the splits {list(rows)}. "
            "Pass one of these splits."
        )
    is_list = isinstance(rows, list | tuple) and all(isinstance(row, Mapping) for row in rows)
    if not is_list and not isinstance(rows, datasets.Dataset):
        raise UserError(
            f"The {name} data must be a datasets.Dataset, a datasets.IterableDataset or a list of dicts, got "
            f"{type(rows).__name__}. Load files with `datasets.load_dataset`, and read a torch data set with "
            "`datasets.Dataset.from_generator`."
        )
    if not len(rows):
        raise UserError(f"The {name} data set is empty: {DataReport(name, dataset_format or 'unknown format')}")
    if is_list:
        return _table_of_rows(rows, dataset_format, name)
    if rows.format["type"] == "custom":
        raise UserError(
            "A data set must not have a transform (`set_transform` or `with_transform`), because a transform could "
            f"return other rows at each read. The {name} data have one. Apply the transform once with `map`, or remove "
            "it with `with_format(None)`."
        )
    return rows


def _table_of_rows(rows: Sequence[Mapping[str, Any]], dataset_format: str | None, name: str) -> datasets.Dataset:
    """Convert a list of dicts to a `datasets.Dataset`. Images in memory become lossless PNG files."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    values = {column: [row.get(column) for row in rows] for column in columns}
    row_format = resolve_format(dataset_format, columns)
    for column in (*row_format.image_columns, *row_format.mask_columns, *row_format.source_columns):
        is_text = column in row_format.source_columns and all(isinstance(value, str) for value in values[column])
        if not is_text:  # text in a column `source` is not the name of an image
            values[column] = [stored_image(value) for value in values[column]]
    for column, entries in values.items():
        if any(isinstance(entry, str) for entry in entries):  # a missing text is NaN in rows from pandas
            values[column] = [None if isinstance(entry, float) and math.isnan(entry) else entry for entry in entries]
    try:
        return datasets.Dataset.from_dict(values)
    except (pa.ArrowException, TypeError, ValueError) as error:
        kinds = {column: {type(entry).__name__ for entry in values[column] if entry is not None} for column in values}
        mixed = {column: sorted(names) for column, names in kinds.items() if len(names) > 1}
        raise UserError(
            f"Each column of the {name} data must have values of one type in all rows. Got the types {mixed or kinds}: "
            f"{error}"
        ) from error


def stored_image(value: Any) -> Any:
    """Convert an image, or a list of images, to the form in which Arrow stores them."""
    if isinstance(value, list | tuple):
        return [stored_image(image) for image in value]
    if isinstance(value, Image.Image):
        content = io.BytesIO()
        try:
            decode_image(value).save(content, "PNG", compress_level=1)
            value = content.getvalue()
        except UndecodableImageError as error:
            value = BAD_IMAGE + str(error).encode()  # decoding raises this error again, so the pair is counted later
    if isinstance(value, Mapping):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, str | os.PathLike):
        return {"bytes": None, "path": os.fspath(value)}
    if value is not None and not isinstance(value, bytes):
        value = (
            BAD_IMAGE + f"is of unknown kind {type(value).__name__}: expected a PIL image, bytes or a path".encode()
        )
    return {"bytes": value, "path": None}
