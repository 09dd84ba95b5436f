"""DataLoader workers that ignore SIGINT and SIGTERM.

All processes of a job get these signals. The training process then saves a checkpoint after the current step, and it
may need another batch to finish this step.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import get_worker_info

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
INHERITS_SIGNAL_MASK = sys.platform != "win32"


def share(batch: Any) -> Any:
    """Move a batch's tensors into shared memory, in place. Raise `RuntimeError` if shared memory is full."""
    if isinstance(batch, torch.Tensor):
        try:
            return batch.share_memory_()
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                "Data loader workers pass batches through shared memory (/dev/shm), which has no room for another one. "
                "Set a smaller `dataloader_num_workers` (0 needs none) or `dataloader_prefetch_factor`, or enlarge it "
                f"(`docker run --shm-size=8g`). ({error})"
            ) from error
    for value in batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ():
        share(value)
    return batch


@dataclass
class CollateIntoSharedMemory:
    """Collator that puts batches into shared memory if it runs in a worker.

    torch would move them in a thread of the worker, and errors of this thread would stay hidden.
    """

    collate: Callable[[Any], Any]

    def __call__(self, items: Any) -> Any:
        batch = self.collate(items)
        return batch if get_worker_info() is None else share(batch)


@lru_cache(maxsize=1)
def _exit_flag() -> torch.Tensor:
    """Return a flag in shared memory that is set when this process exits.

    Workers need it, because multiprocessing ends them with SIGTERM after an exception and waits for them. They ignore
    SIGTERM.
    """
    flag = share(torch.zeros(1, dtype=torch.uint8))
    atexit.register(flag.fill_, 1)
    return flag


@dataclass
class WorkerStart:
    """`worker_init_fn` of a worker that ignores signals. The worker exits when its parent process exits or dies."""

    seed: Callable[[int], None] | None = None  # called with the worker's number
    parent_exits: torch.Tensor = field(default_factory=_exit_flag)

    def __call__(self, worker_id: int) -> None:
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)  # also drops pending signals
        if INHERITS_SIGNAL_MASK:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        threading.Thread(target=_exit_with_parent, args=(self.parent_exits,), daemon=True).start()
        if self.seed is not None:
            self.seed(worker_id)


def _exit_with_parent(parent_exits: torch.Tensor) -> None:
    """Exit this process when its parent exits or dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not parent_exits[0]:
        if wait([parent.sentinel], timeout=1.0):
            break
    os._exit(0)


def worker_context(method: str | None) -> BaseContext | str | None:
    """Return the `multiprocessing_context` of a DataLoader whose workers start with blocked signals.

    `"forkserver"` is returned unchanged, and so is every method on Windows. The default is the start method of this
    process.
    """
    if not INHERITS_SIGNAL_MASK:
        return method
    method = method or multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return {"fork": _ForkContext, "spawn": _SpawnContext}[method]() if method != "forkserver" else method


if INHERITS_SIGNAL_MASK:
    from multiprocessing.context import ForkContext, ForkProcess, SpawnContext, SpawnProcess

    class _StartsBlocked(BaseProcess):
        """Process that starts with blocked signals. [`WorkerStart`] unblocks them."""

        def start(self) -> None:
            resource_tracker.ensure_running()  # if `super().start()` started it, that would unblock the signals
            before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    class _ForkProcess(_StartsBlocked, ForkProcess):
        pass

    class _SpawnProcess(_StartsBlocked, SpawnProcess):
        pass

    class _ForkContext(ForkContext):
        Process = _ForkProcess

    class _SpawnContext(SpawnContext):
        Process = _SpawnProcess
