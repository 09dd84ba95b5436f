"""Aspect-ratio buckets: image sizes of about one area, the bucket of each pair, and an order of the pairs in which
every batch has one size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from itertools import chain, islice, pairwise
from math import isqrt
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
from torch.utils.data import Sampler

from ..sources.checking import MAX_EXAMPLES, Peers, forks_by_default, usable_cores
from ..sources.formats import images_of_row
from ..sources.images import ImageReader, UndecodableImageError
from ..sources.tables import ArrowSource, RowSource
from .transforms import Size

MIN_AREA = 0.9  # of a size, as a share of the target's: SDXL's list at 1024 pixels is what 64 pixels allow within it
STRONG_CROP = 0.25  # share of an image's area; pairs that lose more are counted
FEW_HEADERS = 20_000  # below this, starting processes takes longer than reading in one
ENLARGED = "enlarged"
SIZES_READ = "Reading image sizes"
ORDER = 1  # ends the key of an order's random numbers; those of pairs have no fourth part


@dataclass(frozen=True)
class AspectRatioBuckets:
    """Sizes of about the area of `resolution`, never above it, at aspect ratios up to `max_aspect_ratio`.

    For every shorter side that is a multiple of `step`, the longer side is the largest multiple of `step` that keeps
    the area and the aspect ratio within their bounds; sizes of less than nine tenths of the area are left out. All are
    there upright and lying. `resolution` itself is always one of them.

    At 1024 pixels in steps of 64, every size is in the list of SDXL (https://huggingface.co/papers/2307.01952,
    appendix I), which has further ones of smaller area.

    Args:
        resolution (`tuple[int, int]`): Height and width, in pixels.
        step (`int`): In pixels.
        max_aspect_ratio (`float`): Of the longer side to the shorter one.

    Raises:
        ValueError: If `resolution` is longer than `max_aspect_ratio`, or is the only size.
    """

    resolution: Size
    step: int = 64
    max_aspect_ratio: float = 2.0

    def __post_init__(self) -> None:
        short, long = sorted(self.resolution)
        if long > self.max_aspect_ratio * short:
            raise ValueError(
                f"`bucket_max_aspect_ratio` must allow the aspect ratio of `resolution`, {long / short:.3g}; got "
                f"{self.max_aspect_ratio}. Raise it, or choose a squarer `resolution`."
            )
        if len(self.sizes) == 1:
            raise ValueError(
                f"`aspect_ratio_buckets` needs several sizes, and `bucket_step={self.step}` with "
                f"`bucket_max_aspect_ratio={self.max_aspect_ratio}` leaves {self.resolution} alone. Use a smaller step "
                "or a larger ratio, or leave the buckets off."
            )

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes as `(height, width)`, the widest first."""
        height, width = self.resolution
        area = height * width
        by_ratio: dict[Fraction, Size] = {}
        for short in range(self.step, isqrt(area) + 1, self.step):
            long = min(area // short, int(self.max_aspect_ratio * short + 1e-6)) // self.step * self.step
            if long >= short and long * short >= MIN_AREA * area:
                by_ratio |= {Fraction(long, short): (long, short), Fraction(short, long): (short, long)}
        by_ratio |= {Fraction(height, width): (height, width), Fraction(width, height): (width, height)}
        return tuple(size for _, size in sorted(by_ratio.items()))

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """The bucket of each pair: that whose aspect ratio is nearest, as a logarithm, to the mean of the two images'.

        It minimises the sum of the two distances, by which images are cropped, and among equal sums the larger
        distance. Halfway between two buckets, the squarer one is taken. Computed in integers: every machine agrees.

        Args:
            sizes (`np.ndarray` of shape `(P, 4)`, int64): Height and width of the winner and of the loser, in pixels.

        Returns:
            `np.ndarray` of shape `(P,)`, uint16: Indices into `sizes`.
        """
        heights, widths = sizes[:, 0] * sizes[:, 2], sizes[:, 1] * sizes[:, 3]
        numbers = np.zeros(len(sizes), dtype=np.uint16)
        for (height, width), (next_height, next_width) in pairwise(self.sizes):
            # The product of two aspect ratios is twice their mean, as a logarithm.
            beyond, within = heights * (width * next_width), widths * (height * next_height)
            upright = height * next_height >= width * next_width
            numbers += beyond > within if upright else beyond >= within
        return numbers


@dataclass(frozen=True)
class PairSizes:
    """The size at which each pair is trained.

    Args:
        sizes (`tuple[Size, ...]`): Of the buckets, `(height, width)`.
        numbers (`np.ndarray` of shape `(P,)`): Of each pair's bucket.
    """

    sizes: tuple[Size, ...]
    numbers: np.ndarray

    def take(self, pairs: Any) -> PairSizes:
        """Those of some pairs, chosen by a slice, a mask or indices."""
        return PairSizes(self.sizes, self.numbers[pairs])

    def of(self, pair: int) -> Size:
        """`(height, width)` of a pair."""
        return self.sizes[self.numbers[pair]]

    def fingerprint(self) -> str:
        """A hash of all pairs' sizes, equal on every machine."""
        digest = hashlib.sha256(repr(self.sizes).encode())
        digest.update(np.ascontiguousarray(self.numbers, dtype="<u2").data)
        return digest.hexdigest()[:16]

    def repeats(self, group: int) -> int:
        """How many pairs an epoch takes a second time, to fill up the last `group` of each bucket."""
        counts = np.bincount(self.numbers)
        return int((-counts % group)[counts > 0].sum())


def candidates(pair: int, pairs: int, sizes: PairSizes | None, *, same_size: bool) -> Iterator[int]:
    """A pair, and those that take its place if it cannot be decoded: the next ones of its bucket, then, unless
    `same_size`, those of the others."""
    following = [range(pair, pairs), range(pair)]
    if sizes is None:
        yield from chain(*following)
        return
    for wanted in (True,) if same_size else (True, False):
        yield from (other for other in chain(*following) if (sizes.numbers[other] == sizes.numbers[pair]) == wanted)


class Repeated(int):
    """The index of a pair that fills up a batch: an evaluation does not count it."""


class BucketSampler(Sampler[int]):
    """An order of pairs in which every `group` consecutive ones have one size, so that all processes' batches of a step
    have. Pairs are shuffled, dealt to their buckets in that order, and a group comes where its first pair came. The
    last group of a bucket is filled with the bucket's first pairs.

    Args:
        pairs ([`PairSizes`]): The pairs' sizes.
        group (`int`): Pairs in the batches of all processes of a step.
        seed (`int`): Of the order.
        epoch (`Callable[[], int]`, *optional*): The epoch whose order is wanted; without it, pairs are not shuffled.
        drop_last (`bool`): Leave an incomplete last group of a bucket out instead of filling it.

    Raises:
        ValueError: If nothing is left.
    """

    def __init__(
        self,
        pairs: PairSizes,
        group: int,
        *,
        seed: int,
        epoch: Callable[[], int] | None = None,
        drop_last: bool = False,
    ) -> None:
        self._pairs, self._group, self._seed, self._epoch, self._drop_last = pairs, group, seed, epoch, drop_last
        counts = np.bincount(pairs.numbers)
        self._length = int((counts // group if drop_last else -(-counts // group)).sum()) * group
        if not self._length:
            raise ValueError(
                f"`dataloader_drop_last=True` leaves no batch: no bucket has the {group} pairs of a step's batches. "
                "Use a smaller `per_device_train_batch_size`, or keep the last batches."
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        for rows, repeated in zip(*self._groups(), strict=True):
            real = len(rows) - int(repeated.sum())
            yield from rows[:real].tolist()
            yield from map(Repeated, rows[real:].tolist())

    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of each group `(groups, group)`, and whether they fill it up."""
        order = np.arange(len(self._pairs.numbers))
        if self._epoch is not None:
            order = np.random.default_rng([self._seed, self._epoch(), 0, ORDER]).permutation(order)
        numbers = self._pairs.numbers[order]
        by_bucket = np.argsort(numbers, kind="stable")  # places in the order, bucket by bucket
        places, repeated = [], []
        for members in np.split(by_bucket, np.cumsum(np.bincount(numbers))[:-1]):
            count = len(members) // self._group if self._drop_last else -(-len(members) // self._group)
            filled = np.resize(members, count * self._group)  # from its beginning again
            places.append(filled)
            repeated.append(np.arange(len(filled)) >= len(members))
        groups = np.concatenate(places).reshape(-1, self._group)
        as_met = np.argsort(groups[:, 0])
        return order[groups[as_met]], np.concatenate(repeated).reshape(-1, self._group)[as_met]


@dataclass(frozen=True)
class Settled:
    """What the sizes of the images make of pairs.

    Args:
        kept (`np.ndarray` of shape `(P,)`, bool): Pairs that are not left out.
        sizes ([`PairSizes`], *optional*): Of those that are kept, with buckets.
        drops (`list[tuple]`): Kind, pair, reason and number of pairs of what is left out.
        notes (`tuple[str, ...]`): For the report.
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
    """Reads all sizes and leaves out the pairs of images that have none or are small; arguments as of `read_sizes`.

    Args:
        targets ([`AspectRatioBuckets`] or `Size`): What pairs are trained at.
        min_side (`int`, *optional*): Least pixels along the shorter side of an image.
    """
    read = read_sizes(source, index, reader, num_proc, peers)  # (P, 2, 2)
    readable, large = np.asarray((read > 0).all((1, 2))), np.asarray((read >= (min_side or 0)).all((1, 2)))
    drops = _drops("undecodable", ~readable, lambda pair: _problem(source, index[pair], reader))
    drops += _drops(
        "too_small",
        readable & ~large,
        lambda pair: f"{read[pair].min()} pixels along the shorter side, and `min_side={min_side}`",
    )
    kept = np.asarray(readable & large)
    if not isinstance(targets, AspectRatioBuckets):
        return Settled(kept, None, drops, describe_sizes(read[kept], np.array([targets])))
    sizes = PairSizes(targets.sizes, targets.assign(read[kept].reshape(-1, 4)))
    return Settled(kept, sizes, drops, describe_sizes(read[kept], np.array(sizes.sizes)[sizes.numbers]))


def _drops(kind: str, mask: np.ndarray, reason_of: Callable[[int], str]) -> list[tuple[str, int, str, int]]:
    """The pairs of a mask, the first ones with their reasons; the last of these stands for all others."""
    pairs = np.flatnonzero(mask)
    named = pairs[:MAX_EXAMPLES].tolist()
    amounts = [1] * len(named[:-1]) + [len(pairs) - len(named[:-1])]
    return [(kind, pair, reason_of(pair), amount) for pair, amount in zip(named, amounts, strict=False)]


def _problem(source: Any, pair: np.ndarray, reader: ImageReader) -> str:
    """Why the size of an image of a pair cannot be read."""
    for row, image in pair.reshape(2, 2).tolist():
        try:
            reader.size_at(source.images(row), image)
        except UndecodableImageError as error:
            return str(error)
    return "the size of an image could not be read"


def read_sizes(source: Any, index: np.ndarray, reader: ImageReader, num_proc: int | None, peers: Peers) -> np.ndarray:
    """The size of every image, from its header.

    Args:
        source: Of the images.
        index (`np.ndarray` of shape `(P, 4)`): As of [`build_index`].
        num_proc (`int`, *optional*): Processes of each peer; by default as many as there are cores where the source is
            fork-safe.
        peers (`Peers`): The processes that divide the images.

    Returns:
        `np.ndarray` of shape `(P, 2, 2)`, int64: Height and width of winner and loser; zeros where it is unreadable.
    """
    rows = np.unique(index[:, [0, 2]])
    share = np.array_split(rows, peers.count)[peers.index]
    if num_proc is None and source.fork_safe and forks_by_default() and len(share) >= FEW_HEADERS:
        num_proc = usable_cores(peers.count)
    nothing = np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int32)
    gathered = peers.gather_results(
        lambda: [_sizes_of(part, own, reader, num_proc) for part, own in source.split(share) if len(own)]
    )
    counts, sizes = (np.concatenate(parts) for parts in zip(nothing, *chain(*gathered), strict=True))
    sizes = np.concatenate([sizes, [[0, 0]]])  # the last one is of images that are missing
    starts = np.cumsum(counts) - counts
    images = []
    for row, image in ((0, 1), (2, 3)):
        place = np.searchsorted(rows, index[:, row])
        is_there = index[:, image] < counts[place]
        images.append(sizes[np.where(is_there, starts[place] + index[:, image], -1)])
    return np.stack(images, axis=1).astype(np.int64)


def _sizes_of(
    source: Any, rows: np.ndarray, reader: ImageReader, num_proc: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Number of images of each row `(R,)`, and the `(height, width)` of one after another; zeros if unreadable."""
    if isinstance(source, RowSource):
        read = source.map_images(partial(_size, reader), rows, num_proc, SIZES_READ)
        of_rows = [[] if isinstance(sizes, str) else sizes for sizes in read]
        counts = np.array([len(sizes) for sizes in of_rows], dtype=np.int64)
        return counts, np.array(list(chain(*of_rows)), dtype=np.int32).reshape(-1, 2)
    if not isinstance(source, ArrowSource):  # a mixture
        parts = [_sizes_of(part, own, reader, num_proc) for part, own in source.split(rows) if len(own)]
        return np.concatenate([counts for counts, _ in parts]), np.concatenate([sizes for _, sizes in parts])
    found = source.map_images(
        _size_table, rows, reader, datasets.Value("int32"), num_proc=num_proc, batch_size=1000, desc=SIZES_READ
    )
    sides = found.with_format("arrow")[:]["found"]
    counts = compute.list_value_length(sides).to_numpy() // 2
    return counts.astype(np.int64), compute.list_flatten(sides).to_numpy().reshape(-1, 2)


def describe_sizes(sizes: np.ndarray, targets: np.ndarray) -> tuple[str, ...]:
    """What resizing and cropping do to the images, in words.

    Args:
        sizes (`np.ndarray` of shape `(P, 2, 2)`): Height and width of winners and losers.
        targets (`np.ndarray` of shape `(P, 2)` or `(1, 2)`): Height and width that they are trained at.
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


def _size(reader: ImageReader, image: Any) -> tuple[int, int]:
    """`(height, width)` of an image, zeros where it cannot be read."""
    try:
        return reader.size(image)
    except UndecodableImageError:
        return 0, 0


def _size_table(table: pa.Table, columns: Sequence[str], in_list: bool, reader: ImageReader) -> dict[str, list]:
    values = [[value for chunk in table.column(name).chunks for value in _views(chunk)] for name in columns]
    rows = (images_of_row(dict(zip(columns, row, strict=True)), columns, in_list) for row in zip(*values, strict=True))
    return {"found": [[side for image in images for side in _size(reader, image)] for images in rows]}


def _views(array: pa.Array) -> list[Any]:
    """Values of an Arrow array as Python's, with bytes as views of its memory: `to_pylist` would copy them."""
    if pa.types.is_struct(array.type):
        names, fields = [field.name for field in array.type], map(_views, array.flatten())
        return [dict(zip(names, values, strict=True)) for values in zip(*fields, strict=True)]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        values = iter(_views(array.flatten()))
        return [list(islice(values, length or 0)) for length in array.value_lengths().to_pylist()]
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, np.int32 if pa.types.is_binary(array.type) else np.int64)
        view, spans = memoryview(data or b""), pairwise(ends[array.offset : array.offset + len(array) + 1].tolist())
        known = array.is_valid().to_pylist()
        return [view[start:end] if valid else None for (start, end), valid in zip(spans, known, strict=True)]
    return array.to_pylist()
