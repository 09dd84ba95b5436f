"""Rows of preference data, and the index of their pairs. Images stay undecoded."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from PIL import Image

from ..utils._compat import dataset_fingerprint
from ..utils.files import file_facts
from . import formats
from .checking import DataReport, evenly_spaced
from .formats import (
    LabelError,
    PreferenceFormat,
    Reject,
    finite_number,
    groups,
    images_of_row,
    mask_of_row,
    pairs_in_group,
    resolve_format,
)
from .images import ImageReader, Size, UndecodableImageError, decode_image

logger = logging.getLogger(__name__)

EXAMINED = datasets.Features(
    {
        "heights": datasets.List(datasets.Value("int32")),
        "widths": datasets.List(datasets.Value("int32")),
        "problems": datasets.List(datasets.Value("string")),
    }
)
FINGERPRINTED_PROMPTS = 16  # pairs whose prompts are hashed
FINGERPRINTED_IMAGES = 4  # pairs whose images are hashed, undecoded
Drop = tuple[str, int, str, int]  # arguments of `Reject`

TEXT = ("string", "large_string")
SEED_COLUMNS = ("chosen_noise_seed", "rejected_noise_seed")  # of `torch.Generator`s on the CPU

PLACES = ("winner_row", "winner_image", "loser_row", "loser_image")
SCORES = ("winner_score", "loser_score")
COLUMNS = datasets.Features(
    {
        **{name: datasets.Value("int64") for name in PLACES},
        **{name: datasets.Value("float64") for name in SCORES},
        # These columns are filled if a row of the index is a drop. `winner_row` is then the row of the source.
        "dropped": datasets.Value("string"),
        "reason": datasets.Value("string"),
        "amount": datasets.Value("int64"),
    }
)
ROWS_AT_ONCE = 1000
CODE = (__file__, formats.__file__)  # if this code changes, cached indexes are rebuilt
MAX_GROWTH = 100  # limit of the pairs of a weighted epoch, as a multiple of the pairs of all data sets


@dataclass(frozen=True)
class PairTable:
    """Index and columns of P pairs.

    Attributes:
        places (`np.ndarray` of shape `(P, 4)`): Winner row, winner image, loser row, loser image.
        columns (`dict[str, np.ndarray]`): Further columns of P entries by name. `scores` are reward scores of winner
            and loser. `calibrated` replaces `scores`. `weight` is the factor of a pair's loss. `size` is the number of
            its bucket. `ref_errors` are the errors of a reference.
        weighed_by (`str`, *optional*): Setting that the weights were computed from.
    """

    places: np.ndarray
    columns: Mapping[str, np.ndarray]
    weighed_by: str | None = None

    def __len__(self) -> int:
        return len(self.places)

    def take(self, pairs: slice | np.ndarray) -> PairTable:
        """Return some of the pairs, selected by a slice, a mask or indices."""
        columns = {name: values[pairs] for name, values in self.columns.items()}
        return replace(self, places=self.places[pairs], columns=columns)

    def hash_of(self, name: str) -> str:
        """Return a hash of a column."""
        return hashlib.sha256(self.columns[name].tobytes()).hexdigest()[:16]

    def with_columns(self, **columns: np.ndarray | None) -> PairTable:
        """Return the pairs with columns added or replaced. `None` removes a column."""
        joined = {**self.columns, **columns}
        return replace(self, columns={name: values for name, values in joined.items() if values is not None})


@dataclass(frozen=True)
class PairMixture:
    """Several data sets of pairs that are trained on together. Each has its own format.

    Args:
        datasets (`Sequence` or `Mapping`): The data sets, all map-style or all streams. The keys of a mapping are their
            names in messages.
        weights (`Sequence` of `float`, positive, *optional*): Shares of the data sets in an epoch. Map-style sets are
            repeated until an epoch has these shares and all pairs of every set. Repeated pairs have other random
            numbers. A stream restarts when it ends, until all have ended once. By default every pair comes once, and
            streams have equal weights.
        formats (`Sequence` of `str` or `None`, *optional*): A key of `FORMATS` for each; detected by default.

    Raises:
        ValueError: If there are no data sets, or weights or formats are wrong.
    """

    datasets: Sequence[Any] | Mapping[str, Any]
    weights: Sequence[float] | None = None
    formats: Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        count = len(self.datasets)
        if not count:
            raise ValueError("A mixture needs at least one data set, got none.")
        for name, values in (("weights", self.weights), ("formats", self.formats)):
            if values is not None and (isinstance(values, str) or len(values) != count):
                raise ValueError(f"`{name}` must be one for each of the {count} data sets, got {values!r}.")
        for weight in self.weights or ():
            if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"`weights` must be finite numbers above 0, got {weight!r}. Leave out data sets without weight."
                )
        kinds = {isinstance(dataset, datasets.IterableDataset) for dataset in self.by_name.values()}
        if len(kinds) > 1:
            raise ValueError(
                "A mixture must be of streams or of map-style data sets, got both. Load all with the same `streaming`."
            )

    @property
    def by_name(self) -> dict[str, Any]:
        """The data sets by their names."""
        named = self.datasets
        return dict(named) if isinstance(named, Mapping) else {f"set {i}": dataset for i, dataset in enumerate(named)}

    @property
    def is_stream(self) -> bool:
        """Whether the data sets are streams."""
        return isinstance(next(iter(self.by_name.values())), datasets.IterableDataset)

    def entries(self, dataset_format: str | None, name: str) -> Iterator[tuple[str, Any, str | None]]:
        """Yield the name in messages, the rows and the format of each data set."""
        formats = self.formats or [None] * len(self.datasets)
        for (label, dataset), own_format in zip(self.by_name.items(), formats, strict=True):
            yield f"{name} ({label})", dataset, own_format or dataset_format


class TableSource:
    """Rows of one `datasets.Dataset`. Images are read as Arrow values, without decoding.

    Attributes:
        labels (`datasets.Dataset`): The columns of labels and prompts.
    """

    def __init__(
        self, dataset: datasets.Dataset, row_format: PreferenceFormat, name: str, number_columns: Sequence[str] = ()
    ) -> None:
        self.format, self.name = row_format, name
        texts = dict.fromkeys([*row_format.text_columns(dataset.column_names), *number_columns])
        self.labels = dataset.with_format(None).select_columns(list(texts))
        columns = [*row_format.image_columns, *row_format.mask_columns, *row_format.source_columns]
        self._images = dataset.with_format("arrow").select_columns(columns)

    def __len__(self) -> int:
        return len(self._images)

    def values(self, column: str) -> Iterator[Any]:
        """Yield each row's value of a column that the format or `number_columns` has."""
        for batch in self.labels.select_columns([column]).iter(batch_size=1000):
            yield from batch[column]

    def prompt(self, row: int, image: int = 0) -> str:
        return self.format.prompt(self.labels[row], image)

    def prompts_of_rows(self, rows: np.ndarray, image: int = 0) -> list[str]:
        """Return the prompts of rows, whose numbers are sorted. `image` chooses among two prompts of a row."""
        columns = self.format.read_prompt_columns(self.labels.column_names)
        column = columns[min(image, len(columns) - 1)]
        wanted = np.zeros(len(self), dtype=bool)
        wanted[rows] = True
        values = (value for value, is_wanted in zip(self.values(column), wanted, strict=True) if is_wanted)
        return [self.format.prompt({column: value}, image) for value in values]

    def images(self, row: int) -> list[Any]:
        return images_of_row(self._images[row].to_pylist()[0], self.format.image_columns, self.format.images_in_list)

    def mask(self, row: int, image: int) -> Any:
        return mask_of_row(self._images[row].to_pylist()[0], self.format, image)

    def edited(self, row: int) -> list[Any]:
        """Return the undecoded images that a row's prompt edits."""
        value = self._images[row].to_pylist()[0][self.format.source_columns[0]]
        return value if isinstance(value, list) else [value]

    def sizes_of_edited(self, reader: ImageReader) -> Iterator[tuple[Size, ...]]:
        """Yield `(height, width)` of the images that each row edits, from their headers. Rows whose sources cannot be
        read are left out."""
        for batch in self._images.select_columns(list(self.format.source_columns)).iter(batch_size=1000):
            for value in map(_value, batch.column(0)):
                try:
                    yield tuple(reader.size(image) for image in (value if isinstance(value, list) else [value]))
                except UndecodableImageError:
                    continue

    @property
    def edits_lists(self) -> bool:
        """Whether rows have lists of images that are edited."""
        kind = self._images.data.schema.field(self.format.source_columns[0]).type
        return pa.types.is_list(kind) or pa.types.is_large_list(kind)

    def noise_seed(self, row: int, image: int) -> int:
        """Return the seed of the noise from which an image was generated."""
        return int(self.labels[row][SEED_COLUMNS[image]])

    def examine_images(
        self, rows: np.ndarray, reader: ImageReader, decode: bool, num_proc: int | None
    ) -> Iterator[list[tuple[int, int, str]]]:
        """Yield height, width and problem of the images of each row. Cached by `datasets`."""
        images = self._images if len(rows) == len(self) else self._images.select(rows)
        options: dict[str, Any] = {}
        if any(local_names(images[0].column(name)) for name in self.format.image_columns):
            options["load_from_cache_file"] = False  # `datasets` would not notice that a file has changed
        examined = images.map(
            _examine_table,
            batched=True,
            batch_size=16 if decode else 1000,
            fn_kwargs={"row_format": self.format, "reader": reader, "decode": decode},
            remove_columns=images.column_names,
            features=EXAMINED,
            num_proc=num_proc,
            desc="Checking images" if decode else "Reading image sizes",
            **options,
        )
        for batch in examined.with_format(None).iter(batch_size=1000):
            for facts in zip(*(batch[name] for name in EXAMINED), strict=True):
                yield list(zip(*facts, strict=True))

    @functools.cached_property
    def content_key(self) -> dict[str, str]:
        """Hashes that change when a prompt or an image does: fingerprints of `datasets`, and keys of local files."""
        digest = hashlib.sha256(dataset_fingerprint(self._images).encode())
        for batch in self._images.iter(batch_size=1000):
            for column in batch.columns:
                for name in local_names(column):
                    digest.update(f"{_file_key(name)}\n".encode("utf-8", "surrogatepass"))
        return {"prompts": dataset_fingerprint(self.labels), "images": _short(digest)}


class PairSource:
    """One or several data sets whose rows follow one another.

    Args:
        sources (`Sequence[TableSource]`): The data sets.
        weights (`Sequence[float]`, *optional*): Their shares in an epoch, see [`PairMixture`].
    """

    def __init__(self, sources: Sequence[TableSource], weights: Sequence[float] | None = None) -> None:
        self.sources, self._weights = list(sources), weights
        self._starts = [0, *np.cumsum([len(source) for source in sources]).tolist()]
        formats = [source.format for source in sources]
        self.format_name = "+".join(row_format.name for row_format in formats)
        self.is_swapped = any(row_format.is_swapped for row_format in formats)
        self.prompt_of_each_image = any(row_format.prompt_of_each_image for row_format in formats)
        self.has_losers = all(row_format.has_losers for row_format in formats)
        self.has_masks = any(row_format.mask_columns for row_format in formats)
        self.has_sources = any(row_format.source_columns for row_format in formats)
        check_masks(formats, [source.name for source in sources])
        without = [source.name for source in sources if not source.format.source_columns]
        if self.has_sources and without:
            raise ValueError(
                f"All data sets of a mixture need a `source` column, or none; {without} do not have one. Train on them "
                "separately, or remove the column."
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def prompt(self, row: int, image: int = 0) -> str:
        source, number = self._source_of(row)
        return source.prompt(number, image)

    def images(self, row: int) -> list[Any]:
        """The undecoded images of a row."""
        source, number = self._source_of(row)
        return source.images(number)

    def mask(self, row: int, image: int) -> Any:
        """The undecoded mask of one of a row's images."""
        source, number = self._source_of(row)
        return source.mask(number, image)

    def edited(self, row: int) -> list[Any]:
        """Return the undecoded images that a row's prompt edits."""
        source, number = self._source_of(row)
        return source.edited(number)

    def noise_seed(self, row: int, image: int) -> int:
        """Return the seed of the noise from which an image was generated."""
        source, number = self._source_of(row)
        return source.noise_seed(number, image)

    def prompts_of_rows(self, rows: np.ndarray, image: int = 0) -> list[str]:
        """Return the prompts of rows, whose numbers are sorted. `image` chooses among two prompts of a row."""
        return [prompt for source, own in self._split(rows) for prompt in source.prompts_of_rows(own, image)]

    def values(self, column: str) -> Iterator[Any]:
        """Yield each row's value of a column."""
        for source in self.sources:
            yield from source.values(column)

    def _split(self, rows: np.ndarray) -> Iterator[tuple[TableSource, np.ndarray]]:
        """Yield each data set with its share of the sorted rows, as numbers within the data set."""
        shares = np.split(rows, np.searchsorted(rows, self._starts[1:-1]))
        for source, share, start in zip(self.sources, shares, self._starts[:-1], strict=True):
            yield source, share - start

    def examine_images(
        self, rows: np.ndarray, reader: ImageReader, decode: bool, num_proc: int | None
    ) -> Iterator[list[tuple[int, int, str]]]:
        """Yield height, width and problem of the images of each of the sorted rows."""
        for source, share in self._split(rows):
            if len(share):
                yield from source.examine_images(share, reader, decode, num_proc)

    def pairs(self, reject: Reject) -> PairTable:
        """Return the pairs of all data sets, repeated by weight. Drops go to `reject`, which may raise."""
        several = len(self.sources) > 1
        tables = []
        for source, start in zip(self.sources, self._starts[:-1], strict=True):
            table, drops = find_pairs(source.labels, source.format)
            for kind, row, reason, amount in drops:
                reject(kind, row + start, f"{reason} ({source.name}, row {row})" if several else reason, amount)
            if several and not len(table):
                raise ValueError(
                    f"Every data set of a mixture must have a pair. The {source.name} data have {len(source)} rows "
                    "and no pair. Check their labels, or leave them out."
                )
            places = table.places + np.array([start, 0, start, 0], dtype=table.places.dtype)
            tables.append(replace(table, places=places))
        return tables[0] if not several else self._mixed(tables)

    def _mixed(self, tables: Sequence[PairTable]) -> PairTable:
        without = [s.name for s, table in zip(self.sources, tables, strict=True) if "scores" not in table.columns]
        if without and len(without) < len(tables):
            raise ValueError(f"All data sets of a mixture need score columns, or none; {without} do not have them.")
        counts = np.array([len(table) for table in tables])
        wanted = counts
        if self._weights is not None:
            weights = np.array(self._weights)
            with np.errstate(over="ignore"):
                exact = np.rint(weights * (counts / weights).max())
            if not exact.sum() <= MAX_GROWTH * counts.sum():  # also if it is NaN
                raise ValueError(
                    f"With these weights an epoch would have {exact.sum():.3g} pairs of the {counts.sum()} of all "
                    f"data sets, more than {MAX_GROWTH} times as many. Give larger sets more weight."
                )
            wanted = exact.astype(np.int64)
        repeated = []
        for source, table, taken in zip(self.sources, tables, wanted.tolist(), strict=True):
            message = "Mixture: the %s data have %d pairs. Each comes %.4g times in an epoch. Their share is %.4g."
            logger.info(message, source.name, len(table), taken / len(table), taken / wanted.sum())
            repeated.append(table.take(np.arange(taken) % len(table)))
        columns = {} if without else {"scores": np.concatenate([table.columns["scores"] for table in repeated])}
        return PairTable(np.concatenate([table.places for table in repeated]), columns)

    def _source_of(self, row: int) -> tuple[TableSource, int]:
        """Return the data set of a row, and the number of the row within it."""
        number = bisect_right(self._starts, row) - 1
        return self.sources[number], row - self._starts[number]


def index_pairs(rows: Iterable[tuple[int, Mapping[str, Any]]], row_format: PreferenceFormat) -> dict[str, list]:
    """Return the pairs and the drops of numbered rows, as `COLUMNS`. Rows of a group must be consecutive."""
    entries: list[tuple] = []

    def reject(kind: str, row: int, reason: str, amount: int) -> None:
        entries.append((row, None, None, None, None, None, kind, reason, amount))

    for group in groups(row_format, rows):
        for *places, scores in pairs_in_group(row_format, group, reject):
            entries.append((*places, *(scores or (None, None)), None, None, None))
    columns = zip(*entries, strict=True) if entries else [()] * len(COLUMNS)
    return {name: list(values) for name, values in zip(COLUMNS, columns, strict=True)}


def find_pairs(labels: datasets.Dataset, row_format: PreferenceFormat) -> tuple[PairTable, list[Drop]]:
    """Return the pairs and the drops of a data set. If the data are on a disk, `datasets` caches the result there.

    Args:
        labels (`datasets.Dataset`): The columns of labels and prompts, without the images.
        row_format (`PreferenceFormat`): Format of the rows.
    """
    code = [Path(file).read_bytes() for file in CODE]
    facts = [dataset_fingerprint(labels), row_format.name, row_format.score_columns, row_format.is_swapped, code]
    options: dict[str, Any] = {
        "with_indices": True,
        "batched": True,
        # Rows of a group may be far apart. One batch of all rows brings them together.
        "batch_size": ROWS_AT_ONCE if row_format.group_column is None else None,
        "remove_columns": labels.column_names,
        "features": COLUMNS,
        "fn_kwargs": {"row_format": row_format},
        "new_fingerprint": Hasher.hash(facts),
        "desc": "Finding pairs",
    }
    try:
        index = labels.map(_index_batch, keep_in_memory=not labels.cache_files, **options)
    except OSError as error:
        logger.warning("The index of the pairs cannot be cached: %s. It is built at every start.", error)
        index = labels.map(_index_batch, keep_in_memory=True, load_from_cache_file=False, **options)
    table = index.with_format("arrow")[:]
    is_pair = table.column("dropped").is_null().to_numpy(zero_copy_only=False)
    pairs, drops = table.filter(is_pair), table.filter(~is_pair)
    kind = np.int32 if len(labels) <= np.iinfo(np.int32).max else np.int64
    places = np.stack([pairs.column(name).to_numpy().astype(kind) for name in PLACES], axis=1)
    scores = np.stack([pairs.column(name).to_numpy() for name in SCORES], axis=1)
    has_scores = len(pairs) > 0 and pairs.column(SCORES[0]).null_count == 0
    listed = [drops.column(name).to_pylist() for name in ("dropped", "winner_row", "reason", "amount")]
    return PairTable(places, {"scores": scores} if has_scores else {}), list(zip(*listed, strict=True))


def _index_batch(batch: Mapping[str, list], numbers: list[int], row_format: PreferenceFormat) -> dict[str, list]:
    names = list(batch)
    rows = [
        (number, dict(zip(names, values, strict=True)))
        for number, values in zip(numbers, zip(*(batch[name] for name in names), strict=True), strict=True)
    ]
    if row_format.group_column is not None:
        first: dict[Any, int] = {}  # group to its position among the groups
        order = [first.setdefault(row[row_format.group_column], len(first)) for _, row in rows]
        rows = [rows[index] for index in np.argsort(order, kind="stable").tolist()]
    return index_pairs(rows, row_format)


def make_source(
    dataset: Any,
    dataset_format: str | None,
    name: str,
    *,
    use_scores: bool = True,
    is_swapped: bool = False,
    number_columns: Sequence[str] = (),
) -> PairSource:
    """Return a data set, a list of dicts or a mixture as a source.

    Raises:
        ValueError: If the data are of another kind, have no rows, or lack one of `number_columns`.
    """
    listed = [(name, dataset, dataset_format)]
    if isinstance(dataset, PairMixture):
        listed = list(dataset.entries(dataset_format, name))
    sources = []
    for label, rows, own_format in listed:
        table = _as_table(rows, own_format, label)
        check_number_columns(number_columns, table.column_names, label)
        row_format = resolve_format(own_format, table.column_names, use_scores=use_scores)
        row_format = without_text_sources(row_format, table.features)
        sources.append(TableSource(table, replace(row_format, is_swapped=is_swapped), label, number_columns))
    return PairSource(sources, dataset.weights if isinstance(dataset, PairMixture) else None)


def check_masks(formats: Sequence[PreferenceFormat], names: Sequence[str]) -> None:
    """Raise `ValueError` if only some of the data sets of a mixture have masks."""
    without = [name for name, each in zip(names, formats, strict=True) if not each.mask_columns]
    if without and len(without) < len(formats):
        raise ValueError(f"All data sets of a mixture need mask columns, or none; {without} do not have them.")


def without_text_sources(row_format: PreferenceFormat, features: Mapping[str, Any] | None) -> PreferenceFormat:
    """Ignore a `source` column of text. Many data sets name there where a row comes from."""
    is_text = getattr((features or {}).get("source"), "dtype", None) in TEXT
    return replace(row_format, source_columns=()) if is_text and "source" in row_format.source_columns else row_format


def _as_table(rows: Any, dataset_format: str | None, name: str) -> datasets.Dataset:
    if isinstance(rows, dict):
        raise ValueError(
            f"The {name} data must be one split, got a {type(rows).__name__} of the splits {list(rows)}. "
            "Pass one of these splits."
        )
    if not isinstance(rows, datasets.Dataset | list | tuple):
        raise ValueError(
            f"The {name} data must be a datasets.Dataset, a datasets.IterableDataset or a list of dicts, got "
            f"{type(rows).__name__}. Load files with `datasets.load_dataset`, and read a torch data set with "
            "`datasets.Dataset.from_generator`."
        )
    if not len(rows):
        raise ValueError(f"The {name} data set is empty: {DataReport(name, dataset_format or 'unknown format')}")
    if not isinstance(rows, datasets.Dataset):
        return _table_of_rows(rows, dataset_format, name)
    if rows.format["type"] == "custom":
        raise ValueError(
            f"Rows must not change between reads. The {name} data have a transform (`set_transform` or "
            "`with_transform`), which could change them. Apply it once with `map`, or remove it with "
            "`with_format(None)`."
        )
    return rows


def _table_of_rows(rows: Sequence[Any], dataset_format: str | None, name: str) -> datasets.Dataset:
    """Return a list of dicts as a table."""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"Rows must be dicts of columns, got {type(row).__name__} at row {number} of the {name} data."
            )
    columns = list(dict.fromkeys(column for row in rows for column in row))
    values = {column: [row.get(column) for row in rows] for column in columns}
    row_format = resolve_format(dataset_format, columns)
    sources = [name for name in row_format.source_columns if not all(isinstance(value, str) for value in values[name])]
    for column in sources:
        if any(isinstance(value, list | tuple) for value in values[column]):  # then a list in every row
            values[column] = [value if isinstance(value, list | tuple) else [value] for value in values[column]]
    for column in (*row_format.image_columns, *row_format.mask_columns, *sources):
        values[column] = [_stored_image(value) for value in values[column]]
    try:
        return datasets.Dataset.from_dict(values)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"Each column of the {name} data must have one kind of values in all rows. A list of dicts has several: "
            f"{error}"
        ) from error


def _stored_image(value: Any) -> Any:
    """Return an image, or a list of images, as Arrow stores them. Images in memory become lossless PNG files."""
    if isinstance(value, list | tuple):
        return [_stored_image(image) for image in value]
    if isinstance(value, Image.Image):
        try:
            content = io.BytesIO()
            decode_image(value).save(content, "PNG", compress_level=1)
            value = content.getvalue()
        except UndecodableImageError as error:
            value = str(error).encode()  # decoding it fails as well
    if isinstance(value, Mapping):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return {"bytes": None, "path": os.fspath(value) if isinstance(value, str | os.PathLike) else None}


def local_names(column: pa.ChunkedArray | pa.Array) -> list[str]:
    """Return the local files that an Arrow column of images names, in the order of the rows."""
    if isinstance(column, pa.ChunkedArray):
        return [name for chunk in column.chunks for name in local_names(chunk)]
    if isinstance(column, pa.ExtensionArray):
        return local_names(column.storage)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return local_names(column.flatten())
    if pa.types.is_struct(column.type):
        fields = [field.name for field in column.type]
        if "path" not in fields:
            return []
        paths = pc.struct_field(column, "path")
        return local_names(paths.filter(pc.is_null(pc.struct_field(column, "bytes"))) if "bytes" in fields else paths)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return []
    return [name for name in column.to_pylist() if name and "://" not in name]


def _file_key(name: str) -> str:
    """Return a text that changes when a local file does. The file is not read."""
    try:
        return repr(file_facts(name))
    except (OSError, ValueError):
        return f"missing {name}"


def pairs_fingerprint(source: PairSource, pairs: PairTable, *, thorough: bool = False) -> dict[str, Any]:
    """Identify pairs.

    Args:
        thorough (`bool`): Whether every prompt and image counts. This is for caches, and belongs to this machine and
            these files. Otherwise the fingerprint is for resuming on any machine: prompts and images of a few pairs
            count, and files by their names.

    Returns:
        `dict[str, Any]`: `format`, `pairs` (their number), `index` (a hash of index and scores), `prompts`, `images`.
    """
    digest = hashlib.sha256(np.ascontiguousarray(pairs.places, dtype="<i8").data)
    if "scores" in pairs.columns:
        digest.update(np.ascontiguousarray(pairs.columns["scores"], dtype="<f8").data)
    facts: dict[str, Any] = {"format": source.format_name, "pairs": len(pairs), "index": _short(digest)}
    if thorough:
        keys = [table.content_key for table in source.sources]
        return {**facts, **{name: [key[name] for key in keys] for name in ("prompts", "images")}}
    prompts, images = hashlib.sha256(), hashlib.sha256()
    for row in pairs.places[evenly_spaced(len(pairs), FINGERPRINTED_PROMPTS), 0].tolist():
        for image in range(1 + source.prompt_of_each_image):
            prompts.update(repr(source.prompt(row, image)).encode() + b"\0")
    for row in pairs.places[evenly_spaced(len(pairs), FINGERPRINTED_IMAGES)][:, [0, 2]].flatten().tolist():
        for value in source.images(row):
            images.update(_content_or_name(value) + b"\0")
    return {**facts, "prompts": _short(prompts), "images": _short(images)}


def _content_or_name(image: Any) -> bytes:
    """Return the bytes of an undecoded image, or the name of its file without folders."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return image.replace("\\", "/").rpartition("/")[2].encode("utf-8", "surrogatepass")
    return image or b""


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]


def _examine_table(
    table: pa.Table, row_format: PreferenceFormat, reader: ImageReader, decode: bool
) -> dict[str, list[list[Any]]]:
    def examine(image: Any) -> tuple[int, int, str]:
        try:
            if decode:
                width, height = reader.decode(image).size
            else:
                height, width = reader.size(image)
        except UndecodableImageError as error:
            return 0, 0, str(error)
        return height, width, ""

    columns = row_format.image_columns
    examined: dict[str, list[list[Any]]] = {name: [] for name in EXAMINED}
    for values in zip(*(map(_value, table.column(name)) for name in columns), strict=True):
        images = images_of_row(dict(zip(columns, values, strict=True)), columns, row_format.images_in_list)
        facts = [examine(image) for image in images]
        for number, name in enumerate(EXAMINED):
            examined[name].append([fact[number] for fact in facts])
    return examined


def _value(scalar: pa.Scalar) -> Any:
    """Convert an Arrow value to Python. Bytes become a view, because `as_py` would read a whole mapped file."""
    if not scalar.is_valid:
        return None
    if pa.types.is_struct(scalar.type):
        return {name: _value(field) for name, field in scalar.items()}
    if pa.types.is_list(scalar.type) or pa.types.is_large_list(scalar.type):
        return [_value(entry) for entry in scalar.values]
    if pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type):
        return memoryview(scalar.as_buffer())
    return scalar.as_py()


def check_number_columns(wanted: Sequence[str], columns: Sequence[str], name: str) -> None:
    """Raise `ValueError` if data lack columns that weights of pairs or seeds of noise are read from."""
    if lacking := [column for column in wanted if column not in columns]:
        setting = "noise_source='generated'" if set(lacking) <= set(SEED_COLUMNS) else "pair_weights"
        raise ValueError(
            f"`{setting}` reads the columns {lacking}. The {name} data have only {list(columns)}. Add the columns, or "
            "choose another value of the setting."
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
                raise LabelError(f"`{column}` must have {width or 'some'} numbers in every row, got {value!r}")
            rows.append(numbers)
        except LabelError as error:
            reasons[row] = str(error)
            rows.append([])
    return np.array([numbers or [np.nan] * width for numbers in rows], dtype=np.float64), reasons


def bad_seeds(values: Iterable[Any], column: str) -> dict[int, str]:
    """Return the reason of each row whose value is no whole number in `[0, 2**63)`, by the row's number."""
    reasons = {}
    for row, value in enumerate(values):
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not is_whole or not 0 <= value < 2**63:
            reasons[row] = f"`{column}` must be the seed of a generator, got {value!r}"
    return reasons


def digest_of(text: str) -> int:
    """Return 64 bits of a text's hash, equal on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)
