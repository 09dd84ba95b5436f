"""Streamed pairs: read, checked and transformed on the way. Of several processes each reads the labels of the whole
stream, and decodes the images of its own pairs only."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .checking import SAMPLED_PAIRS, AlikePairs, same_image
from .fingerprint import stream_fingerprint
from .formats import PairReference, Reject, groups, image_slots, pairs_in_group, resolve_format
from .images import ImageReader, UndecodableImageError
from .report import COUNTS, DataReport, reject
from .transforms import ItemMaker

logger = logging.getLogger(__name__)

_WORKER_SLOTS = 256  # rows of the shared table in which streaming workers count; more workers than this share rows


@dataclass(frozen=True)
class Share:
    """Which pairs of a stream one of several processes takes: they are dealt out in turn, `batch` at a time, so that
    the processes' batches of one step are what one process would have in a batch of all.

    Args:
        index (`int`): Of the process, from 0.
        count (`int`): How many processes there are.
        batch (`int`): Pairs in a process's batch.
        drop_last (`bool`): Leave out the pairs at the end that are not enough for a batch of each process, instead of
            filling up with those of the beginning. Of a stream that repeats, pairs go on into the next pass.
        apart (`bool`): Whether the processes read streams that are apart already: each takes all of its own.
    """

    index: int = 0
    count: int = 1
    batch: int = 1
    drop_last: bool = False
    apart: bool = False

    def takes(self, position: int) -> bool:
        """Whether the pair at a position of the stream is this process's."""
        return self.apart or position // self.batch % self.count == self.index

    def of(self, total: int) -> int:
        """How many pairs each process has of a stream that ended after `total`."""
        rounds, rest = divmod(total, self.batch * self.count)
        return self.batch * (rounds + (rest > 0 and not self.drop_last))


class PreferenceIterableDataset(IterableDataset):
    """Streamed pairs, made by [`prepare_dataset`]; items as in [`PreferenceDataset`].

    DataLoader workers share the source's shards in the way `datasets` does. `row` is a running number, apart for each
    worker, so that no two pairs of an epoch draw alike. Bad pairs are skipped and counted. Formats that group rows
    expect the rows of a group to follow one another.

    Attributes:
        is_split (`bool`): Whether processes read streams that are apart already; to be set by who knows.
    """

    is_split = False

    def __init__(
        self,
        source: datasets.IterableDataset,
        maker: ItemMaker,
        reader: ImageReader,
        dataset_format: str | None,
        *,
        strict: bool,
        repeat: bool = False,
        use_scores: bool = True,
        compare: bool = True,
        name: str,
    ) -> None:
        columns = _stream_columns(source, name)
        self._repeat, self._compare, self._fixed, self._share = repeat, compare, False, Share()
        self._format = resolve_format(dataset_format, columns, use_scores=use_scores)
        self.has_scores = set(self._format.score_columns or ["no"]) <= set(columns)
        self._source, self._maker, self._reader = source.with_format(None), maker, reader
        self._strict, self._name = strict, name
        if source.features is not None:
            read = [*self._format.text_columns(columns), *self._format.image_columns]
            self._source = self._source.decode(False).select_columns(read)
        self._examples: dict[str, list[tuple[int, str]]] = {}
        self._counts = torch.zeros(_WORKER_SLOTS, len(COUNTS), dtype=torch.long).share_memory_()

    @property
    def report(self) -> DataReport:
        """The counts of the current epoch so far, all workers together; examples are of this process alone. Pairs and
        undecodable ones are of this process's share."""
        counts = dict(zip(COUNTS, self._counts.sum(dim=0).tolist(), strict=True))
        return DataReport(self._name, self._format.name, **counts, examples=self._examples)

    def set_epoch(self, epoch: int) -> None:
        """Changes the draws and, if the stream is shuffled, its order; seen by running DataLoader workers too."""
        if not self._fixed:
            self._maker.set_epoch(epoch)
            self._source.set_epoch(epoch)

    def for_evaluation(self) -> "PreferenceIterableDataset":
        """The same stream, once, cut in the middle, with every prompt, under draws that no epoch changes."""
        view = copy.copy(self)
        view._maker, view._repeat, view._fixed = self._maker.for_evaluation(), False, True
        return view

    def for_process(self, share: Share) -> "PreferenceIterableDataset":
        """The same stream, of which one of several processes takes its share."""
        view = copy.copy(self)
        view._share = share
        return view

    def fingerprint(self) -> dict[str, Any]:
        """What tells this stream from others; see [`stream_fingerprint`]."""
        return stream_fingerprint(self._format.name, self._source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._repeat:
            yield from self._once()
            return
        epoch, dealt, found = int(self._maker.epoch), 0, 1
        while found:
            self._source.set_epoch(epoch)  # this worker's own copy
            found = yield from self._one_pass(epoch, dealt)
            dealt, epoch = dealt + found, epoch + 1

    def _once(self) -> Iterator[dict[str, Any]]:
        """One pass, after which all processes have had as many pairs."""
        share, epoch = self._share, int(self._maker.epoch)
        if share.count == 1 or share.apart:
            yield from self._one_pass(epoch, 0)
            return
        first: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []
        yielded, passed = 0, self._one_pass(epoch, 0)
        while True:
            try:
                waiting.append(next(passed))
            except StopIteration as end:
                wanted = share.of(end.value)
                break
            # A batch goes out when the next one begins: of the last one it is not known yet whether it counts.
            if len(waiting) > share.batch:
                first = first or waiting[: share.batch]
                yield from waiting[: share.batch]
                yielded, waiting = yielded + share.batch, waiting[share.batch :]
        filling = [*waiting, *(first or waiting)]
        if not filling and wanted:  # there are fewer pairs than processes
            filling = list(islice(self.for_process(Share())._one_pass(epoch, 0), share.batch))
        for place in range(wanted - yielded):
            yield filling[place % len(filling)]

    def _one_pass(self, epoch: int, dealt: int) -> Iterator[dict[str, Any]]:
        """This process's items of one pass over the stream; returns how many pairs the labels speak of, all processes'
        together. `dealt` are those of earlier passes."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        report = DataReport(self._name, self._format.name, examples={})
        self._examples, counts = report.examples, self._counts[number % _WORKER_SLOTS]
        if worker is None:
            self._counts.zero_()  # of workers that an earlier loader had
        counts.zero_()
        readers = workers  # of streams that are apart, which must not draw alike
        if self._share.apart:
            number, readers = number + workers * self._share.index, workers * self._share.count
        position, taken = -1, 0
        for position, item in enumerate(self._items(report, dealt)):
            counts.copy_(torch.tensor([getattr(report, count) for count in COUNTS]))
            taken += self._share.takes(dealt + position)
            if item is not None:
                winner, loser, prompt, scores = item
                yield self._maker.item(position * readers + number, prompt, winner, loser, scores, epoch)
        counts.copy_(torch.tensor([getattr(report, count) for count in COUNTS]))
        if report.pairs:
            return position + 1
        if workers == 1 and (position < 0 or (taken and (self._repeat or self._share.count == 1))):
            raise ValueError(f"The stream ended without a single pair. Check its labels and images.\n{report}")
        return 0 if taken and self._repeat else position + 1  # again and again it would find nothing

    def _items(self, report: DataReport, dealt: int) -> Iterator[tuple | None]:
        """One value for each pair that the labels speak of: its images, prompt and scores; `None` if it is undecodable
        or another process's."""

        def count(kind: str, row: int, reason: str, amount: int) -> None:
            if reject(report, self._strict, kind, row, reason, amount):
                logger.warning("%s data: row %d dropped: %s", self._name, row, reason)

        alike, position = AlikePairs(self._name), dealt
        for group in groups(self._format, _count_rows(self._source, report)):
            rows = dict(group)
            for pair in pairs_in_group(self._format, group, count):
                images = self._images(rows, pair, count) if self._share.takes(position) else None
                position += 1
                report.pairs += images is not None
                if images is not None and self._compare:
                    alike.add(same_image(*images))
                    self._judge(alike, at_end=False)
                yield images and (*images, self._format.prompt(rows[pair.winner_row]), pair.scores)
        if self._compare:
            self._judge(alike, at_end=True)

    def _judge(self, alike: AlikePairs, *, at_end: bool) -> None:
        """Says whether pairs are twice the same image, once enough are seen; of a part of a few that says nothing."""
        worker = get_worker_info()
        alone = self._share.count == 1 and (worker is None or worker.num_workers == 1)
        if alike.seen >= SAMPLED_PAIRS or (at_end and alone):
            self._compare = False
            alike.judge()

    def _images(self, rows: dict[int, Mapping], pair: PairReference, count: Reject) -> list[Image.Image] | None:
        images = []
        for row, slot in (pair[:2], pair[2:4]):
            try:
                slots = image_slots(rows[row], self._format.image_columns, self._format.images_in_list)
                images.append(self._reader.slot(slots, slot))
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
