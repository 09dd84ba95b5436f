"""Streamed pairs: read, checked and transformed on the way."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .fingerprint import stream_fingerprint
from .formats import PairReference, Reject, groups, image_slots, pairs_in_group, resolve_format
from .report import COUNTS, DataReport, reject
from .transforms import ItemMaker, UndecodableImageError, decode_slot

logger = logging.getLogger(__name__)

_WORKER_SLOTS = 256  # rows of the shared table in which streaming workers count; more workers than this share rows


class PreferenceIterableDataset(IterableDataset):
    """Streamed pairs, made by [`prepare_dataset`]; items as in [`PreferenceDataset`].

    DataLoader workers share the source's shards in the way `datasets` does. `row` is a running number, apart for each
    worker, so that no two pairs of an epoch draw alike. Bad pairs are skipped and counted. Formats that group rows
    expect the rows of a group to follow one another.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        maker: ItemMaker,
        dataset_format: str | None,
        *,
        strict: bool,
        repeat: bool = False,
        use_scores: bool = True,
        name: str,
    ) -> None:
        columns = _stream_columns(source, name)
        self._repeat = repeat
        self._format = resolve_format(dataset_format, columns, use_scores=use_scores)
        self.has_scores = set(self._format.score_columns or ["no"]) <= set(columns)
        self._source, self._maker, self._strict, self._name = source.with_format(None), maker, strict, name
        if source.features is not None:
            read = [*self._format.text_columns(columns), *self._format.image_columns]
            self._source = self._source.decode(False).select_columns(read)
        self._examples: dict[str, list[tuple[int, str]]] = {}
        self._counts = torch.zeros(_WORKER_SLOTS, len(COUNTS), dtype=torch.long).share_memory_()

    @property
    def report(self) -> DataReport:
        """The counts of the current epoch so far, all workers together; examples are of this process alone."""
        counts = dict(zip(COUNTS, self._counts.sum(dim=0).tolist(), strict=True))
        return DataReport(self._name, self._format.name, **counts, examples=self._examples)

    def set_epoch(self, epoch: int) -> None:
        """Changes the draws and, if the stream is shuffled, its order; seen by running DataLoader workers too."""
        self._maker.set_epoch(epoch)
        self._source.set_epoch(epoch)

    def for_evaluation(self) -> "PreferenceIterableDataset":
        """The same stream, once, cut in the middle, with every prompt, under draws that no epoch changes."""
        view = copy.copy(self)
        view._maker = self._maker.for_evaluation()
        view._repeat = False
        return view

    def fingerprint(self) -> dict[str, Any]:
        """What tells this stream from others; see [`stream_fingerprint`]."""
        return stream_fingerprint(self._format.name, self._source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, found = int(self._maker.epoch), True
        while found:
            if self._repeat:
                self._source.set_epoch(epoch)  # this worker's own copy
            found = False
            for item in self._one_pass(epoch):
                found = self._repeat
                yield item
            epoch += 1

    def _one_pass(self, epoch: int) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        report = DataReport(self._name, self._format.name, examples={})
        self._examples, counts = report.examples, self._counts[number % _WORKER_SLOTS]
        if worker is None:
            self._counts.zero_()  # of workers that an earlier loader had
        counts.zero_()
        for position, item in enumerate(self._items(report)):
            counts.copy_(torch.tensor([getattr(report, count) for count in COUNTS]))
            if item is not None:
                winner, loser, prompt, scores = item
                yield self._maker.item(position * workers + number, prompt, winner, loser, scores, epoch)
        counts.copy_(torch.tensor([getattr(report, count) for count in COUNTS]))
        if workers == 1 and not report.pairs:
            raise ValueError(f"The stream ended without a single pair. Check its labels and images.\n{report}")

    def _items(self, report: DataReport) -> Iterator[tuple | None]:
        """One value for each pair that the labels speak of: its images, prompt and scores; `None` if undecodable."""

        def count(kind: str, row: int, reason: str, amount: int) -> None:
            if reject(report, self._strict, kind, row, reason, amount):
                logger.warning("%s data: row %d dropped: %s", self._name, row, reason)

        for group in groups(self._format, _count_rows(self._source, report)):
            rows = dict(group)
            for pair in pairs_in_group(self._format, group, count):
                images = self._images(rows, pair, count)
                report.pairs += images is not None
                yield images and (*images, self._format.prompt(rows[pair.winner_row]), pair.scores)

    def _images(self, rows: dict[int, Mapping], pair: PairReference, count: Reject) -> list[Image.Image] | None:
        images = []
        for row, slot in (pair[:2], pair[2:4]):
            try:
                slots = image_slots(rows[row], self._format.image_columns, self._format.images_in_list)
                images.append(decode_slot(slots, slot))
            except UndecodableImageError as error:
                count("undecodable", row, str(error), 1)
                return None
        return images


def _stream_columns(source: datasets.IterableDataset, name: str) -> list[str]:
    if source.column_names is not None:
        return source.column_names
    first = next(iter(source), None)
    if first is None:
        raise ValueError(f"The {name} data set is empty: {DataReport(name, 'unknown format')}")
    return list(first)


def _count_rows(source: Iterable[Mapping], report: DataReport) -> Iterator[tuple[int, Mapping]]:
    for number, row in enumerate(source):
        report.rows += 1
        yield number, row
