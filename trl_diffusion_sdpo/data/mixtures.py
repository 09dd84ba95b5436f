"""Several data sets of pairs to train on together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..utils.errors import UserError
from ..utils.score_scale import SCALE_COLUMN
from .formats import PreferenceFormat
from .pair_table import PairTable

MAX_GROWTH = 100  # most pairs of a weighted epoch, as a multiple of all data sets'


@dataclass(frozen=True)
class PairMixture:
    """Several data sets of pairs to train on together, each in its own format.

    Args:
        datasets (`Sequence` or `Mapping`): The data sets, all map-style or all streams. The keys of a mapping name them
            in messages.
        weights (`Sequence` of `float`, positive, *optional*): Shares of the data sets in an epoch. Map-style pairs are
            repeated, with other random numbers, until an epoch has these shares and every pair. Streams restart until
            each has ended once. By default, an epoch has every map-style pair once, and streams have equal weights.
        formats (`Sequence` of `str` or `None`, *optional*): A key of `FORMATS` for each data set, by default detected
            from its columns.

    Raises:
        ValueError: If there are no data sets, or weights or formats are invalid.
    """

    datasets: Sequence[Any] | Mapping[str, Any]
    weights: Sequence[float] | None = None
    formats: Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        count = len(self.datasets)
        if not count:
            raise UserError("A mixture needs at least one data set, got none.")
        for name, values in (("weights", self.weights), ("formats", self.formats)):
            if values is not None and len(values) != count:
                raise UserError(f"`{name}` must have one entry for each of the {count} data sets, got {values!r}.")
        if not all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in self.weights or ()):
            raise UserError(f"`weights` must be above 0, got {self.weights!r}. Remove data sets without weight.")
        kinds = {isinstance(dataset, datasets.IterableDataset) for dataset in self.by_name.values()}
        if len(kinds) > 1:
            raise UserError(
                "A mixture must have only streams or only map-style data sets, got both. Load all data sets with "
                "the same `streaming`."
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
        """Yield the name, for messages, the rows and the format of each data set."""
        formats = self.formats or [None] * len(self.datasets)
        for (label, dataset), set_format in zip(self.by_name.items(), formats, strict=True):
            yield f"{name} ({label})", dataset, set_format or dataset_format


def repeat_by_weight(tables: Sequence[PairTable], weights: Sequence[float]) -> list[PairTable]:
    """Repeat pairs so that every data set has its share of an epoch, and every pair is in it.

    Raises:
        ValueError: If an epoch would have more than `MAX_GROWTH` times the pairs of all data sets.
    """
    counts = np.array([len(pairs) for pairs in tables])
    shares = np.array(weights)
    numbers = np.rint(shares * (counts / shares).max())
    if not numbers.sum() <= MAX_GROWTH * counts.sum():
        raise UserError(
            f"With `weights={weights}`, an epoch would have {numbers.sum():.3g} pairs, more than {MAX_GROWTH} times "
            f"the pairs of all data sets ({counts.tolist()}). Choose weights that are nearer to these numbers."
        )
    wanted = numbers.astype(np.int64).tolist()
    return [pairs.take(np.arange(count) % len(pairs)) for pairs, count in zip(tables, wanted, strict=True)]


def mixed(
    streams: Sequence[Callable[[], Iterator[Any]]],
    weights: Sequence[float],
    generator: np.random.Generator,
    *,
    restart: bool,
) -> Iterator[tuple[int, Any]]:
    """Yield groups of rows from streams in random order, each with the number of its stream.

    A stream is drawn in proportion to its weight. With `restart`, streams restart until each has ended at least once.
    `datasets.interleave_datasets` does this for single rows of streams with equal columns, and would split groups of
    rows that are compared with one another.

    Args:
        streams (`Sequence[Callable]`): For each stream, a function that begins to read it.
    """
    iterators = [begin() for begin in streams]
    shares = np.array(weights)
    ended = np.zeros(len(streams), dtype=bool)
    while shares.any():
        number = int(np.searchsorted(np.cumsum(shares), generator.random() * shares.sum(), side="right"))
        group = next(iterators[number], None)
        if group is None:
            ended[number] = True
            if ended.all():
                return
            if restart:
                iterators[number] = streams[number]()
                group = next(iterators[number], None)
        if group is None:
            shares[number] = 0.0  # the stream ended in an evaluation, or this worker has no shard of the stream
            continue
        yield number, group


def check_formats(formats: Mapping[str, PreferenceFormat]) -> None:
    """Raise `ValueError` if only some data sets of a mixture have scores, masks or source images. The keys of `formats`
    name them."""
    has_it = {
        "score columns": {name: bool(row_format.score_columns) for name, row_format in formats.items()},
        f"`{SCALE_COLUMN}`": {name: bool(row_format.scale_column) for name, row_format in formats.items()},
        "mask columns": {name: bool(row_format.mask_columns) for name, row_format in formats.items()},
        "a `source` column": {name: bool(row_format.source_columns) for name, row_format in formats.items()},
    }
    for what, present in has_it.items():
        without = [name for name, has in present.items() if not has]
        if without and len(without) < len(present):
            raise UserError(
                f"All data sets of a mixture must have {what}, or none. Data sets without {what}: {without}."
            )
