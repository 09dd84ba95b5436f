"""Position of a training process in a stream, stored in checkpoints so that a resumed run goes on with the next pair.

`datasets` has positions of its own (`IterableDataset.state_dict`), but without the buffer of a shuffled stream, whose
rows a resumed run would lose.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from ..utils._compat import keeps_order

logger = logging.getLogger(__name__)

POSITION_FILE = "stream_position_{}.json"  # in a checkpoint, one file for each process
READ = "read"  # entry of a batch: what [`StreamPosition.add`] needs


@dataclass
class StreamPosition:
    """Position of a training process in a stream that restarts when it ends.

    Attributes:
        batch (`int`): Pairs in a batch.
        readers (`list[list[int]]`): Three numbers for each DataLoader worker, or for the process itself if it has none:
            batches so far, completed passes over the stream, and pairs read in the current pass.
    """

    batch: int
    readers: list[list[int]]

    @classmethod
    def beginning(cls, batch: int, workers: int) -> StreamPosition:
        """Return the position before the first batch."""
        return cls(batch, [[0, 0, 0] for _ in range(max(1, workers))])

    @property
    def batches(self) -> int:
        """Batches that the process has trained on."""
        return sum(batches for batches, _, _ in self.readers)

    def add(self, read: Sequence[int]) -> None:
        """Advance by a batch. `read` is the entry `read` of its last pair: the worker, its completed passes, and the
        pairs it has read in the current pass."""
        worker, passes, pairs = read
        batches = self.readers[worker][0]
        self.readers[worker] = [batches + 1, passes, pairs]


def save_position(position: StreamPosition, args: TrainingArguments, folder: Path) -> None:
    """Save this process's position in the checkpoint `folder`, if batches have an order."""
    if keeps_order(args):
        content = {"reading": _reading(args), "readers": position.readers}
        (folder / POSITION_FILE.format(args.process_index)).write_text(json.dumps(content))


def load_position(args: TrainingArguments, batches: int = 0, checkpoint: str | None = None) -> StreamPosition:
    """Read this process's position after `batches` batches from a checkpoint.

    If the number of processes or workers or the batch size has changed, it is the beginning of the stream, and training
    decodes and discards the first `batches` batches.
    """
    batch, workers, _ = _reading(args)
    beginning = StreamPosition.beginning(batch, workers)
    if checkpoint is None or not batches:
        return beginning
    file = Path(checkpoint) / POSITION_FILE.format(args.process_index)
    content = json.loads(file.read_text()) if file.is_file() else {}
    if content.get("reading") == _reading(args) and keeps_order(args):
        position = StreamPosition(batch, content["readers"])
        if position.batches == batches:
            return position
    logger.warning(
        "The checkpoint does not say where in the stream to continue after %d batches with %d pairs per batch, %d "
        "workers and %d processes. They are decoded again and discarded.",
        batches,
        *_reading(args),
    )
    return beginning


def _reading(args: TrainingArguments) -> list[int]:
    """Return the numbers for which a position holds: batch size, DataLoader workers and processes."""
    return [args.train_batch_size, args.dataloader_num_workers or 0, args.world_size]
