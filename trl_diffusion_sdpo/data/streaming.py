"""Streamed pairs, checked and transformed as they are read. Each of several processes reads the labels of the whole
stream, and decodes the images of its own pairs only."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ..utils._compat import is_split_by_node
from .checking import COUNTS, SAMPLED_PAIRS, BadDataError, DataReport, IdenticalPairs, reject, same_image
from .formats import (
    PairReference,
    PreferenceFormat,
    Reject,
    groups,
    images_of_row,
    pairs_in_group,
    resolve_format,
)
from .images import UndecodableImageError
from .stream_progress import Share, StreamProgress
from .transforms import PairDraws

if TYPE_CHECKING:
    from .pairs import PairOptions

logger = logging.getLogger(__name__)

MIXING = 2  # ends the key of random numbers that choose among streams; those of pairs have no fourth part
_COUNTER_ROWS = 256  # rows of the shared table in which workers count; more workers than this share rows


class Stream:
    """A stream in its format.

    Args:
        source (`datasets.IterableDataset`): Its rows.
        dataset_format (`str`, *optional*): A key of `FORMATS`; detected from the columns by default.
        name (`str`): In messages.
        use_scores (`bool`): Whether to read score columns where present.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        dataset_format: str | None,
        name: str,
        *,
        use_scores: bool,
        is_swapped: bool,
    ) -> None:
        columns = _stream_columns(source, name)
        self.format = replace(resolve_format(dataset_format, columns, use_scores=use_scores), is_swapped=is_swapped)
        self.has_scores = set(self.format.score_columns or ["no"]) <= set(columns)
        self.source = source.with_format(None)
        if source.features is not None:
            read = [*self.format.text_columns(columns), *self.format.image_columns]
            self.source = self.source.decode(False).select_columns(read)

    def with_own_epoch(self) -> Stream:
        """The same stream for one worker: workers are not in the same pass, and `datasets` shares a source's epoch
        among them."""
        view = copy.copy(self)
        view.source = self.source.with_format(None)
        return view


class PreferenceIterableDataset(IterableDataset):
    """Streamed pairs, made by [`prepare_dataset`]; items as in [`PreferenceDataset`].

    DataLoader workers divide the source's shards as in `datasets`. `row` is a running number, different for every
    worker, so that no two pairs of an epoch have the same random numbers. Bad pairs are skipped and counted. Formats
    that group rows expect the rows of a group to be consecutive.

    Attributes:
        is_split (`bool`): Whether the processes read different streams already; set by the trainer.
    """

    is_split = False
    is_permuted = False  # losers are those of the data

    def __init__(
        self,
        streams: Sequence[Stream],
        options: PairOptions,
        *,
        weights: Sequence[float] | None = None,
        name: str,
    ) -> None:
        self._repeat, self._compare, self._fixed, self._share = options.repeat, options.compare, False, Share()
        self._yielded = 0  # pairs of this reader since the beginning of the run
        self._streams, self._weights = streams, [1.0] * len(streams) if weights is None else weights
        self._format_name = "+".join(stream.format.name for stream in streams)
        self.has_scores = all(stream.has_scores for stream in streams)
        self.has_loser_prompts = any(stream.format.prompt_of_each_image for stream in streams)
        self._maker, self._reader, self._name = options.maker, options.reader, name
        self._strict = options.on_bad_row == "raise"
        self._examples: dict[str, list[tuple[int, str]]] = {}
        self._counts = torch.zeros(_COUNTER_ROWS, len(COUNTS), dtype=torch.long).share_memory_()
        self._progress = StreamProgress()

    @property
    def is_swapped(self) -> bool:
        """Whether the published losers are the winners."""
        return any(stream.format.is_swapped for stream in self._streams)

    @property
    def report(self) -> DataReport:
        """The counts of the current epoch so far, of all workers; examples are of this process alone. Pairs and
        undecodable pairs are counted in this process's share only."""
        counts = dict(zip(COUNTS, self._counts.sum(dim=0).tolist(), strict=True))
        return DataReport(self._name, self._format_name, **counts, examples=self._examples, is_swapped=self.is_swapped)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that random numbers and a shuffled stream's order depend on, also in running workers."""
        if not self._fixed:
            self._maker.set_epoch(epoch)
            self._set_epoch_of_streams(epoch)

    def for_evaluation(self) -> PreferenceIterableDataset:
        """One pass over this stream, center-cropped, with every prompt and seeds that do not depend on the epoch."""
        view = copy.copy(self)
        view._maker, view._repeat, view._fixed = self._maker.for_evaluation(), False, True
        view._progress = StreamProgress()
        return view

    def is_split_by_node(self) -> bool:
        """Whether `split_dataset_by_node` has given this process parts of the streams.

        Raises:
            ValueError: If it has of some streams of several, but not of all.
        """
        split = {is_split_by_node(stream.source) for stream in self._streams}
        if len(split) > 1:
            raise ValueError("Split all streams of a mixture by node, or none: some are and some are not.")
        return split.pop()

    def for_process(self, share: Share) -> PreferenceIterableDataset:
        """The same stream, limited to the share of one of several processes."""
        view = copy.copy(self)
        view._share = share
        return view

    def position(self, batches: int, workers: int) -> list[list[int]] | None:
        """Where a run that has trained on so many batches continues, for `resume_at`; `None` if it is not known."""
        return self._progress.after(
            batches, max(1, min(workers, max(stream.source.num_shards for stream in self._streams)))
        )

    def resume_at(self, position: list[list[int]] | None) -> None:
        """The next iteration of a repeating stream continues at a `position` without decoding what comes before it:
        batches that were trained on are `None` for each pair. `None` begins at the beginning."""
        self._progress.begin_at(position)

    def fingerprint(self) -> dict[str, Any]:
        """Identifies this stream; see [`stream_fingerprint`]."""
        found = [stream_fingerprint(stream.format.name, stream.source) for stream in self._streams]
        if len(found) == 1:
            return found[0]
        return {"format": self._format_name, "streams": found, "weights": [float(weight) for weight in self._weights]}

    def _set_epoch_of_streams(self, epoch: int) -> None:
        for stream in self._streams:
            stream.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._repeat:
            yield from self._once()
            return
        self._streams = [stream.with_own_epoch() for stream in self._streams]
        worker = get_worker_info()
        batches, epoch, seen, first = self._progress.begin(0 if worker is None else worker.id)
        yield from repeat(None, batches * self._share.batch)
        epoch, self._yielded, found = epoch if batches else int(self._maker.epoch), batches * self._share.batch, 1
        while found:
            self._set_epoch_of_streams(epoch)
            found = yield from self._one_pass(epoch, seen, first)
            seen, epoch, first = seen + found, epoch + 1, 0

    def _once(self) -> Iterator[dict[str, Any]]:
        """One pass in which all processes yield equally many pairs; of several, items tell which are `repeated`."""
        share, epoch = self._share, int(self._maker.epoch)
        if share.count == 1 or share.is_split:
            yield from self._one_pass(epoch, 0)
            return
        first: list[dict[str, Any]] = []
        pending: list[dict[str, Any]] = []
        yielded, items = 0, self._one_pass(epoch, 0)
        while True:
            try:
                pending.append({**next(items), "repeated": False})
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
            yield {**filling[index % len(filling)], "repeated": index >= len(pending)}

    def _one_pass(self, epoch: int, start: int, first: int = 0) -> Generator[dict[str, Any], None, int]:
        """This process's items of one pass over the stream; returns the number of labelled pairs of all processes.
        `start` is the number of those in earlier passes. Pairs before the one with the number `first` are left out."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        report = DataReport(self._name, self._format_name, examples={}, is_swapped=self.is_swapped)
        self._examples, counts = report.examples, self._counts[number % _COUNTER_ROWS]
        if worker is None:
            self._counts.zero_()  # of an earlier loader's workers
        counts.zero_()
        readers = workers  # number of different streams, whose pairs must not have the same random numbers
        if self._share.is_split:
            number, readers = number + workers * self._share.index, workers * self._share.count
        position, taken = -1, 0
        for position, item in enumerate(self._items(report, epoch, start, first)):
            counts.copy_(torch.tensor([getattr(report, count) for count in COUNTS]))
            taken += self._share.takes(start + position)
            if item is not None:
                images, prompts, scores = item
                self._record(0 if worker is None else worker.id, epoch, start, position + 1)
                row = position * readers + number
                read = partial(self._pixels, images)
                yield self._maker.item_of(row, prompts, read, epoch) | ({} if scores is None else {"scores": scores})
        counts.copy_(torch.tensor([getattr(report, count) for count in COUNTS]))
        if report.pairs:
            return position + 1
        if workers == 1 and (position < 0 or (taken and (self._repeat or self._share.count == 1))):
            raise BadDataError(f"The stream ended without a single pair. Check its labels and images.\n{report}")
        return 0 if taken and self._repeat else position + 1  # 0 ends the repetition: no image could be decoded

    def _pixels(self, images: list[Image.Image], draws: PairDraws | None, _: int) -> dict[str, Any]:
        winner, loser = images
        return self._maker.transform(winner, loser, draws)._asdict()

    def _record(self, reader: int, epoch: int, start: int, pairs: int) -> None:
        """Counts a pair that is about to be yielded."""
        self._yielded += 1
        if self._repeat and self._yielded % self._share.batch == 0:
            self._progress.record(reader, self._yielded // self._share.batch - 1, epoch, start, pairs)

    def _items(self, report: DataReport, epoch: int, start: int, first: int) -> Iterator[tuple | None]:
        """Images, prompts and scores of each labelled pair; `None` if it is undecodable, of another process or before
        the one with the number `first`."""

        def count(kind: str, row: int, reason: str, amount: int) -> None:
            if reject(report, self._strict, kind, row, reason, amount):
                logger.warning("%s data: row %d dropped: %s", self._name, row, reason)

        identical, position = IdenticalPairs(self._name), start
        for known, group in self._groups(report, epoch):
            rows = dict(group)
            for pair in pairs_in_group(known, group, count):
                taken, before = self._share.takes(position), position < start + first
                images = self._images(known, rows, pair, count) if taken and not before else None
                position += 1
                report.pairs += images is not None or (taken and before)
                if images is not None and self._compare:
                    identical.add(same_image(*images))
                    self._verify_different(identical, at_end=False)
                texts = [known.prompt(rows[pair.winner_row], image) for image in (pair.winner_image, pair.loser_image)]
                prompts = texts if self.has_loser_prompts else texts[:1]
                yield None if images is None else (images, prompts, pair.scores)
        if self._compare:
            self._verify_different(identical, at_end=True)

    def _groups(self, report: DataReport, epoch: int) -> Iterator[tuple[PreferenceFormat, list[tuple[int, Mapping]]]]:
        """Rows that are compared with one another, of one stream or, drawn by weight, of several. In training a stream
        that ends begins again until all have ended once."""
        streams = self._streams
        open_ones = [groups(stream.format, _count_rows(stream.source, report)) for stream in streams]
        weights, ended = np.array(self._weights, dtype=np.float64), np.zeros(len(streams), dtype=bool)
        generator = np.random.default_rng([self._maker.seed, epoch, len(streams), MIXING])
        while weights.any():
            number = 0
            if len(streams) > 1:
                number = int(np.searchsorted(np.cumsum(weights), generator.random() * weights.sum(), side="right"))
            group = next(open_ones[number], None)
            if group is None:
                ended[number] = True
                if ended.all():
                    return
                if self._repeat:
                    open_ones[number] = groups(streams[number].format, _count_rows(streams[number].source, report))
                    group = next(open_ones[number], None)
            if group is None:
                weights[number] = 0.0  # of an evaluation, or empty: a worker has no shard of it
                continue
            yield streams[number].format, group

    def _verify_different(self, identical: IdenticalPairs, *, at_end: bool) -> None:
        """Verifies once that pairs are not identical, after enough of them; the few of one worker among several at the
        end of a short stream are not enough."""
        worker = get_worker_info()
        alone = self._share.count == 1 and (worker is None or worker.num_workers == 1)
        if identical.checked >= SAMPLED_PAIRS or (at_end and alone):
            self._compare = False
            identical.verify()

    def _images(
        self, known: PreferenceFormat, rows: dict[int, Mapping], pair: PairReference, count: Reject
    ) -> list[Image.Image] | None:
        images = []
        for row, image in (pair[:2], pair[2:4]):
            try:
                stored = images_of_row(rows[row], known.image_columns, known.images_in_list)
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
