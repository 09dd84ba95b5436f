"""Work that several processes share, and the CPU cores for each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Peers:
    """Group of processes that share work, such as preparing data; by default, one process.

    Args:
        index (`int`): Rank of this process, from 0.
        count (`int`): Number of processes.
        gather (`Callable`): Collective function, which each process calls with a value, and which returns the list of
            all values by rank.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def gather_results(self, work: Callable[[], Any]) -> list[Any]:
        """Call `work` in each process, and return all results by rank. Call it in all processes.

        Raises:
            Exception: If `work` fails in any process: there its own error, in the others a `RuntimeError`.
        """
        failure: Exception | None = None
        result = None
        try:
            result = work()
        except Exception as error:
            failure = error
        gathered = self.gather((result, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        failed = [index for index, (_, message) in enumerate(gathered) if message is not None]
        if failed:
            raise RuntimeError(f"Process {failed[0]} failed in its part of the work: {gathered[failed[0]][1]}")
        return [value for value, _ in gathered]

    def first(self, compute: Callable[[], Result]) -> Result:
        """Call `compute` in the first process, and return its result in all. Call it in all processes."""
        return self.gather_results(lambda: compute() if self.index == 0 else None)[0]


ALONE = Peers()


def usable_cores(processes: int = 1) -> int:
    """Return the CPU cores that each of `processes` processes can use. `LOCAL_WORLD_SIZE`, where a launcher has set it,
    says how many processes share this machine's."""
    affinity = getattr(os, "sched_getaffinity", None)  # `None` on macOS and Windows
    cores = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return max(1, cores // min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes))))


def forks_by_default() -> bool:
    """Return whether new processes are forked by default. Spawned processes would have to import the main module."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork" and not multiprocessing.current_process().daemon
