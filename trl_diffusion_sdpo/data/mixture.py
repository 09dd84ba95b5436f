"""Several data sets of pairs as one."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from .checking import DataReport
from .formats import PreferenceFormat, Reject
from .images import ImageReader
from .index import PairIndex, index_type
from .tables import ArrowSource, RowSource

logger = logging.getLogger(__name__)

MAX_GROWTH = 100  # pairs of an epoch, of those of all data sets


@dataclass(frozen=True)
class PairMixture:
    """Several data sets of pairs that are trained on together, each in a format of its own.

    Args:
        datasets (`Sequence` or `Mapping`): The data sets, all of them map-style or all of them streams; a mapping's
            keys name them in messages.
        weights (`Sequence` of `float`, positive, *optional*): How often a pair is of each data set, as shares of their
            sum. Map-style sets are repeated until an epoch has these shares, with all pairs of every set in it;
            repeated pairs have random numbers of their own. Streams begin again when they end, until all have ended
            once. By default every pair comes once, and streams have equal weights.
        formats (`Sequence` of `str` or `None`, *optional*): A key of `FORMATS` for each; detected by default.

    Raises:
        ValueError: If there are no data sets, or weights or formats are of another number or not as described.
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
                    f"`weights` must be finite numbers above 0, got {weight!r}. Leave out what is not wanted."
                )
        kinds = {isinstance(dataset, datasets.IterableDataset) for dataset in self.parts.values()}
        if len(kinds) > 1:
            raise ValueError(
                "A mixture is of streams or of map-style data sets, got both. Load all with the same `streaming`."
            )

    @property
    def parts(self) -> dict[str, Any]:
        """The data sets by their names."""
        named = self.datasets
        return dict(named) if isinstance(named, Mapping) else {f"set {i}": part for i, part in enumerate(named)}

    @property
    def is_stream(self) -> bool:
        """Whether the data sets are streams."""
        return isinstance(next(iter(self.parts.values())), datasets.IterableDataset)

    def format_of(self, number: int, default: str | None) -> str | None:
        """The format of a data set as it was given."""
        return default if self.formats is None else self.formats[number] or default


class MixedSource:
    """Several map-style sources as one, whose rows follow one another, and whose pairs are repeated by weight.

    Attributes:
        reports (`list[DataReport]`): The counts of each source, its pairs without repetition.
    """

    def __init__(self, sources: Mapping[str, ArrowSource | RowSource], weights: Sequence[float] | None) -> None:
        self._names, self._sources, self._weights = list(sources), list(sources.values()), weights
        self._starts = np.cumsum([0, *(len(source) for source in self._sources)])
        self.format = MixedFormat(tuple(source.format for source in self._sources))
        self.fork_safe = all(source.fork_safe for source in self._sources)
        self.reports: list[DataReport] = []

    def __len__(self) -> int:
        return int(self._starts[-1])

    def prompt(self, row: int, image: int = 0) -> str:
        source, within = self._find(row)
        return source.prompt(within, image)

    def prompts(self, rows: np.ndarray, image: int = 0) -> set[str]:
        """The distinct prompts of some rows, whose numbers are sorted."""
        return {prompt for source, own in self.split(rows) for prompt in source.prompts(own, image)}

    def prompt_digests(self, rows: np.ndarray) -> np.ndarray:
        """A digest of the prompt of each of some rows, whose numbers are sorted."""
        return np.concatenate([source.prompt_digests(own) for source, own in self.split(rows)])

    def images(self, row: int) -> list[Any]:
        source, within = self._find(row)
        return source.images(within)

    def text_rows(self) -> Iterator[tuple[int, Any]]:
        """All rows, each with its number and, for `format`, that of its source."""
        for number, (source, start) in enumerate(zip(self._sources, self._starts, strict=False)):
            yield from ((int(start) + row, (number, values)) for row, values in source.text_rows())

    def values(self, column: str) -> Iterator[Any]:
        """Each row's value of a column."""
        for source in self._sources:
            yield from source.values(column)

    def split(self, rows: np.ndarray) -> Iterator[tuple[ArrowSource | RowSource, np.ndarray]]:
        """Each source with those of the sorted rows that are its own, by their numbers within it."""
        shares = np.split(rows, np.searchsorted(rows, self._starts[1:-1]))
        for source, own, start in zip(self._sources, shares, self._starts[:-1], strict=True):
            yield source, own - start

    def check_images(
        self, rows: np.ndarray, reader: ImageReader, num_proc: int | None
    ) -> Iterator[tuple[int, list[str]]]:
        for number, (source, own) in enumerate(self.split(rows)):
            if len(own):
                found = source.check_images(own, reader, num_proc)
                yield from ((row + int(self._starts[number]), problems) for row, problems in found)

    def pairs(self, reject: Reject) -> PairIndex:
        """The pairs of all sources; see [`~trl_diffusion_sdpo.data.tables.build_index`]."""
        found = [self._pairs_of(number, reject) for number in range(len(self._sources))]
        if len({part.scores is None for part in found}) > 1:
            has, lacks = (
                [name for name, part in zip(self._names, found, strict=True) if (part.scores is None) == without]
                for without in (False, True)
            )
            raise ValueError(
                f"All data sets of a mixture need score columns, or none; {has} have them, {lacks} do not."
            )
        counts = np.array([len(part.pairs) for part in found])
        wanted = counts
        if self._weights is not None:
            weights = np.array(self._weights)
            with np.errstate(over="ignore"):
                wanted = np.rint(weights * (counts / weights).max())
            if not wanted.sum() <= MAX_GROWTH * counts.sum():  # also where it is no number
                raise ValueError(
                    f"With these weights an epoch would have {wanted.sum():.3g} pairs of the {counts.sum()} of all "
                    f"data sets, more than {MAX_GROWTH} times as many. Give larger sets more weight."
                )
            wanted = wanted.astype(np.int64)
        for name, count, taken in zip(self._names, counts, wanted, strict=True):
            message = "Mixture: %s: %d pairs, %.4g times in an epoch: %.4g of its pairs."
            logger.info(message, name, count, taken / count, taken / wanted.sum())
        chosen = [np.arange(taken) % count for count, taken in zip(counts, wanted, strict=True)]
        pairs = np.concatenate([part.pairs[rows] for part, rows in zip(found, chosen, strict=True)])
        scores = [part.scores[rows] for part, rows in zip(found, chosen, strict=True) if part.scores is not None]
        return PairIndex(pairs, np.concatenate(scores) if scores else None)

    def _pairs_of(self, number: int, reject: Reject) -> PairIndex:
        source, start = self._sources[number], int(self._starts[number])
        report = DataReport(
            self._names[number], source.format.name, is_swapped=source.format.is_swapped, rows=len(source)
        )

        def both(kind: str, row: int, reason: str, amount: int) -> None:
            report.add(kind, row, reason, amount)
            reject(kind, row + start, f"{reason} ({report.name}, row {row})", amount)

        found = source.pairs(both)
        report.pairs = len(found.pairs)
        self.reports.append(report)
        if not report.pairs:
            raise ValueError(
                f"No pair is left of a data set of the mixture. Leave it out, or check its labels.\n{report}"
            )
        logger.log(logging.WARNING if report.dropped else logging.INFO, "%s", report)
        pairs = found.pairs + np.array([start, 0, start, 0])
        return PairIndex(pairs.astype(index_type(len(self))), found.scores)

    def _find(self, row: int) -> tuple[ArrowSource | RowSource, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._sources[number], row - int(self._starts[number])


@dataclass(frozen=True)
class MixedFormat:
    """The formats of a mixture, which read a row together with the number of its source."""

    formats: tuple[PreferenceFormat, ...]

    @property
    def name(self) -> str:
        return "+".join(known.name for known in self.formats)

    @property
    def is_swapped(self) -> bool:
        return any(known.is_swapped for known in self.formats)

    @property
    def prompt_of_each_image(self) -> bool:
        """Whether a format has one: the other formats' images then have that of their row, twice."""
        return any(known.prompt_of_each_image for known in self.formats)

    @property
    def has_losers(self) -> bool:
        return all(known.has_losers for known in self.formats)

    def prompt(self, row: tuple[int, Mapping[str, Any]]) -> str:
        return self.formats[row[0]].prompt(row[1])


Source = ArrowSource | RowSource | MixedSource  # what pairs are read from
