"""Helpers of the checks before the first batch, and the report of what was read and dropped."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ..utils.hints import did_you_mean
from ..utils.switch_words import SWITCH_WORDS
from .images import UndecodableImageError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
SourceImage = tuple[int, int]  # (row of the source, index of the image within the row)

VERIFY_IMAGES = ("sample", "all", "none")
SAMPLED_PAIRS = 128  # a second or two
ROUND_ROWS = 10_000  # rows that a process checks between two gathers
FEW_ROWS = 1000  # below this, starting processes takes longer than checking in one

COUNTS = ("rows", "pairs", "ties", "undecodable", "bad_prompts", "bad_labels", "too_small")
MAX_EXAMPLES = 5
PERMUTED = "losers are the winners of other pairs, drawn in every epoch"
SWAPPED = "labels are swapped: the winner of a pair is the published loser"
HOW_TO_DROP = 'Fix the row, or pass on_bad_row="drop" to leave such rows out.'


class BadDataError(ValueError):
    """Data that stop a run. By its class it is told apart where torch raises a DataLoader worker's error again."""


@dataclass
class DataReport:
    """Counts of the rows, pairs and drops of a preference set, with examples of what was dropped."""

    name: str  # in messages
    format: str  # key in `FORMATS`
    rows: int = 0  # of the source
    pairs: int = 0  # to train on
    ties: int = 0  # pairs of images that were judged equal
    undecodable: int = 0  # pairs with an image that cannot be decoded
    bad_prompts: int = 0  # rows whose prompt is no string
    bad_labels: int = 0  # rows whose label or score is missing or unreadable
    too_small: int = 0  # pairs with an image whose shorter side is below `min_side`
    notes: tuple[str, ...] = ()  # on the sizes of the images
    is_swapped: bool = False  # whether the published losers are the winners of the pairs
    is_permuted: bool = False  # whether losers are the winners of other pairs
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # first row numbers and reasons, by kind

    @property
    def dropped(self) -> int:
        """All drops, of every kind."""
        return self.ties + self.undecodable + self.bad_prompts + self.bad_labels + self.too_small

    def add(self, kind: str, row: int, reason: str, amount: int = 1) -> bool:
        """Counts `amount` drops; true if the row was added to the examples."""
        setattr(self, kind, getattr(self, kind) + amount)
        examples = self.examples.setdefault(kind, [])
        if len(examples) == MAX_EXAMPLES:
            return False
        examples.append((row, reason))
        return True

    def __str__(self) -> str:
        listed = [count for count in COUNTS if count != "too_small" or self.too_small]  # which depends on a setting
        counts = ", ".join(f"{getattr(self, count)} {count.replace('_', ' ')}" for count in listed)
        lines = [f"{self.name} data ({self.format}): {counts}"]
        if self.is_swapped:
            lines.append(f"  {SWAPPED}")
        if self.is_permuted:
            lines.append(f"  {PERMUTED}")
        for kind, examples in self.examples.items():
            lines += [f"  {kind.replace('_', ' ')}: row {row}: {reason}" for row, reason in examples]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def reject(report: DataReport, strict: bool, kind: str, row: int, reason: str, amount: int) -> bool:
    """Counts a drop; true if the row was added to the examples.

    Raises:
        BadDataError: On a bad row, if `strict`. A tie is not one, as its labels are valid; nor is a small image.
    """
    if strict and kind not in ("ties", "too_small"):
        raise BadDataError(f"{report.name} data, row {row}: {reason}. {HOW_TO_DROP}")
    return report.add(kind, row, reason, amount)


@dataclass(frozen=True)
class Peers:
    """The processes that prepare the same data at the same time; one by default.

    Args:
        index (`int`): Rank of this process, from 0.
        count (`int`): Number of processes.
        gather (`Callable`): Collective: called by all of them with a value, it returns everyone's in the order of
            `index`.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def chunks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """This process's rows in chunks, equally many on every process; a chunk may be empty."""
        if self.count == 1:
            yield rows
            return
        for start in range(0, len(rows), ROUND_ROWS * self.count):
            first = start + ROUND_ROWS * self.index
            yield rows[first : min(first + ROUND_ROWS, len(rows))]

    def gather_results(self, check: Callable[[], Any]) -> list[Any]:
        """Runs `check`, this process's share of the work, and gathers the results in the order of `index`. Collective.

        Raises:
            On all processes if `check` raises on one: its error there, elsewhere `RuntimeError` with the first message.
        """
        failure: Exception | None = None
        result = None
        try:
            result = check()
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
        """What `compute` returns in the first process, which alone runs it. Collective; raises as `gather_results`."""
        return self.gather_results(lambda: compute() if self.index == 0 else None)[0]


ALONE = Peers()


def pairs_of_images(index: np.ndarray, images: Mapping[SourceImage, str]) -> Iterator[tuple[int, SourceImage]]:
    """The pairs of an index `(P, 4)` that contain any of the images, each with the first such image (the winner before
    the loser)."""
    rows = np.array([row for row, _ in images], dtype=np.int64)
    for pair in np.flatnonzero(np.isin(index[:, 0], rows) | np.isin(index[:, 2], rows)).tolist():
        winner_row, winner_image, loser_row, loser_image = index[pair].tolist()
        found = (winner_row, winner_image)
        if found not in images:
            found = (loser_row, loser_image)
        if found in images:
            yield pair, found


def problems_of_images(
    source: Any, index: np.ndarray, reader: Any, num_proc: int | None, peers: Peers
) -> dict[SourceImage, str]:
    """The images of an index `(P, 4)` that cannot be decoded, and why. All peers must call it together.

    Args:
        source: Of the images.
        reader ([`~trl_diffusion_sdpo.data.images.ImageReader`]): Decodes each once.
        num_proc (`int`, *optional*): Worker processes of each peer; by default as many as there are cores where the
            source is fork-safe.
        peers (`Peers`): The processes that divide the images.
    """
    needed = np.zeros(len(source), dtype=np.int64)  # number of labelled images of each row
    for row, image in ((0, 1), (2, 3)):
        np.maximum.at(needed, index[:, row], index[:, image] + 1)
    rows = np.flatnonzero(needed)
    if num_proc is None and forks_by_default() and len(rows) >= FEW_ROWS:
        num_proc = usable_cores(peers.count)

    def problems(chunk: np.ndarray) -> dict[SourceImage, str]:
        reasons: dict[SourceImage, str] = {}
        for row, found in source.check_images(chunk, reader, num_proc) if len(chunk) else ():
            found = [*found, *["is missing: the row has fewer images than labels"] * (needed[row] - len(found))]
            reasons.update({(row, image): reason for image, reason in enumerate(found) if reason})
        return reasons

    reasons: dict[SourceImage, str] = {}
    for chunk in peers.chunks(rows):
        for found in peers.gather_results(partial(problems, chunk)):
            reasons.update(found)
    return reasons


def check_pairs(
    source: Any, reader: Any, places: Sequence[np.ndarray], peers: Peers
) -> list[tuple[dict[SourceImage, str], bool | None]]:
    """The problems of each pair's images, and whether the two are identical; `None` if one cannot be decoded.

    Args:
        source, reader, peers: As of [`problems_of_images`].
        places (`Sequence` of `np.ndarray` of shape `(2, 2)`): Rows and images of winner and loser.
    """

    def check(pair: np.ndarray) -> tuple[dict[SourceImage, str], bool | None]:
        reasons, images = {}, []
        for row, image in pair.tolist():
            try:
                images.append(reader.decode_at(source.images(row), image))
            except UndecodableImageError as error:
                reasons[row, image] = str(error).removeprefix(f"image {image} ")
        return reasons, None if reasons else same_image(*images)

    gathered = peers.gather_results(lambda: [check(pair) for pair in places[peers.index :: peers.count]])
    return [result for results in gathered for result in results]


def tell_of_sample(report: DataReport, pairs: int, checked: int, bad: int) -> None:
    """Warn of the `bad` pairs among those of a sample that were `checked`; `ValueError` where all of them are."""
    if not bad or checked == pairs:
        return
    logger.warning(
        "%s data: of %d pairs that were checked among %d, %d cannot be decoded. verify_images='all' checks all "
        "pairs before training; otherwise bad ones are found when they are read.",
        *(report.name, checked, pairs, bad),
    )
    if bad == checked:
        raise ValueError(f"None of the {bad} pairs that were checked can be decoded.\n{report}")


class IdenticalPairs:
    """Counts pairs whose two images are identical; `name` is that of the data set in messages."""

    def __init__(self, name: str) -> None:
        self.name, self.checked, self.identical = name, 0, 0

    def add(self, identical: bool) -> None:
        self.checked += 1
        self.identical += identical

    def verify_all(self, found: list[bool | None]) -> None:
        """Adds what is known of pairs, and verifies."""
        for identical in found:
            if identical is not None:
                self.add(identical)
        self.verify()

    def verify(self) -> None:
        """Warns if most pairs are identical.

        Raises:
            ValueError: If all are.
        """
        counts = f"{self.identical} of {self.checked}"
        found = f"In {counts} pairs of the {self.name} data that were checked, chosen and rejected"
        if 0 < self.checked == self.identical:
            raise ValueError(
                f"{found} are the same image: there is nothing to prefer. Check the columns, or use `loss_type='sft'` "
                "to train on the winners alone."
            )
        if 2 * self.identical > self.checked:
            logger.warning("%s are the same image: such pairs teach nothing. Check the columns.", found)


def parse_verify_images(value: Any) -> str:
    """One of `VERIFY_IMAGES`; a boolean, or its spelling on a command line or in YAML, means `"all"` or `"none"`.

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


def evenly_spaced(size: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the indices `0 .. size - 1`, evenly spaced, without repeats, starting at 0."""
    count = min(size, wanted)
    return np.arange(count, dtype=np.int64) * size // max(count, 1)


def same_image(first: Image.Image, second: Image.Image) -> bool:
    """Whether two RGB images have the same pixels."""
    return first.size == second.size and first.tobytes() == second.tobytes()


def usable_cores(processes: int = 1) -> int:
    """CPU cores for each of `processes` processes, of which a launcher's `LOCAL_WORLD_SIZE` are on this machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return max(1, cores // min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes))))


def forks_by_default() -> bool:
    """Whether new processes are forked: unlike spawned ones, they need no importable main module."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork" and not multiprocessing.current_process().daemon
