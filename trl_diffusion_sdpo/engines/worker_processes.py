"""Processes of data loaders. SIGTERM and Ctrl-C are sent to all processes of a job, and the one that trains answers
them with a checkpoint, for which it may need another batch: its workers take no notice, from their start on."""

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

import torch

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
STARTS_SHIELDED = sys.platform != "win32"  # where processes inherit which signals are blocked


@dataclass
class WorkerStart:
    """What a worker does first. It takes no notice of signals, and ends when the process that trains tells it to, ends
    or dies, even in the middle of a batch.

    Args:
        seed (`Callable`, *optional*): Called with the worker's number.
    """

    seed: Callable[[int], None] | None = None
    over: torch.Tensor = field(default_factory=lambda: _process_is_over())

    def __call__(self, worker_id: int) -> None:
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)  # forgets those that came while they were blocked
        if STARTS_SHIELDED:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        threading.Thread(target=_end_with_parent, args=(self.over,), daemon=True).start()
        if self.seed is not None:
            self.seed(worker_id)


@lru_cache(maxsize=1)
def _process_is_over() -> torch.Tensor:
    """A flag in shared memory that is set when this process ends: where it ends by an exception, multiprocessing sends
    its workers SIGTERM, and then waits for them."""
    flag = torch.zeros(1, dtype=torch.uint8).share_memory_()
    atexit.register(flag.fill_, 1)
    return flag


def _end_with_parent(over: torch.Tensor) -> None:
    """End this process when the one that started it ends or has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not over[0]:
        if wait([parent.sentinel], timeout=1.0):
            break
    os._exit(0)


def worker_context(method: str | None) -> BaseContext | str | None:
    """What a DataLoader starts its workers by.

    Args:
        method (`str`, *optional*): `"fork"`, `"spawn"` or `"forkserver"`; the default one of this process if unset.
    """
    if not STARTS_SHIELDED:
        return method
    method = method or multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return {"fork": _ForkContext, "spawn": _SpawnContext}[method]() if method != "forkserver" else method


if STARTS_SHIELDED:
    from multiprocessing.context import ForkContext, ForkProcess, SpawnContext, SpawnProcess

    class _Shielded:
        """A process that is born with the signals blocked; `WorkerStart` decides about them."""

        def start(self) -> None:
            resource_tracker.ensure_running()  # it would unblock them when it is started on the way
            before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    class _ForkProcess(_Shielded, ForkProcess):
        pass

    class _SpawnProcess(_Shielded, SpawnProcess):
        pass

    class _ForkContext(ForkContext):
        Process = _ForkProcess

    class _SpawnContext(SpawnContext):
        Process = _SpawnProcess
