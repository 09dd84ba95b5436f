"""Reads rows, prompts and undecoded images from map-style data, and builds the index of their pairs from the label
columns alone."""

import contextlib
from array import array
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from .formats import Reject, groups, image_slots, pairs_in_group, resolve_format
from .images import ImageReader, UndecodableImageError
from .report import DataReport


class ArrowSource:
    """A `datasets.Dataset`. Images are read as Arrow values, which nothing decodes.

    Attributes:
        forks (`bool`): Whether processes can read from copies of it that were made by forking.
    """

    forks = True

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
        return image_slots(self._images[row].to_pylist()[0], self.format.image_columns, self.format.images_in_list)

    def check_images(
        self, rows: np.ndarray, reader: ImageReader, num_proc: int | None
    ) -> Iterator[tuple[int, list[str]]]:
        """What is wrong with each image of the rows; an empty string if nothing. The result is cached by `datasets`."""
        images = self._images if len(rows) == len(self) else self._images.select(rows)
        checked = images.map(
            _check_table,
            batched=True,
            batch_size=16,
            fn_kwargs={
                "image_columns": self.format.image_columns,
                "in_list": self.format.images_in_list,
                "reader": reader,
            },
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
    """Any other map-style data set; every look at a row is a call to its `__getitem__`.

    Attributes:
        forks (`bool`): As in [`ArrowSource`]; of a class that is not ours nobody knows.
    """

    def __init__(self, dataset: Any, dataset_format: str | None, use_scores: bool) -> None:
        self._dataset = dataset
        self.forks = isinstance(dataset, list | tuple)
        self.format = resolve_format(dataset_format, self._row(0), use_scores=use_scores)

    def __len__(self) -> int:
        return len(self._dataset)

    def text_rows(self, order: np.ndarray | None = None) -> Iterator[tuple[int, Mapping]]:
        for number in range(len(self)) if order is None else order.tolist():
            yield number, self._row(number)

    def group_values(self, column: str) -> Iterator[Any]:
        return (row.get(column) for _, row in self.text_rows())

    def prompt(self, row: int) -> str:
        with _one_bad_row():
            return self.format.prompt(self._row(row))

    def images(self, row: int) -> list[Any]:
        with _one_bad_row():
            return image_slots(self._row(row), self.format.image_columns, self.format.images_in_list)

    def check_images(
        self, rows: np.ndarray, reader: ImageReader, num_proc: int | None
    ) -> Iterator[tuple[int, list[str]]]:
        """What is wrong with each image of the rows; an empty string if nothing."""
        problems = DataLoader(_Problems(self, rows, reader), batch_size=None, num_workers=num_proc or 0)
        yield from zip(rows.tolist(), tqdm(problems, desc="Checking images"), strict=True)

    def _row(self, number: int) -> Mapping[str, Any]:
        row = self._dataset[number]
        if not isinstance(row, Mapping):
            raise ValueError(f"Rows must be dicts of columns, got {type(row).__name__} at row {number}.")
        return row


class _Problems(Dataset):
    """What is wrong with the images of each row, for a DataLoader's workers."""

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
def _one_bad_row() -> Iterator[None]:
    """Has whatever a class of its user's raises be one row that cannot be used, as it may decode by itself."""
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
    """Places of all pairs, int64 of shape (P, 4) as in `PairReference`, and their scores of shape (P, 2) or `None`."""
    places, scores, order = array("q"), array("d"), None
    if source.format.group_column is not None:
        codes: dict[Any, int] = {}
        members = [codes.setdefault(value, len(codes)) for value in source.group_values(source.format.group_column)]
        order = np.argsort(np.array(members, dtype=np.int64), kind="stable")
    for group in groups(source.format, source.text_rows(order)):
        for pair in pairs_in_group(source.format, group, reject):
            places.extend(pair[:4])
            scores.extend(pair.scores or ())
    table = np.array(places, dtype=np.int64).reshape(-1, 4)
    return table, np.array(scores).reshape(-1, 2) if len(scores) else None


def _check_table(
    table: Any, image_columns: Sequence[str], in_list: bool, reader: ImageReader
) -> dict[str, list[list[str]]]:
    rows = (image_slots(row, image_columns, in_list) for row in table.to_pylist())
    return {"problems": [[reader.problem(image) for image in images] for images in rows]}
