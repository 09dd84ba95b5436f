"""The sizes of all images, read from their headers before training, and what they make of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from .buckets import AspectRatioBuckets, PairSizes
from .checking import MAX_EXAMPLES, Peers, forks_by_default, usable_cores
from .formats import images_of_row
from .images import ImageReader, UndecodableImageError
from .transforms import Size

STRONG_CROP = 0.25  # share of an image's area; pairs that lose more are counted
FEW_HEADERS = 20_000  # below this, starting processes takes longer than reading in one
ENLARGED = "enlarged"
SIZES_READ = "Reading image sizes"


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
    if num_proc is None and forks_by_default() and len(share) >= FEW_HEADERS:
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
    """Return `(height, width)` of an image, zeros if it cannot be used."""
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
