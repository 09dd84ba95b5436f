"""What tells one training set from another, as a resumed run asks, at a price that does not grow with its images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import datasets
import numpy as np
from PIL import Image

from .images import UndecodableImageError

PROBED_PAIRS = 16  # of which prompts are read
PROBED_IMAGES = 4  # pairs whose images are read as well, undecoded


class Rows(Protocol):
    """Rows of a map-style source."""

    def prompt(self, row: int) -> str: ...

    def images(self, row: int) -> list[Any]: ...


def pairs_fingerprint(format_name: str, rows: Rows, places: np.ndarray, scores: np.ndarray | None) -> dict[str, Any]:
    """Of map-style pairs.

    Args:
        format_name (`str`): How the rows are read.
        rows (`Rows`): Where the pairs lie.
        places (int64 of shape `(P, 4)`): Where each pair's images are, as labels, drops and order have made it.
        scores (`np.ndarray` of shape `(P, 2)`, *optional*): Of winners and losers.

    Returns:
        `dict[str, Any]`: `format`, `pairs` (how many), `index` (a hash of all places and scores), `prompts` and
        `images` (hashes of those of a few pairs, spread over the set; `None` where a row reads otherwise each time).
        Equal on every machine.
    """
    index = hashlib.sha256(np.ascontiguousarray(places, dtype="<i8"))
    if scores is not None:
        index.update(np.ascontiguousarray(scores, dtype="<f8"))
    prompts = [int(places[pair, 0]) for pair in _spread(len(places), PROBED_PAIRS)]
    images = [int(places[pair, side]) for pair in _spread(len(places), PROBED_IMAGES) for side in (0, 2)]
    return {
        "format": format_name,
        "pairs": len(places),
        "index": _short(index),
        "prompts": _steady(lambda: [repr(rows.prompt(row)).encode() for row in prompts]),
        "images": _steady(lambda: [_stored(image) for row in images for image in rows.images(row)]),
    }


def stream_fingerprint(format_name: str, source: datasets.IterableDataset) -> dict[str, Any]:
    """Of a stream, from what it says of itself; no row is read, as the first may be behind a large buffer.

    Returns:
        `dict[str, Any]`: `format`, `columns`, `split` and `shards`.
    """
    return {
        "format": format_name,
        "columns": None if source.column_names is None else sorted(source.column_names),
        "split": None if source.split is None else str(source.split),
        "shards": source.num_shards,
    }


def _spread(length: int, wanted: int) -> Iterator[int]:
    wanted = min(length, wanted)
    return (place * length // wanted for place in range(wanted))


def _steady(read: Callable[[], list[bytes]]) -> str | None:
    """A hash of what is read, if it can be and is the same twice: rows may be made by code that draws at random."""
    try:
        hashes = {_short(hashlib.sha256(b"\0".join(read()))) for _ in range(2)}
    except UndecodableImageError:
        return None
    return hashes.pop() if len(hashes) == 1 else None


def _stored(image: Any) -> bytes:
    """What stands for an image that nobody decodes: its bytes, or its file's name, whose folder is the machine's."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        return repr((image.mode, image.size)).encode() + image.tobytes()
    if isinstance(image, str):
        return image.replace("\\", "/").rpartition("/")[2].encode()
    return image if isinstance(image, bytes) else repr(type(image)).encode()


def _short(digest: Any) -> str:
    return digest.hexdigest()[:16]
