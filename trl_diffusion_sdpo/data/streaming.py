"""Streamed pairs, checked and transformed as they are read. Each of several processes reads the labels of the whole
stream, and decodes the images of its own pairs only."""

import copy
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .checking import COUNTS, SAMPLED_PAIRS, DataReport, IdenticalPairs, reject, same_image
from .formats import PairReference, Reject, groups, images_of_row, pairs_in_group, resolve_format
from .images import ImageReader, UndecodableImageError
from .sources import stream_fingerprint
from .transforms import ItemMaker

logger = logging.getLogger(__name__)

_COUNTER_ROWS = 256  # rows of the shared table in which workers count; more workers than this share rows


@dataclass(frozen=True)
class Share:
    """The pairs of a stream that one process takes: `batch` consecutive ones in turn, so that the processes' batches of
    a step together are the batch of a single process.

    Args:
        index (`int`): Rank of the process, from 0.
        count (`int`): Number of processes.
        batch (`int`): Pairs in a process's batch.
        drop_last (`bool`): Drop an incomplete last round of batches instead of filling it with pairs of the beginning.
            The pairs of a stream that repeats continue into the next pass.
        is_split (`bool`): Whether the processes read different streams already: each takes all pairs of its own.
    """

    index: int = 0
    count: int = 1
    batch: int = 1
    drop_last: bool = False
    is_split: bool = False

    def takes(self, position: int) -> bool:
        """Whether this process takes the pair at a position of the stream."""
        return self.is_split or position // self.batch % self.count == self.index

    def pairs_of(self, total: int) -> int:
        """Number of pairs that each process has of a stream that ended after `total`."""
        rounds, rest = divmod(total, self.batch * self.count)
        return self.batch * (rounds + (rest > 0 and not self.drop_last))


class PreferenceIterableDataset(IterableDataset):
    """Streamed pairs, made by [`prepare_dataset`]; items as in [`PreferenceDataset`].

    DataLoader workers divide the source's shards as in `datasets`. `row` is a running number, different for every
    worker, so that no two pairs of an epoch have the same random numbers. Bad pairs are skipped and counted. Formats
    that group rows expect the rows of a group to be consecutive.

    Attributes:
        is_split (`bool`): Whether the processes read different streams already; set by the trainer.
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
        self._counts = torch.zeros(_COUNTER_ROWS, len(COUNTS), dtype=torch.long).share_memory_()

    @property
    def report(self) -> DataReport:
        """The counts of the current epoch so far, of all workers; examples are of this process alone. Pairs and
        undecodable pairs are counted in this process's share only."""
        counts = dict(zip(COUNTS, self._counts.sum(dim=0).tolist(), strict=True))
        return DataReport(self._name, self._format.name, **counts, examples=self._examples)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that random numbers and a shuffled stream's order depend on, also in running workers."""
        if not self._fixed:
            self._maker.set_epoch(epoch)
            self._source.set_epoch(epoch)

    def for_evaluation(self) -> "PreferenceIterableDataset":
        """One pass over this stream, center-cropped, with every prompt and seeds that do not depend on the epoch."""
        view = copy.copy(self)
        view._maker, view._repeat, view._fixed = self._maker.for_evaluation(), False, True
        return view

    def for_process(self, share: Share) -> "PreferenceIterableDataset":
        """The same stream, limited to the share of one of several processes."""
        view = copy.copy(self)
        view._share = share
        return view

    def fingerprint(self) -> dict[str, Any]:
        """Identifies this stream; see [`stream_fingerprint`]."""
        return stream_fingerprint(self._format.name, self._source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._repeat:
            yield from self._once()
            return
        epoch, seen, found = int(self._maker.epoch), 0, 1
        while found:
            self._source.set_epoch(epoch)  # of this worker's copy
            found = yield from self._one_pass(epoch, seen)
            seen, epoch = seen + found, epoch + 1

    def _once(self) -> Iterator[dict[str, Any]]:
        """One pass in which all processes yield equally many pairs."""
        share, epoch = self._share, int(self._maker.epoch)
        if share.count == 1 or share.is_split:
            yield from self._one_pass(epoch, 0)
            return
        first: list[dict[str, Any]] = []
        pending: list[dict[str, Any]] = []
        yielded, items = 0, self._one_pass(epoch, 0)
        while True:
            try:
                pending.append(next(items))
            except StopIteration as end:
                wanted = share.pairs_of(end.value)
                break
            # A batch is yielded once the next one has begun: `drop_last` may drop the last one.
            if len(pending) > share.batch:
                first = first or pending[: share.batch]
                yield from pending[: share.batch]
                yielded, pending = yielded + share.batch, pending[share.batch :]
        filling = [*pending, *(first or pending)]
        if not filling and wanted:  # there are fewer pairs than processes
            filling = list(islice(self.for_process(Share())._one_pass(epoch, 0), share.batch))
        for index in range(wanted - yielded):
            yield filling[index % len(filling)]

    def _one_pass(self, epoch: int, start: int) -> Generator[dict[str, Any], None, int]:
        """This process's items of one pass over the stream; returns the number of labelled pairs of all processes.
        `start` is the number of those in earlier passes."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        report = DataReport(self._name, self._format.name, examples={})
        self._examples, counts = report.examples, self._counts[number % _COUNTER_ROWS]
        if worker is None:
            self._counts.zero_()  # of an earlier loader's workers
        counts.zero_()
        readers = workers  # number of different streams, whose pairs must not have the same random numbers
        if self._share.is_split:
            number, readers = number + workers * self._share.index, workers * self._share.count
        position, taken = -1, 0
        for position, item in enumerate(self._items(report, start)):
            counts.copy_(torch.tensor([getattr(report, count) for count in COUNTS]))
            taken += self._share.takes(start + position)
            if item is not None:
                winner, loser, prompt, scores = item
                yield self._maker.item(position * readers + number, prompt, winner, loser, scores, epoch)
        counts.copy_(torch.tensor([getattr(report, count) for count in COUNTS]))
        if report.pairs:
            return position + 1
        if workers == 1 and (position < 0 or (taken and (self._repeat or self._share.count == 1))):
            raise ValueError(f"The stream ended without a single pair. Check its labels and images.\n{report}")
        return 0 if taken and self._repeat else position + 1  # 0 ends the repetition: no image could be decoded

    def _items(self, report: DataReport, start: int) -> Iterator[tuple | None]:
        """Images, prompt and scores of each labelled pair; `None` if it is undecodable or of another process."""

        def count(kind: str, row: int, reason: str, amount: int) -> None:
            if reject(report, self._strict, kind, row, reason, amount):
                logger.warning("%s data: row %d dropped: %s", self._name, row, reason)

        identical, position = IdenticalPairs(self._name), start
        for group in groups(self._format, _count_rows(self._source, report)):
            rows = dict(group)
            for pair in pairs_in_group(self._format, group, count):
                images = self._images(rows, pair, count) if self._share.takes(position) else None
                position += 1
                report.pairs += images is not None
                if images is not None and self._compare:
                    identical.add(same_image(*images))
                    self._verify_different(identical, at_end=False)
                prompt = self._format.prompt(rows[pair.winner_row])
                yield None if images is None else (*images, prompt, pair.scores)
        if self._compare:
            self._verify_different(identical, at_end=True)

    def _verify_different(self, identical: IdenticalPairs, *, at_end: bool) -> None:
        """Verifies once that pairs are not identical, after enough of them; the few of one worker among several at the
        end of a short stream are not enough."""
        worker = get_worker_info()
        alone = self._share.count == 1 and (worker is None or worker.num_workers == 1)
        if identical.checked >= SAMPLED_PAIRS or (at_end and alone):
            self._compare = False
            identical.verify()

    def _images(self, rows: dict[int, Mapping], pair: PairReference, count: Reject) -> list[Image.Image] | None:
        images = []
        for row, image in (pair[:2], pair[2:4]):
            try:
                stored = images_of_row(rows[row], self._format.image_columns, self._format.images_in_list)
                images.append(self._reader.decode_at(stored, image))
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
