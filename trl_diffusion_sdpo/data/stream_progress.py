"""Which pairs of a stream one of several processes takes, and where its batches end."""

from dataclasses import dataclass

import torch


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


class StreamProgress:
    """Where the batches of a repeating stream end, counted by its readers (the DataLoader workers, or the training
    process) in shared memory, so that a checkpoint can tell where a resumed run begins. Readers are ahead of the
    training by the batches that are prefetched."""

    RECENT = 64  # batches of each reader, more than are prefetched
    READERS = 64

    def __init__(self) -> None:
        # Of each batch its number, the epoch and the pairs of earlier passes, and the pairs of this pass, with its own.
        self._ends = torch.full((self.READERS, self.RECENT, 4), -1).share_memory_()
        self._start = torch.zeros(self.READERS, 4, dtype=torch.long).share_memory_()  # the same, of the last batch

    def begin(self, reader: int) -> list[int]:
        """Where a reader begins: how many batches others have taken, and the rest as in a recorded end."""
        return self._start[reader].tolist() if reader < self.READERS else [0] * 4

    def record(self, reader: int, number: int, epoch: int, earlier: int, pairs: int) -> None:
        """The end of a reader's batch, before its last pair is passed on."""
        if reader < self.READERS:
            self._ends[reader, number % self.RECENT] = torch.tensor([number, epoch, earlier, pairs])

    def after(self, batches: int, readers: int) -> list[list[int]] | None:
        """For each reader where a run begins that has trained on these batches, which the readers made in turn; `None`
        if it is not known."""
        starts = []
        for reader in range(readers):
            count = batches // readers + (reader < batches % readers)
            end = self._ends[reader % self.READERS, (count - 1) % self.RECENT].tolist()
            if count and (reader >= self.READERS or end[0] != count - 1):
                return None
            starts.append([count, *end[1:]] if count else [0] * 4)
        return starts

    def begin_at(self, starts: list[list[int]] | None) -> None:
        """Readers begin at a result of `after`; at the beginning if there is none."""
        self._start.zero_()
        for reader, start in enumerate(starts or ()):
            self._start[reader] = torch.tensor(start)
