"""The report of what was read and dropped, and the checks of images before the first batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
from PIL import Image

from ..utils.hints import did_you_mean
from ..utils.processes import Peers, forks_by_default, usable_cores
from ..utils.switch_words import SWITCH_WORDS
from .buckets import AspectRatioBuckets, PairSizes
from .formats import images_of_row
from .images import ImageReader, Size, UndecodableImageError

logger = logging.getLogger(__name__)

SourceImage = tuple[int, int]  # (row of the source, index of the image within the row)

VERIFY_IMAGES = ("sample", "all", "none")
SAMPLED_PAIRS = 128  # a second or two
FEW_ROWS = 1000  # with fewer rows, one process is faster than starting several

STRONG_CROP = 0.25  # share of an image's area; pairs that lose more to cropping are counted
FEW_HEADERS = 20_000  # with fewer headers, one process is faster than starting several
ENLARGED = "enlarged"
SIZES_READ = "Reading image sizes"

COUNTS = ("rows", "pairs", "ties", "undecodable", "bad_prompts", "bad_labels", "too_small")
MAX_EXAMPLES = 5
PERMUTED = "losers are the winners of other pairs, drawn in every epoch"
SWAPPED = "labels are swapped: the winner of a pair is the published loser"
HOW_TO_DROP = 'Fix the row, or pass on_bad_row="drop" to leave such rows out.'


class BadDataError(ValueError):
    """Error for data that stop a run."""


@dataclass
class DataReport:
    """Counts of the rows, pairs and drops of a preference set, with examples of what was dropped."""

    name: str  # in messages
    format: str  # key in `FORMATS`
    rows: int = 0  # of the source
    pairs: int = 0  # to train on
    ties: int = 0  # pairs whose images were judged equal
    undecodable: int = 0  # pairs with an image that cannot be decoded
    bad_prompts: int = 0  # rows whose prompt is no string
    bad_labels: int = 0  # rows whose label or score is missing or unreadable
    too_small: int = 0  # pairs with an image whose shorter side is below `min_side`
    notes: tuple[str, ...] = ()  # notes on the sizes of the images
    is_swapped: bool = False  # whether the published losers are the winners of the pairs
    is_permuted: bool = False  # whether losers are the winners of other pairs
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # first row numbers and reasons, by kind

    @property
    def dropped(self) -> int:
        """Number of all drops."""
        return self.ties + self.undecodable + self.bad_prompts + self.bad_labels + self.too_small

    def add(self, kind: str, row: int, reason: str, amount: int = 1) -> bool:
        """Count drops. Return whether the row was added to the examples."""
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
    """Count a drop. Return whether the row was added to the examples.

    Raises:
        BadDataError: If `strict` and the row is bad. Ties and small images are not bad rows: their labels are valid.
    """
    if strict and kind not in ("ties", "too_small"):
        raise BadDataError(f"{report.name} data, row {row}: {reason}. {HOW_TO_DROP}")
    return report.add(kind, row, reason, amount)


def pairs_of_images(places: np.ndarray, images: Mapping[SourceImage, str]) -> Iterator[tuple[int, SourceImage]]:
    """Yield the pairs that contain any of the images, each with the first of these images. The winner comes first."""
    rows = [row for row, _ in images]
    for pair in np.flatnonzero(np.isin(places[:, [0, 2]], rows).any(axis=1)).tolist():
        winner_row, winner_image, loser_row, loser_image = places[pair].tolist()
        for image in ((winner_row, winner_image), (loser_row, loser_image)):
            if image in images:
                yield pair, image
                break


def problems_of_images(
    source: Any, places: np.ndarray, reader: ImageReader, num_proc: int | None, peers: Peers
) -> dict[SourceImage, str]:
    """Decode all images of pairs. Return the images that cannot be decoded, with their reasons. Collective.

    Args:
        places (`np.ndarray` of shape `(P, 4)`): Row and image of each pair's winner and loser in the source.
        num_proc (`int`, *optional*): Worker processes of each peer. Default: one per core, if processes are forked.
    """
    images = np.zeros(len(source), dtype=np.int64)  # number of labelled images of each row
    for row, image in ((0, 1), (2, 3)):
        np.maximum.at(images, places[:, row], places[:, image] + 1)
    rows = np.flatnonzero(images)
    if num_proc is None and forks_by_default() and len(rows) >= FEW_ROWS:
        num_proc = usable_cores(peers.count)
    share = np.array_split(rows, peers.count)[peers.index]

    def check_share() -> dict[SourceImage, str]:
        reasons: dict[SourceImage, str] = {}
        for row, problems in source.check_images(share, reader, num_proc):
            problems += ["is missing: the row has fewer images than labels"] * (images[row] - len(problems))
            reasons |= {(row, image): problem for image, problem in enumerate(problems) if problem}
        return reasons

    return {image: reason for reasons in peers.gather_results(check_share) for image, reason in reasons.items()}


def check_pairs(
    source: Any, reader: ImageReader, places: Sequence[np.ndarray], peers: Peers
) -> list[tuple[dict[SourceImage, str], bool | None]]:
    """Return the problems of each pair's images, and whether the two are identical. Collective.

    Args:
        places (`Sequence` of `np.ndarray` of shape `(2, 2)`): Row and image of winner and loser in the source.
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


class IdenticalPairs:
    """Counter of pairs whose two images are identical. `name` is the name of the data set in messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.checked = 0
        self.identical = 0

    def add(self, identical: bool) -> None:
        self.checked += 1
        self.identical += identical

    def verify(self) -> None:
        """Warn if most of the pairs are identical, and raise `ValueError` if all are."""
        summary = (
            f"In {self.identical} of {self.checked} pairs of the {self.name} data that were checked, chosen and "
            "rejected are the same image"
        )
        if 0 < self.checked == self.identical:
            raise ValueError(
                f"{summary}: there is nothing to prefer. Check the columns, or use `loss_type='sft'` to train on the "
                "winners alone."
            )
        if 2 * self.identical > self.checked:
            logger.warning("%s: such pairs teach nothing. Check the columns.", summary)


def parse_verify_images(value: Any) -> str:
    """Return one of `VERIFY_IMAGES`. Booleans, also as text, mean `"all"` and `"none"`.

    Raises:
        ValueError: If the value is anything else.
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
    """Return at most `wanted` of the indices `0 .. size - 1`, evenly spaced, without repeats, starting at 0."""
    count = min(size, wanted)
    return np.arange(count, dtype=np.int64) * size // max(count, 1)


def same_image(first: Image.Image, second: Image.Image) -> bool:
    """Return whether two RGB images have the same pixels."""
    return first.size == second.size and first.tobytes() == second.tobytes()


# ---- Sizes of images


@dataclass(frozen=True)
class Settled:
    """Pairs that remain after the sizes of their images were read, and their training sizes.

    Args:
        kept (`np.ndarray` of shape `(P,)`, bool): Whether each pair remains.
        sizes ([`PairSizes`], *optional*): Buckets of the pairs that remain.
        drops (`list[tuple]`): Kind, pair, reason and number of pairs that are left out.
        notes (`tuple[str, ...]`): Lines for the report.
    """

    kept: np.ndarray
    sizes: PairSizes | None
    drops: list[tuple[str, int, str, int]]
    notes: tuple[str, ...]


def settle_sizes(
    source: Any,
    index: np.ndarray,
    reader: ImageReader,
    targets: AspectRatioBuckets | Size,
    min_side: int | None,
    num_proc: int | None,
    peers: Peers,
) -> Settled:
    """Read the sizes of all images, and leave out pairs that have an unreadable or small image.

    Args:
        source: The data set with the images.
        index (`np.ndarray` of shape `(P, 4)`): Row and image of each pair's winner and loser.
        targets ([`AspectRatioBuckets`] or `Size`): Sizes that pairs are trained at.
        min_side (`int`, *optional*): Least pixels along the shorter side of an image.
        num_proc (`int`, *optional*): Processes per peer. If there are many images, the default is one per core.
        peers (`Peers`): The processes that divide the images.
    """
    sizes = _read_sizes(source, index, reader, num_proc, peers)  # (P, 2, 2)
    is_readable = np.asarray((sizes > 0).all((1, 2)))
    is_large = np.asarray((sizes >= (min_side or 0)).all((1, 2)))
    drops = _drops("undecodable", ~is_readable, lambda pair: _problem(source, index[pair], reader))
    drops += _drops(
        "too_small",
        is_readable & ~is_large,
        lambda pair: f"{sizes[pair].min()} pixels along the shorter side, and `min_side={min_side}`",
    )
    kept = np.asarray(is_readable & is_large)
    sizes = sizes[kept]
    if not isinstance(targets, AspectRatioBuckets):
        return Settled(kept, None, drops, describe_sizes(sizes, np.array([targets])))
    buckets = PairSizes(targets.sizes, targets.assign(sizes.reshape(-1, 4)))
    return Settled(kept, buckets, drops, describe_sizes(sizes, np.array(buckets.sizes)[buckets.numbers]))


def describe_sizes(sizes: np.ndarray, targets: np.ndarray) -> tuple[str, ...]:
    """Return sentences about how images are resized and cropped.

    Args:
        sizes (`np.ndarray` of shape `(P, 2, 2)`): Height and width of winners and losers.
        targets (`np.ndarray` of shape `(P, 2)` or `(1, 2)`): Height and width at which they are trained.
    """
    if not len(sizes):
        return ()
    scales = (targets[:, None] / sizes).max(axis=2)  # (P, 2)
    ratios = sizes[..., 0] / sizes[..., 1] / (targets[:, 0] / targets[:, 1])[:, None]
    cropped = 1 - np.minimum(ratios, 1 / ratios)  # shares of the images' areas
    strongly = int((cropped > STRONG_CROP).any(axis=1).sum())
    used = len(np.unique(targets, axis=0))
    notes = [
        f"image sizes: pairs are trained at {used} size{'s' if used > 1 else ''}; of an image {cropped.mean():.1%} is "
        f"cropped on average and {cropped.max():.1%} at most, and in {strongly} pairs more than {STRONG_CROP:.0%}"
    ]
    enlarged = int((scales > 1).any(axis=1).sum())
    if enlarged:
        notes.append(f"{ENLARGED}: {enlarged} pairs have an image that is enlarged, at most {scales.max():.2f} times")
    return tuple(notes)


def _drops(kind: str, mask: np.ndarray, reason_of: Callable[[int], str]) -> list[tuple[str, int, str, int]]:
    """Return the first pairs of a mask with their reasons. The last entry also counts all further pairs."""
    pairs = np.flatnonzero(mask).tolist()
    drops = [(kind, pair, reason_of(pair), 1) for pair in pairs[:MAX_EXAMPLES]]
    if drops:
        drops[-1] = (*drops[-1][:3], 1 + len(pairs) - len(drops))
    return drops


def _problem(source: Any, pair: np.ndarray, reader: ImageReader) -> str:
    """Return the reason why an image size of a pair cannot be read."""
    for row, image in pair.reshape(2, 2).tolist():
        try:
            reader.size_at(source.images(row), image)
        except UndecodableImageError as error:
            return str(error)
    return "the size of an image could not be read"


def _read_sizes(source: Any, index: np.ndarray, reader: ImageReader, num_proc: int | None, peers: Peers) -> np.ndarray:
    """Return height and width of each pair's winner and loser, int64 of shape `(P, 2, 2)`; zeros if unreadable."""
    rows = np.unique(index[:, [0, 2]])
    share = np.array_split(rows, peers.count)[peers.index]
    if num_proc is None and forks_by_default() and len(share) >= FEW_HEADERS:
        num_proc = usable_cores(peers.count)
    options: dict[str, Any] = {"num_proc": num_proc, "batch_size": 1000, "desc": SIZES_READ}

    def read_share() -> list[pa.Array]:
        tables = [
            part.map_images(_size_table, own, reader, datasets.Value("int32"), **options)
            for part, own in source.split(share)
            if len(own)
        ]
        return [chunk for table in tables for chunk in table.with_format("arrow")[:]["results"].chunks]

    sides = pa.chunked_array(list(chain(*peers.gather_results(read_share))), pa.list_(pa.int32()))
    counts = compute.list_value_length(sides).to_numpy() // 2  # images of each row
    sizes = compute.list_flatten(sides).to_numpy().reshape(-1, 2).astype(np.int64)
    sizes = np.concatenate([sizes, [[0, 0]]])  # the last entry stands for missing images
    starts = np.cumsum(counts) - counts
    images = []
    for row, image in ((0, 1), (2, 3)):
        number = np.searchsorted(rows, index[:, row])
        is_there = index[:, image] < counts[number]
        images.append(sizes[np.where(is_there, starts[number] + index[:, image], -1)])
    return np.stack(images, axis=1)


def _size_table(table: pa.Table, columns: Sequence[str], in_list: bool, reader: ImageReader) -> dict[str, list]:
    rows = zip(*(map(_value, table.column(name)) for name in columns), strict=True)
    images_of_rows = (images_of_row(dict(zip(columns, row, strict=True)), columns, in_list) for row in rows)
    return {"results": [[side for image in images for side in _size(reader, image)] for images in images_of_rows]}


def _size(reader: ImageReader, image: Any) -> tuple[int, int]:
    try:
        return reader.size(image)
    except UndecodableImageError:
        return 0, 0


def _value(scalar: pa.Scalar) -> Any:
    """Convert an Arrow value to Python. Bytes become a view, because `as_py` would read a whole mapped file."""
    if not scalar.is_valid:
        return None
    if pa.types.is_struct(scalar.type):
        return {name: _value(field) for name, field in scalar.items()}
    if pa.types.is_list(scalar.type) or pa.types.is_large_list(scalar.type):
        return [_value(entry) for entry in scalar.values]
    if pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type):
        return memoryview(scalar.as_buffer())
    return scalar.as_py()
