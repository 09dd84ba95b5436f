"""Map-style sources: their rows, prompts and undecoded images, the index of their pairs (built from the label columns
alone), and the fingerprint by which a resumed run recognizes its data."""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from .checking import DataReport, evenly_spaced
from .formats import Reject, groups, images_of_row, pairs_in_group, resolve_format
from .images import ImageReader, UndecodableImageError

FINGERPRINTED_PROMPTS = 16  # pairs whose prompts are hashed
FINGERPRINTED_IMAGES = 4  # pairs whose images are hashed, undecoded


class ArrowSource:
    """A `datasets.Dataset`. Images are read as Arrow values, without decoding.

    Attributes:
        fork_safe (`bool`): Whether forked processes can read from their copies of it.
    """

    fork_safe = True

    def __init__(self, dataset: datasets.Dataset, dataset_format: str | None, use_scores: bool) -> None:
        self.format = resolve_format(dataset_format, dataset.column_names, use_scores=use_scores)
        self._text = dataset.with_format(None).select_columns(self.format.text_columns(dataset.column_names))
        self._images = dataset.with_format("arrow").select_columns(list(self.format.image_columns))

    def __len__(self) -> int:
        return len(self._images)

    def text_rows(self, order: np.ndarray | None = None) -> Iterator[tuple[int, Mapping]]:
        text = self._text if order is None else self._text.select(order)
        numbers = iter(range(len(self)) if order is None else order.tolist())
        for batch in text.iter(batch_size=1000):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield next(numbers), dict(zip(columns, values, strict=True))

    def group_values(self, column: str) -> Iterator[Any]:
        for batch in self._text.select_columns([column]).iter(batch_size=1000):
            yield from batch[column]

    def prompt(self, row: int) -> str:
        return self.format.prompt(self._text[row])

    def images(self, row: int) -> list[Any]:
        return images_of_row(self._images[row].to_pylist()[0], self.format.image_columns, self.format.images_in_list)

    def check_images(
        self, rows: np.ndarray, reader: ImageReader, num_proc: int | None
    ) -> Iterator[tuple[int, list[str]]]:
        """For each row, the problem of each of its images, or an empty string. The result is cached by `datasets`."""
        images = self._images if len(rows) == len(self) else self._images.select(rows)
        checked = images.map(
            _check_table,
            batched=True,
            batch_size=16,
            fn_kwargs={"columns": self.format.image_columns, "in_list": self.format.images_in_list, "reader": reader},
            features=datasets.Features({"problems": datasets.List(datasets.Value("string"))}),
            remove_columns=images.column_names,
            num_proc=num_proc,
            desc="Checking images",
        ).with_format(None)
        numbers = iter(rows.tolist())
        for batch in checked.iter(batch_size=1000):
            for problems in batch["problems"]:
                yield next(numbers), problems


class RowSource:
    """Any other map-style data set; every read of a row calls its `__getitem__`.

    Attributes:
        fork_safe (`bool`): As in [`ArrowSource`]; false for a user's class, of which it is unknown.
    """

    def __init__(self, dataset: Any, dataset_format: str | None, use_scores: bool) -> None:
        self._dataset = dataset
        self.fork_safe = isinstance(dataset, list | tuple)
        self.format = resolve_format(dataset_format, self._row(0), use_scores=use_scores)

    def __len__(self) -> int:
        return len(self._dataset)

    def text_rows(self, order: np.ndarray | None = None) -> Iterator[tuple[int, Mapping]]:
        for number in range(len(self)) if order is None else order.tolist():
            yield number, self._row(number)

    def group_values(self, column: str) -> Iterator[Any]:
        return (row.get(column) for _, row in self.text_rows())

    def prompt(self, row: int) -> str:
        with _errors_as_undecodable():
            return self.format.prompt(self._row(row))

    def images(self, row: int) -> list[Any]:
        with _errors_as_undecodable():
            return images_of_row(self._row(row), self.format.image_columns, self.format.images_in_list)

    def check_images(
        self, rows: np.ndarray, reader: ImageReader, num_proc: int | None
    ) -> Iterator[tuple[int, list[str]]]:
        """For each row, the problem of each of its images, or an empty string."""
        problems = DataLoader(_Problems(self, rows, reader), batch_size=None, num_workers=num_proc or 0)
        yield from zip(rows.tolist(), tqdm(problems, desc="Checking images"), strict=True)

    def _row(self, number: int) -> Mapping[str, Any]:
        row = self._dataset[number]
        if not isinstance(row, Mapping):
            raise ValueError(f"Rows must be dicts of columns, got {type(row).__name__} at row {number}.")
        return row


class _Problems(Dataset):
    """The problems of each row's images, for DataLoader workers."""

    def __init__(self, source: RowSource, rows: np.ndarray, reader: ImageReader) -> None:
        self._source, self._rows, self._reader = source, rows, reader

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[str]:
        try:
            images = self._source.images(int(self._rows[index]))
        except UndecodableImageError as error:
            return [str(error)] * len(self._source.format.image_columns)
        return [self._reader.problem(image) for image in images]


@contextlib.contextmanager
def _errors_as_undecodable() -> Iterator[None]:
    """A user's data set may decode in `__getitem__`: whatever it raises makes the row undecodable."""
    try:
        yield
    except Exception as error:
        raise UndecodableImageError(f"cannot be read ({type(error).__name__}: {error})") from error


def make_source(
    dataset: Any, dataset_format: str | None, name: str, use_scores: bool = True
) -> ArrowSource | RowSource:
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
        return ArrowSource(dataset, dataset_format, use_scores)
    return RowSource(dataset, dataset_format, use_scores)


def build_index(source: ArrowSource | RowSource, reject: Reject) -> tuple[np.ndarray, np.ndarray | None]:
    """The pairs of a source.

    Returns:
        `tuple`: The index, int64 of shape `(P, 4)` with the columns winner row, winner image, loser row, loser image,
        and reward scores of shape `(P, 2)`, or `None`.
    """
    index, scores, order = array("q"), array("d"), None
    if source.format.group_column is not None:
        codes: dict[Any, int] = {}
        members = [codes.setdefault(value, len(codes)) for value in source.group_values(source.format.group_column)]
        order = np.argsort(np.array(members, dtype=np.int64), kind="stable")
    for group in groups(source.format, source.text_rows(order)):
        for pair in pairs_in_group(source.format, group, reject):
            index.extend(pair[:4])
            scores.extend(pair.scores or ())
    table = np.array(index, dtype=np.int64).reshape(-1, 4)
    return table, np.array(scores).reshape(-1, 2) if len(scores) else None


def pairs_fingerprint(source: ArrowSource | RowSource, index: np.ndarray, scores: np.ndarray | None) -> dict[str, Any]:
    """Identifies pairs of [`build_index`], equally on every machine, in a time that does not grow with the images.

    Returns:
        `dict[str, Any]`: `format`, `pairs` (their number), `index` (a hash of index and scores), `prompts` and
        `images` (hashes of those of a few evenly spaced pairs; `None` where two reads of a row differ).
    """
    digest = hashlib.sha256(np.ascontiguousarray(index, dtype="<i8").data)
    if scores is not None:
        digest.update(np.ascontiguousarray(scores, dtype="<f8").data)
    prompt_rows = index[evenly_spaced(len(index), FINGERPRINTED_PROMPTS), 0].tolist()
    image_rows = index[evenly_spaced(len(index), FINGERPRINTED_IMAGES)][:, [0, 2]].flatten().tolist()
    return {
        "format": source.format.name,
        "pairs": len(index),
        "index": _short(digest),
        "prompts": _repeatable_hash(lambda: [repr(source.prompt(row)).encode() for row in prompt_rows]),
        "images": _repeatable_hash(
            lambda: [_undecoded_bytes(image) for row in image_rows for image in source.images(row)]
        ),
    }


def stream_fingerprint(format_name: str, source: datasets.IterableDataset) -> dict[str, Any]:
    """Identifies a stream by its metadata. No row is read: a shuffled stream would fill its buffer for the first one.

    Returns:
        `dict[str, Any]`: `format`, `columns`, `split` and `shards`.
    """
    return {
        "format": format_name,
        "columns": None if source.column_names is None else sorted(source.column_names),
        "split": None if source.split is None else str(source.split),
        "shards": source.num_shards,
    }


def _repeatable_hash(read: Callable[[], list[bytes]]) -> str | None:
    """A hash of what `read` returns; `None` if it fails or differs between two calls, as with random rows."""
    try:
        hashes = {_short(hashlib.sha256(b"\0".join(read()))) for _ in range(2)}
    except UndecodableImageError:
        return None
    return hashes.pop() if len(hashes) == 1 else None


def _undecoded_bytes(image: Any) -> bytes:
    """The bytes of an image before decoding; of a path the file name, as folders differ between machines."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        return repr((image.mode, image.size)).encode() + image.tobytes()
    if isinstance(image, str):
        return image.replace("\\", "/").rpartition("/")[2].encode()
    return image if isinstance(image, bytes) else repr(type(image)).encode()


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]


def _check_table(table: Any, columns: Sequence[str], in_list: bool, reader: ImageReader) -> dict[str, list[list[str]]]:
    rows = (images_of_row(row, columns, in_list) for row in table.to_pylist())
    return {"problems": [[reader.problem(image) for image in images] for images in rows]}
