"""Streams of preference pairs, checked and transformed while they are read. Each process reads a share."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from ..utils._compat import is_split_by_node
from ..utils.errors import UserError
from ..utils.processes import ALONE, Peers
from .data_report import COUNTS, BadDataError, DataReport
from .dataset import PairOptions, complete_item, new_epoch
from .fingerprints import facts_of_streams
from .formats import PairReference, PreferenceFormat, Reject, groups, pairs_in_group, resolve_format
from .images import UndecodableImageError
from .mixtures import check_formats, mixed
from .pairs import Pairs
from .single_images import NumberedRow, class_names, match_in_order
from .sources import StoredImage
from .stream_position import READ, StreamPosition
from .transforms import PairDraws

logger = logging.getLogger(__name__)

MIXING = 2  # last of four numbers that seed the choice of streams; three numbers seed a pair, so seeds differ
READERS = 256  # DataLoader workers with counters of their own; with more, some share counters
COMPARED_PAIRS = 16  # pairs at the start of a stream whose two images are compared
Group = list[NumberedRow]  # row numbers, and rows whose images are compared with one another


class Stream:
    """Rows of a stream, in one of `FORMATS`. `name` is for messages."""

    def __init__(
        self, source: datasets.IterableDataset, dataset_format: str | None, name: str, options: PairOptions
    ) -> None:
        self.name = name
        columns = source.column_names or list(next(iter(source), {}))
        if not columns:
            raise UserError(f"The {name} data set is empty. Pass a data set with rows.")
        self.format = resolve_format(
            dataset_format,
            columns,
            source.features,
            use_scores=options.use_scores,
            score_reading=options.score_reading,
            is_swapped=options.swap_labels,
            score_threshold=options.score_threshold,
        )
        self._classes = class_names(self.format, source.features) if self.format.single_images else {}
        self.source = source.with_format(None)
        read = [*self.format.text_columns(columns), *self.format.image_columns, *self.format.mask_columns]
        self.unread = [column for column in columns if column not in read]
        if source.features is not None:
            self.source = self.source.decode(False).select_columns(read)

    def share(self, share: Peers) -> Stream:
        """Return the shards that process `share.index` reads."""
        part = copy.copy(self)
        part.source = split_dataset_by_node(self.source, share.index, share.count)
        return part

    def groups(self, epoch: int, report: DataReport, reject: Reject) -> Iterator[Group]:
        """Read the stream once. Yield groups of rows whose images are compared, and count the rows in `report`. Of
        single images, yield those that are matched."""
        # A copy: in `datasets`, workers share a stream's epoch, but they may be in different passes.
        rows = self.source.with_format(None)
        rows.set_epoch(epoch)

        def numbered() -> Iterator[NumberedRow]:
            for number, row in enumerate(rows):
                report.rows += 1
                yield number, {**row, **{column: names.get(row[column]) for column, names in self._classes.items()}}

        if self.format.single_images:
            yield from match_in_order(self.format, numbered(), self.name, reject)
            return
        yield from groups(self.format, numbered())


class PreferenceIterableDataset(Pairs, IterableDataset):
    """Streamed pairs, made by [`prepare_dataset`]. Items have the entries that [`PreferenceDataset`] describes.

    Training processes divide the shards of a stream by `split_dataset_by_node` of `datasets`, and the DataLoader
    workers of a process its shards. If the shards are no multiple of the processes, each reads all labels but
    decodes only its share of the pairs. So do evaluations: all processes need the same number of pairs, and rows that
    are compared must stay together. Single images are matched by each reader within its share.

    An item's entry `row` is the number of its pair, unique in an epoch over all workers. With seed and epoch, it seeds
    the pair's random numbers. Bad pairs are skipped and counted. Rows whose images are compared must be consecutive.

    Args:
        streams (`Sequence[Stream]`): One stream, or several streams to mix.
        options ([`PairOptions`]): Settings for making pairs from rows.
        weights (`Sequence[float]`, *optional*): Shares of the streams in the mixture, by default equal.
        name (`str`): Name of the data in messages.
    """

    is_stream = True
    has_sources = False

    def __init__(
        self, streams: Sequence[Stream], options: PairOptions, *, weights: Sequence[float] | None = None, name: str
    ) -> None:
        self._streams = streams
        self._options = options
        self._name = name
        self._epoch = new_epoch()
        if any(is_split_by_node(stream.source) for stream in streams):
            raise UserError(
                "The trainer splits a stream among the processes itself, but `split_dataset_by_node` has already split "
                f"the {name} stream. Pass it without this split."
            )
        check_formats({stream.name: stream.format for stream in streams})
        self._weights = [1.0] * len(streams) if weights is None else [float(weight) for weight in weights]
        self._format_name = "+".join(stream.format.name for stream in streams)
        self.has_scores = all(stream.format.score_columns is not None for stream in streams)
        self.has_masks = any(stream.format.mask_columns for stream in streams)
        self.has_loser_prompts = any(
            stream.format.prompt_of_each_image or stream.format.single_images for stream in streams
        )
        self._compared = self._same = 0
        self._share = ALONE
        self._start: StreamPosition | None = None
        self._examples: dict[str, list[tuple[int, str]]] = {}
        self._counts = torch.zeros(READERS, len(COUNTS), dtype=torch.long).share_memory_()

    @property
    def report(self) -> DataReport:
        """Counts of the epoch so far, over this process's workers only. Examples of bad rows come from the DataLoader's
        main process."""
        counts = dict(zip(COUNTS, self._counts.sum(dim=0).tolist(), strict=True))
        return replace(self._new_report(), **counts, examples=self._examples)

    def _new_report(self) -> DataReport:
        unread = tuple(dict.fromkeys(column for stream in self._streams for column in stream.unread))
        return DataReport(self._name, self._format_name, is_swapped=self._options.swap_labels, unread=unread)

    def fingerprint(self) -> dict[str, Any]:
        """Return facts that identify the streams, for a resumed run to compare. No row is read: a shuffled stream would
        first have to fill its buffer."""
        sources = [stream.source for stream in self._streams]
        return {
            "format": self._format_name,
            "shards": [source.num_shards for source in sources],
            "weights": self._weights,
            "columns": [source.column_names for source in sources],
            "split": [None if source.split is None else str(source.split) for source in sources],
            **facts_of_streams(sources),
        }

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, also in running workers. Random numbers and the order of shuffled streams depend on it."""
        self._epoch.fill_(epoch)

    @property
    def is_for_training(self) -> bool:
        return self._options.training

    def sample(self, count: int) -> list[dict[str, Any]]:
        return list(islice(self, count))

    def for_evaluation(self) -> PreferenceIterableDataset:
        """Return a view for evaluation: one pass without random crops, flips or emptied prompts, with constant
        seeds."""
        view = copy.copy(self)
        view._options = self._options.for_evaluation()
        view._epoch = new_epoch()
        return view

    def for_process(self, share: Peers) -> PreferenceIterableDataset:
        """Return a view that reads only the share of process `share.index` among `share.count`."""
        view = copy.copy(self)
        view._share = share
        return view

    def start_at(self, position: StreamPosition) -> None:
        """Set the position at which iterations begin. For each pair before it, they yield `None`.

        Earlier passes are not read. Earlier rows of the current one are, to keep the order of a shuffled stream, but
        not decoded.
        """
        self._start = position

    @property
    def _divides_shards(self) -> bool:
        """Whether the processes divide the streams' shards, so that each reads only its own."""
        count = self._share.count
        if count == 1 or not self._options.repeat:
            return False
        return all(stream.source.num_shards % count == 0 for stream in self._streams)

    @property
    def _deals_pairs(self) -> bool:
        """Whether all n processes read the same rows, and each decodes every n-th pair."""
        return self._share.count > 1 and not self._divides_shards

    # ---- Reading --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        epoch = int(self._epoch) if self._options.training else 0
        if not self._options.repeat:
            yield from self._equal_share(epoch) if self._deals_pairs else self._one_pass(epoch)
            return
        worker = get_worker_info()
        passes = passed = 0
        if self._start is not None:
            batches, passes, passed = self._start.readers[0 if worker is None else worker.id]
            yield from repeat(None, batches * self._start.batch)
        while (yield from self._one_pass(epoch, passes, passed)):
            passes += 1
            passed = 0

    def _equal_share(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield this process's pairs of one pass, then repeat one until all processes have yielded equally many."""
        items = self._one_pass(epoch)
        filling = None
        yielded = 0
        while True:
            try:
                item = next(items)
            except StopIteration as end:
                wanted = -(-end.value // self._share.count)
                break
            filling = filling or item
            yielded += 1
            yield {**item, "repeated": False}
        for _ in range(wanted - yielded):
            filling = filling or next(self.for_process(ALONE)._one_pass(epoch))  # from another process
            yield {**filling, "repeated": True}

    def _one_pass(self, epoch: int, passes: int = 0, passed: int = 0) -> Generator[dict[str, Any], None, int]:
        """Yield this process's items of one pass over the stream, which began in `epoch`, after `passes` other passes
        and without the first `passed` pairs.

        Return the number of pairs in the pass, undecodable ones included, or in training 0 if none could be decoded.
        """
        epoch += passes
        worker = get_worker_info()
        share = self._share
        deals_pairs = self._deals_pairs
        reader, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # Numbered across processes, so that pairs of different workers get different random numbers.
        number = reader if deals_pairs else reader + workers * share.index
        numbers = workers if deals_pairs else workers * share.count
        report = self._new_report()
        self._examples = report.examples
        counts = self._counts[reader % READERS]
        if worker is None:
            self._counts.zero_()  # of an earlier DataLoader's workers

        def count(kind: str, row: int, reason: str, amount: int) -> None:
            if report.add(kind, row, reason, amount):
                logger.warning("%s data: row %d (%s): %s", self._name, row, kind.replace("_", " "), reason)

        position = -1
        for row_format, group in self._groups(report, epoch, count):
            for pair in pairs_in_group(row_format, group, count):
                position += 1
                if deals_pairs and position % share.count != share.index:
                    continue
                if position < passed:
                    report.pairs += 1
                    continue
                row = position * numbers + number
                draws = PairDraws.from_key(self._options.seed, epoch, row)
                item = self._item(row_format, dict(group), pair, draws, row, count)
                report.pairs += item is not None
                counts.copy_(torch.tensor([getattr(report, name) for name in COUNTS]))
                if item is not None:
                    yield item | {READ: (reader, passes, position + 1)}
        counts.copy_(torch.tensor([getattr(report, name) for name in COUNTS]))
        if not report.pairs and workers == 1 and (self._options.repeat or position < 0 or share.count == 1):
            raise BadDataError(f"The stream has no pair. Check the labels and images of the data.\n{report}")
        return position + 1 if report.pairs or not self._options.repeat else 0

    def _item(
        self,
        row_format: PreferenceFormat,
        rows: Mapping[int, Mapping[str, Any]],
        pair: PairReference,
        draws: PairDraws,
        number: int,
        count: Reject,
    ) -> dict[str, Any] | None:
        """Return the item of a pair. If an image cannot be decoded, count the pair as dropped and return `None`."""
        options = self._options
        winner = StoredImage(row_format, rows[pair.winner_row], pair.winner_image)
        loser = StoredImage(row_format, rows[pair.loser_row], pair.loser_image)
        row = pair.winner_row
        try:
            winner_image = winner.decode(options.reader)
            row = pair.loser_row
            loser_image = loser.decode(options.reader)
            self._count_same(winner.is_same(loser))
            item = options.transform(winner_image, loser_image, draws if options.training else None)._asdict()
            complete_item(item, options, winner, loser, draws, number, two_prompts=self.has_loser_prompts)
        except UndecodableImageError as error:
            count("undecodable", row, str(error), 1)
            return None
        return item if pair.scores is None else item | {"scores": pair.scores}

    def _count_same(self, is_same: bool) -> None:
        """Warn once if most of this process's first pairs have the same image twice."""
        self._compared += 1
        self._same += is_same
        if self._compared == COMPARED_PAIRS and 2 * self._same > COMPARED_PAIRS:
            logger.warning(
                "%d of the first %d pairs of the %s stream have the same image twice. Such pairs teach nothing, except "
                "with `loss_type='sft'`. Check the columns.",
                self._same,
                COMPARED_PAIRS,
                self._name,
            )

    def _groups(self, report: DataReport, epoch: int, reject: Reject) -> Iterator[tuple[PreferenceFormat, Group]]:
        """Yield groups of rows whose images are compared, in a mixture each from a randomly chosen stream."""
        streams = self._streams
        if self._divides_shards:
            streams = [stream.share(self._share) for stream in streams]
        listed = [partial(stream.groups, epoch, report, reject) for stream in streams]
        generator = np.random.default_rng([self._options.seed, epoch, len(streams), MIXING])
        for number, group in mixed(listed, self._weights, generator, restart=self._options.repeat):
            yield streams[number].format, group
