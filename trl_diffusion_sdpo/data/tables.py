"""Map-style sources: their rows, prompts and undecoded images, the index of their pairs (built from the label columns
alone), and the fingerprint by which a resumed run recognizes its data."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from .checking import ROUND_ROWS, DataReport, evenly_spaced
from .columns import NotVectorizedError, check_number_columns, digest_of, digests_of_values, values_of_rows
from .contents import checksum_of_images, checksum_of_prompts, checksum_of_values, pixels_of
from .formats import Reject, groups, images_of_row, pairs_in_group, resolve_format
from .images import MAX_FILE_BYTES, ImageReader, UndecodableImageError, UnreadableImageError, as_undecodable
from .index import PairIndex, find_pairs, index_type
from .kept_index import keep, kept_folder, read_kept

logger = logging.getLogger(__name__)

CHECKED = "Checking images"
FINGERPRINTED_PROMPTS = 16  # pairs whose prompts are hashed
FINGERPRINTED_IMAGES = 4  # pairs whose images are hashed, undecoded
THOROUGHLY = 64  # pairs, of which also files that rows name are read


class OneSource:
    """What a source has in common with a mixture of several."""

    def pairs(self: Any, reject: Reject) -> PairIndex:
        return build_index(self, reject)

    def split(self: Any, rows: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
        yield self, rows


class ArrowSource(OneSource):
    """A `datasets.Dataset`. Images are read as Arrow values, without decoding.

    Attributes:
        fork_safe (`bool`): Whether forked processes can read from their copies of it.
    """

    fork_safe = True

    def __init__(
        self,
        dataset: datasets.Dataset,
        dataset_format: str | None,
        use_scores: bool,
        number_columns: Sequence[str] = (),
    ) -> None:
        self.format = resolve_format(dataset_format, dataset.column_names, use_scores=use_scores)
        texts = dict.fromkeys([*self.format.text_columns(dataset.column_names), *number_columns])
        self._text = dataset.with_format(None).select_columns(list(texts))
        self._images = dataset.with_format("arrow").select_columns(list(self.format.image_columns))

    def __len__(self) -> int:
        return len(self._images)

    @property
    def labels(self) -> datasets.Dataset:
        """The columns from which pairs are found."""
        return self._text

    def text_rows(self, order: np.ndarray | None = None) -> Iterator[tuple[int, Mapping]]:
        text = self._text if order is None else self._text.select(order)
        numbers = iter(range(len(self)) if order is None else order.tolist())
        for batch in text.iter(batch_size=1000):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield next(numbers), dict(zip(columns, values, strict=True))

    def values(self, column: str) -> Iterator[Any]:
        """Each row's value of a column that the format or `number_columns` has."""
        for batch in self._text.select_columns([column]).iter(batch_size=1000):
            yield from batch[column]

    def prompt(self, row: int, image: int = 0) -> str:
        return self.format.prompt(self._text[row], image)

    def prompts(self, rows: np.ndarray, image: int = 0) -> set[str]:
        """The distinct prompts of some rows, whose numbers are sorted; of two in a row, those of an image."""
        columns, found = self.format.read_prompt_columns(self._text.column_names), set[Any]()
        column = columns[min(image, len(columns) - 1)]
        for values in values_of_rows(self._text, column, rows):
            found.update(values.unique().to_pylist())
        return {self.format.prompt({column: value}, image) for value in found}

    def prompt_digests(self, rows: np.ndarray) -> np.ndarray:
        """A digest of the prompt of each of some rows, whose numbers are sorted; of two, that of the first image."""
        column = self.format.prompt_column(self._text.column_names)
        read = values_of_rows(self._text, column, rows)
        return digests_of_values(read, lambda value: self.format.prompt({column: value}))

    def images(self, row: int) -> list[Any]:
        return images_of_row(self._images[row].to_pylist()[0], self.format.image_columns, self.format.images_in_list)

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """Checksums of all prompts and images, as they are when they are asked for first."""
        prompts, images = checksum_of_prompts(self._text, self.format), checksum_of_images(self._images, self.format)
        return {"prompts": prompts, "images": images}

    def check_images(
        self, rows: np.ndarray, reader: ImageReader, num_proc: int | None
    ) -> Iterator[tuple[int, list[str]]]:
        """For each row, the problem of each of its images, or an empty string. The result is cached by `datasets`."""
        text = datasets.Value("string")
        checked = self.map_images(_check_table, rows, reader, text, num_proc=num_proc, batch_size=16, desc=CHECKED)
        numbers = iter(rows.tolist())
        for batch in checked.with_format(None).iter(batch_size=1000):
            for problems in batch["found"]:
                yield next(numbers), problems

    def map_images(
        self, function: Callable, rows: np.ndarray, reader: ImageReader, kind: datasets.Value, **options: Any
    ) -> datasets.Dataset:
        """A table with a list of `kind` for each row, `found`, that a function makes of an Arrow table of rows, the
        names of the image columns, whether they have lists of images, and the reader. Cached by `datasets`."""
        images = self._images if len(rows) == len(self) else self._images.select(rows)
        given = {"columns": self.format.image_columns, "in_list": self.format.images_in_list, "reader": reader}
        features = datasets.Features({"found": datasets.List(kind)})
        if not _holds_bytes(images, self.format.image_columns):
            options["load_from_cache_file"] = False  # `datasets` would not see that a file has changed
        options |= {"features": features, "remove_columns": images.column_names}
        return images.map(function, batched=True, fn_kwargs=given, **options)


def _holds_bytes(images: datasets.Dataset, columns: Sequence[str]) -> bool:
    """Whether the first row has the bytes of its images, rather than the names of files."""
    row = images[0].to_pylist()[0] if len(images) else {}
    values = [value for column in columns for value in _as_list(row.get(column))]
    return all(
        not isinstance(value, str) and (not isinstance(value, Mapping) or value.get("bytes")) for value in values
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class RowSource(OneSource):
    """Any other map-style data set; every read of a row calls its `__getitem__`.

    Attributes:
        fork_safe (`bool`): As in [`ArrowSource`]; false for a user's class, of which it is unknown.
        labels (`None`): There is no table of labels.
    """

    labels = None

    def __init__(self, dataset: Any, dataset_format: str | None, use_scores: bool) -> None:
        self._dataset = dataset
        self.fork_safe = isinstance(dataset, list | tuple)
        self.format = resolve_format(dataset_format, self._row(0), use_scores=use_scores)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def columns(self) -> list[str]:  # of the first row
        return list(self._row(0))

    def text_rows(self, order: np.ndarray | None = None) -> Iterator[tuple[int, Mapping]]:
        for number in range(len(self)) if order is None else order.tolist():
            yield number, self._row(number)

    def values(self, column: str) -> Iterator[Any]:
        """Each row's value of a column."""
        return (row.get(column) for _, row in self.text_rows())

    def prompt(self, row: int, image: int = 0) -> str:
        with _errors_as_undecodable():
            return self.format.prompt(self._row(row), image)

    def prompts(self, rows: np.ndarray, image: int = 0) -> set[str]:
        """The distinct prompts of some rows."""
        return {self.prompt(row, image) for row in rows.tolist()}

    def prompt_digests(self, rows: np.ndarray) -> np.ndarray:
        """A digest of the prompt of each of some rows."""
        return np.array([digest_of(self.prompt(row)) for row in rows.tolist()], dtype=np.int64)

    def images(self, row: int) -> list[Any]:
        with _errors_as_undecodable():
            return images_of_row(self._row(row), self.format.image_columns, self.format.images_in_list)

    @functools.cached_property
    def contents(self) -> dict[str, str] | None:
        """Checksums of all prompts and images, as they are when they are asked for first; `None` of a user's class,
        which may decode or generate a row that is read."""
        if type(self._dataset) not in (list, tuple):
            return None
        columns = self.format.prompt_columns
        prompts = ([repr(row.get(column)).encode() for column in columns] for _, row in self.text_rows())
        images = (self.images(row) for row in range(len(self)))
        return {"prompts": checksum_of_values(prompts), "images": checksum_of_values(images)}

    def check_images(
        self, rows: np.ndarray, reader: ImageReader, num_proc: int | None
    ) -> Iterator[tuple[int, list[str]]]:
        """For each row, the problem of each of its images, or an empty string."""
        problems = self.map_images(reader.problem, rows, num_proc, CHECKED)
        for row, found in zip(rows.tolist(), problems, strict=True):
            yield row, [found] * len(self.format.image_columns) if isinstance(found, str) else found

    def map_images(
        self, function: Callable[[Any], Any], rows: np.ndarray, num_proc: int | None, desc: str
    ) -> Iterator[list[Any] | str]:
        """For each row, what `function` returns of each of its images, or why the row cannot be read."""
        loader = DataLoader(_OfRows(self, rows, function), batch_size=None, num_workers=num_proc or 0)
        yield from tqdm(loader, desc=desc)

    def _row(self, number: int) -> Mapping[str, Any]:
        row = self._dataset[number]
        if not isinstance(row, Mapping):
            raise ValueError(f"Rows must be dicts of columns, got {type(row).__name__} at row {number}.")
        return row


class _OfRows(Dataset):
    """[`RowSource.map_images`] for DataLoader workers."""

    def __init__(self, source: RowSource, rows: np.ndarray, function: Callable[[Any], Any]) -> None:
        self._source, self._rows, self._function = source, rows, function

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Any] | str:
        row = int(self._rows[index])
        try:
            images = self._source.images(row)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"row {row} {error}") from error
        except UndecodableImageError as error:
            return str(error)
        return [self._function(image) for image in images]


@contextlib.contextmanager
def _errors_as_undecodable() -> Iterator[None]:
    """A user's data set may decode in `__getitem__`: whatever it raises makes the row undecodable."""
    try:
        yield
    except Exception as error:
        raise as_undecodable(error, "cannot be read") from error


def make_source(
    dataset: Any, dataset_format: str | None, name: str, use_scores: bool = True, number_columns: Sequence[str] = ()
) -> ArrowSource | RowSource:
    """Rows as a source; `ValueError` if the data are of another kind, have no rows or lack one of `number_columns`."""
    if isinstance(dataset, dict):
        raise ValueError(
            f"The {name} data must be one split, got a {type(dataset).__name__} of the splits {list(dataset)}. "
            "Pass one of its values."
        )
    known = isinstance(dataset, datasets.Dataset | Dataset) or (
        isinstance(dataset, Sequence) and not isinstance(dataset, str | bytes)
    )
    if not known or isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise ValueError(
            f"The {name} data must be a datasets.Dataset, a datasets.IterableDataset, a map-style torch data set with "
            f"a length or a list of dicts, got {type(dataset).__name__}. Load it with `datasets.load_dataset` first."
        )
    if not len(dataset):
        raise ValueError(f"The {name} data set is empty: {DataReport(name, dataset_format or 'unknown format')}")
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        check_number_columns(number_columns, dataset.column_names, name)
        return ArrowSource(dataset, dataset_format, use_scores, number_columns)
    source = RowSource(dataset, dataset_format, use_scores)
    if number_columns:
        check_number_columns(number_columns, source.columns, name)
    return source


def build_index(source: ArrowSource | RowSource, reject: Reject) -> PairIndex:
    """The pairs of a source; bad prompts, bad labels and ties go to `reject`, which may raise.

    The index of data that lie on a disk is kept in the cache of `datasets`, and read by memory map the next time.
    """
    table = source.labels
    if table is None:
        return _index_by_row(source, reject)
    folder = kept_folder(table, source.format)
    found = None if folder is None else read_kept(folder)
    if found is None:
        try:
            found = find_pairs(table, source.format)
        except NotVectorizedError:
            return _index_by_row(source, reject)
        found = found if folder is None else keep(folder, *found)
    for drop in found[1]:
        reject(*drop)
    return found[0].swapped() if source.format.is_swapped else found[0]


def _index_by_row(source: ArrowSource | RowSource, reject: Reject) -> PairIndex:
    index, scores, order = array("q"), array("d"), None
    if source.format.group_column is not None:
        codes: dict[Any, int] = {}
        members = [codes.setdefault(value, len(codes)) for value in source.values(source.format.group_column)]
        order = np.argsort(np.array(members, dtype=np.int64), kind="stable")
    for group in groups(source.format, source.text_rows(order)):
        for pair in pairs_in_group(source.format, group, reject):
            index.extend(pair[:4])
            scores.extend(pair.scores or ())
    pairs = np.array(index, dtype=index_type(len(source))).reshape(-1, 4)
    return PairIndex(pairs, np.array(scores).reshape(-1, 2) if len(scores) else None)


def pairs_fingerprint(
    source: Any, index: np.ndarray, scores: np.ndarray | None, *, thorough: bool = False
) -> dict[str, Any]:
    """Identifies pairs of [`build_index`], equally on every machine, in a time that does not grow with the images.

    Args:
        thorough (`bool`): Whether to hash all prompts and images, with the content of local files that rows name; see
            `contents`. Of a user's class, the images of `THOROUGHLY` pairs instead of a few.

    Returns:
        `dict[str, Any]`: `format`, `pairs` (their number), `index` (a hash of index and scores), `prompts` and
        `images` (hashes of those of a few evenly spaced pairs; `None` where two reads of a row differ).
    """
    digest = hashlib.sha256()
    for start in range(0, len(index), ROUND_ROWS):  # not all of them as 64-bit numbers at once
        digest.update(np.ascontiguousarray(index[start : start + ROUND_ROWS], dtype="<i8").data)
    if scores is not None:
        digest.update(np.ascontiguousarray(scores, dtype="<f8").data)
    found = {"format": source.format.name, "pairs": len(index), "index": _short(digest)}
    contents = [part.contents for part, _ in source.split(np.arange(0))] if thorough else [None]
    if None not in contents:
        return {**found, **{name: [part[name] for part in contents] for name in ("prompts", "images")}}
    prompt_rows = index[evenly_spaced(len(index), FINGERPRINTED_PROMPTS), 0].tolist()
    compared = evenly_spaced(len(index), THOROUGHLY if thorough else FINGERPRINTED_IMAGES)
    image_rows, prompts = index[compared][:, [0, 2]].flatten().tolist(), range(1 + source.format.prompt_of_each_image)
    return {
        **found,
        "prompts": _repeatable_hash(prompt_rows, lambda row: [repr(source.prompt(row, n)).encode() for n in prompts]),
        "images": _repeatable_hash(
            image_rows, lambda row: [_undecoded_bytes(image, thorough) for image in source.images(row)]
        ),
    }


def _repeatable_hash(rows: list[int], read: Callable[[int], list[bytes]]) -> str | None:
    """A hash of what `read` returns for rows; `None` if two calls differ, as with random rows. Of a row that cannot be
    read, only that enters the hash."""

    def content(row: int) -> list[bytes]:
        try:
            return read(row)
        except UndecodableImageError:
            return [b"unreadable"]

    hashes = {_short(hashlib.sha256(b"\0".join(part for row in rows for part in content(row)))) for _ in range(2)}
    return hashes.pop() if len(hashes) == 1 else None


def _undecoded_bytes(image: Any, opens_files: bool) -> bytes:
    """The bytes of an image before decoding; of a path the file name, as folders differ between machines."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        return pixels_of(image)
    if isinstance(image, str):
        if opens_files and os.path.isfile(image):
            with open(image, "rb") as file:
                return file.read(MAX_FILE_BYTES)
        return image.replace("\\", "/").rpartition("/")[2].encode()
    return image if isinstance(image, bytes) else repr(type(image)).encode()


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]


def _check_table(table: Any, columns: Sequence[str], in_list: bool, reader: ImageReader) -> dict[str, list[list[str]]]:
    rows = (images_of_row(row, columns, in_list) for row in table.to_pylist())
    return {"found": [[reader.problem(image) for image in images] for images in rows]}
