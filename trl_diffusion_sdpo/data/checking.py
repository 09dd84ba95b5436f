"""What is looked at before the first batch: a sample of the pairs, or every image, shared among the processes that
prepare the same data. No process waits for another longer than their shares differ in time."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..suggestions import did_you_mean
from ..switch_words import SWITCH_WORDS

logger = logging.getLogger(__name__)

VERIFY_IMAGES = ("sample", "all", "none")
SAMPLED_PAIRS = 128  # a second or two
ROUND_ROWS = 10_000  # rows that a process checks between two exchanges
FEW_ROWS = 1000  # which one process checks faster than several start


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Peers:
    """The processes that prepare the same data at the same time; by default there is one.

    Args:
        index (`int`): Of this process, from 0.
        count (`int`): How many there are.
        gather (`Callable`): Called by all of them at once with a value; returns everyone's, in the order of `index`.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    def rounds(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """This process's rows, in as many parts as each of the others has, some maybe empty."""
        if self.count == 1:
            yield rows
            return
        for start in range(0, len(rows), ROUND_ROWS * self.count):
            own = start + ROUND_ROWS * self.index
            yield rows[own : min(own + ROUND_ROWS, len(rows))]

    def share(self, look: Callable[[], Any]) -> list[Any]:
        """What everyone has found, in the order of `index`; all call it at once.

        Args:
            look (`Callable`): This process's part of the work. Where it fails all of them end, and none waits for it.

        Raises:
            The process's own error, and `RuntimeError` with the message of another's where it had none.
        """
        own: Exception | None = None
        found = None
        try:
            found = look()
        except Exception as error:
            own = error
        everyones = self.gather((found, None if own is None else f"{type(own).__name__}: {own}"))
        if own is not None:
            raise own
        failed = [index for index, (_, message) in enumerate(everyones) if message is not None]
        if failed:
            raise RuntimeError(
                f"Process {failed[0]} has failed to look at its part of the data, and all end with it: "
                f"{everyones[failed[0]][1]}"
            )
        return [value for value, _ in everyones]


ALONE = Peers()


class AlikePairs:
    """Counts pairs whose two images are the same, in which there is nothing to prefer.

    Args:
        name (`str`): What to call the data set in messages.
    """

    def __init__(self, name: str) -> None:
        self.name, self.seen, self.alike = name, 0, 0

    def add(self, alike: bool) -> None:
        """Counts a pair."""
        self.seen += 1
        self.alike += alike

    def judge(self) -> None:
        """Says so if most pairs are alike.

        Raises:
            ValueError: If all are.
        """
        found = (
            f"In {self.alike} of {self.seen} pairs of the {self.name} data that were looked at, chosen and rejected"
        )
        if 0 < self.seen == self.alike:
            raise ValueError(
                f"{found} are the same image: there is nothing to prefer. Check the columns, or use `loss_type='sft'` "
                "to train on the winners alone."
            )
        if 2 * self.alike > self.seen:
            logger.warning("%s are the same image: such pairs teach nothing. Check the columns.", found)


def verify_choice(value: Any) -> str:
    """One of `VERIFY_IMAGES`; also of the booleans, and their spellings on a command line or in YAML, that came first.

    Raises:
        ValueError: On anything else.
    """
    word = str(value).lower()
    if word in SWITCH_WORDS:
        return "all" if SWITCH_WORDS[word] else "none"
    if word not in VERIFY_IMAGES:
        raise ValueError(
            f"`verify_images` must be one of {', '.join(VERIFY_IMAGES)}; got {value!r}."
            f"{did_you_mean(word, VERIFY_IMAGES)} Leave it unset for a sample."
        )
    return word


def spread(size: int, wanted: int) -> np.ndarray:
    """Places of at most `wanted` of `size` things, evenly spread, each once, from the first on."""
    count = min(size, wanted)
    return np.arange(count, dtype=np.int64) * size // max(count, 1)


def same_image(first: Image.Image, second: Image.Image) -> bool:
    """Whether two RGB images have the same pixels."""
    return first.size == second.size and first.tobytes() == second.tobytes()


def usable_cores(processes: int = 1) -> int:
    """Cores that each of some processes on this machine may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return max(1, cores // processes)


def forks_by_default() -> bool:
    """Whether new processes are copies of this one, which need no main module that can be imported anew."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork" and not multiprocessing.current_process().daemon
