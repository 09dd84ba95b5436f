"""Reading of image sizes from the headers before training, and removal of pairs with small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from ..utils.processes import Peers, forks_by_default, usable_cores
from .buckets import AspectRatioBuckets, PairSizes
from .checking import MAX_EXAMPLES
from .formats import images_of_row
from .images import ImageReader, UndecodableImageError
from .transforms import Size

STRONG_CROP = 0.25  # share of an image's area; pairs that lose more to cropping are counted
FEW_HEADERS = 20_000  # with fewer headers, one process is faster than starting several
ENLARGED = "enlarged"
SIZES_READ = "Reading image sizes"


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
