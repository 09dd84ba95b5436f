"""DataLoader workers that ignore SIGINT and SIGTERM.

An interrupted job sends one of them to all its processes. The training process then finishes its step, which may need
another batch, and saves a checkpoint, so the workers must stay alive.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..utils.errors import UserError

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def share(batch: Any) -> Any:
    """Move the tensors of a batch into shared memory, in place, and return it. Raise `UserError` if that is full."""
    if isinstance(batch, torch.Tensor):
        try:
            return batch.share_memory_()
        except (RuntimeError, OSError) as error:
            raise UserError(
                "DataLoader workers pass batches through shared memory (/dev/shm), which has no room for another "
                "batch. Set a smaller `dataloader_num_workers` (0 needs no shared memory) or "
                f"`dataloader_prefetch_factor`, or enlarge shared memory (`docker run --shm-size=8g`). ({error})"
            ) from error
    for value in batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ():
        share(value)
    return batch


@dataclass
class CollateIntoSharedMemory:
    """Collator that puts batches into shared memory if it runs in a DataLoader worker.

    torch itself would do it in a background thread of the worker, where errors stay hidden.
    """

    collate: Callable[[Any], Any]

    def __call__(self, items: Any) -> Any:
        batch = self.collate(items)
        return batch if get_worker_info() is None else share(batch)


@lru_cache(maxsize=1)
def _exit_flag() -> torch.Tensor:
    """Return a tensor in shared memory that becomes 1 when this process exits, so that its workers exit too.

    They ignore SIGTERM, which multiprocessing would send them after an exception and then wait forever.
    """
    flag = share(torch.zeros(1, dtype=torch.uint8))
    atexit.register(flag.fill_, 1)
    return flag


@dataclass
class WorkerStart:
    """`worker_init_fn` that makes a DataLoader worker ignore SIGINT and SIGTERM, and exit when its parent exits or
    dies."""

    seed: Callable[[int], None] | None = None  # seeds the worker, called with its number
    parent_exits: torch.Tensor = field(default_factory=_exit_flag)

    def __call__(self, worker_id: int) -> None:
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_exit_with_parent, args=(self.parent_exits,), daemon=True).start()
        if self.seed is not None:
            self.seed(worker_id)


def _exit_with_parent(parent_exits: torch.Tensor) -> None:
    """Wait until the parent exits or dies, then exit this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not parent_exits[0]:
        if wait([parent.sentinel], timeout=1.0):
            break
    os._exit(0)
