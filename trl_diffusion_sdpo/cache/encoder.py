"""Encodes the images and the distinct prompts of pairs into shards, each process its share, and continues what a killed
run left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.checking import HOW_TO_DROP, Peers
from ..data.images import UndecodableImageError
from ..data.pairs import PreferenceDataset
from ..families.base import PIXELS_AT_ONCE
from .encoded_pairs import MOMENTS, SIZES, ImageRows
from .shards import ShardStore

IMAGES_AT_ONCE = range(2, 9)  # of the VAE: as many as `PIXELS_AT_ONCE` are, within this range
PROMPTS_AT_ONCE = range(4, 17)  # products of matrices round differently in smaller batches on CPUs

Encode = Callable[[torch.Tensor], torch.Tensor]
Load = Callable[[Dataset], Iterable[Any]]  # the items of a data set in their order
EncodePrompts = Callable[[list[str]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Written:
    """What a process has encoded.

    Args:
        rows (`int`): Images with each of their variants, or prompts.
        undecodable (`tuple[tuple[int, str], ...]`): Pairs of images that cannot be decoded, and why.
        seconds (`float`): That it took.
    """

    rows: int = 0
    undecodable: tuple[tuple[int, str], ...] = ()
    seconds: float = 0.0


def missing_shards(store: ShardStore, peers: Peers) -> list[int]:
    """The shards that are to be written, in any process; each looks at its share. Collective."""
    own = range(len(store))[peers.index :: peers.count]
    return sorted(number for found in peers.gather_results(lambda: store.missing(own)) for number in found)


def encode_images(
    dataset: PreferenceDataset,
    rows: ImageRows,
    store: ShardStore,
    encode: Encode,
    *,
    shards: Sequence[int],
    peers: Peers,
    load: Load,
) -> Written:
    """Write this process's share of `shards`.

    An image is decoded once for all its variants. Two or more images are encoded at a time, as in training: CPUs round
    the convolutions of a single one differently.

    Args:
        encode (`Callable`): Moments `(N, ...)` of pixels `(N, 3, H, W)`, uint8 on the host.
        shards (`Sequence[int]`): Those that no process has written yet.
        load (`Callable`): Reads the decoded images, with worker processes or without.

    Raises:
        ValueError: If an image cannot be decoded and the data set is strict. Otherwise its moments are empty.
        UnreadableImageError: If an image could not be read repeatedly, though it may be good.
    """
    start, own = time.monotonic(), list(shards)[peers.index :: peers.count]
    images = [list(_images_of(store, number, rows.variants)) for number in own]
    decoded = _Decoded(dataset, rows, [image for part in images for image in part])
    found = iter(load(decoded) if len(decoded) else ())
    bad: list[tuple[int, str]] = []
    with _progress("Encoding images", sum(map(len, images)) * rows.variants, peers) as bar:
        for number, part in zip(own, images, strict=True):
            shard = _ImageShard(len(store.rows_of(number)), encode, bar)
            for position, image in enumerate(part):
                variants = next(found)
                if isinstance(variants, UndecodableImageError):
                    bad.append((int(rows.places[image, 0]), str(variants)))
                    _check_may_be_left_out(variants, bad[-1][0], dataset)
                    continue
                for variant, (pixels, sizes) in enumerate(variants):
                    shard.add(position * rows.variants + variant, pixels, sizes)
            store.write(number, shard.columns())
    return Written(sum(len(store.rows_of(number)) for number in own), tuple(bad), time.monotonic() - start)


def _check_may_be_left_out(error: UndecodableImageError, pair: int, dataset: PreferenceDataset) -> None:
    """Raise where the image of an error must not be stored as one that cannot be decoded."""
    if dataset.strict:
        raise ValueError(f"Pair {pair}: {error}. {HOW_TO_DROP}")


def encode_prompts(
    prompts: Sequence[str],
    store: ShardStore,
    encode: EncodePrompts,
    *,
    shards: Sequence[int],
    peers: Peers,
    alone: bool,
) -> Written:
    """Write this process's share of `shards`.

    Args:
        encode (`Callable`): Conditioning `(N, ...)` of N prompts.
        alone (`bool`): Whether each prompt is encoded without others, whose lengths would change its own.
    """
    start, own = time.monotonic(), list(shards)[peers.index :: peers.count]
    count = sum(len(store.rows_of(number)) for number in own)
    with _progress("Encoding prompts", count, peers) as bar:
        for number in own:
            texts = [prompts[row] for row in store.rows_of(number)]
            parts = []
            for batch in _batches(texts, 1 if alone else PROMPTS_AT_ONCE[-1]):
                parts.append(conditioning_of(encode, batch, 2 if alone else PROMPTS_AT_ONCE[0]))
                bar.update(len(batch))
            names = parts[0]
            store.write(number, {name: [row for part in parts for row in part[name]] for name in names})
    return Written(count, seconds=time.monotonic() - start)


def conditioning_of(encode: EncodePrompts, prompts: Sequence[str], at_least: int = 1) -> dict[str, torch.Tensor]:
    """Conditioning of prompts on the CPU, encoded with repetitions of them where they are fewer than `at_least`."""
    repeated = list(prompts) * -(-at_least // len(prompts))
    with torch.no_grad():
        encoded = encode(repeated[: max(at_least, len(prompts))])
    return {name: value[: len(prompts)].cpu() for name, value in encoded.items()}


def moments_of(encode: Encode, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Moments on the CPU of pixels `(3, H, W)`, uint8; of a single image as in a batch of two."""
    batch = torch.stack([*pixels, *pixels] if len(pixels) == 1 else list(pixels))
    with torch.no_grad():
        return encode(batch)[: len(pixels)].cpu()


class _ImageShard:
    """Collects the rows of a shard, and encodes images of one size together."""

    def __init__(self, rows: int, encode: Encode, bar: Any) -> None:
        self._encode, self._bar = encode, bar
        self._waiting: dict[torch.Size, list[tuple[int, torch.Tensor]]] = {}
        self._moments: list[torch.Tensor | None] = [None] * rows
        self._sizes = torch.zeros(rows, 3, 2, dtype=torch.int32)

    def add(self, row: int, pixels: torch.Tensor, sizes: torch.Tensor) -> None:
        """A row's pixels `(3, H, W)`, uint8, and its sizes."""
        self._sizes[row] = sizes
        waiting = self._waiting.setdefault(pixels.shape, [])
        waiting.append((row, pixels))
        if len(waiting) >= min(max(PIXELS_AT_ONCE // pixels[0].numel(), IMAGES_AT_ONCE[0]), IMAGES_AT_ONCE[-1]):
            self._flush(pixels.shape)

    def columns(self) -> dict[str, Any]:
        """All rows; those that were not added have empty moments."""
        for shape in list(self._waiting):
            self._flush(shape)
        dtype = next((row.dtype for row in self._moments if row is not None), torch.float32)
        self._bar.update(sum(row is None for row in self._moments))
        empty = torch.empty(0, dtype=dtype)
        return {MOMENTS: [empty if row is None else row for row in self._moments], SIZES: self._sizes}

    def _flush(self, shape: torch.Size) -> None:
        waiting = self._waiting.pop(shape)
        for (row, _), moments in zip(waiting, moments_of(self._encode, [p for _, p in waiting]), strict=True):
            self._moments[row] = moments
        self._bar.update(len(waiting))


class _Decoded(Dataset):
    """The pixels and sizes of each image's variants, or why it cannot be decoded, for DataLoader workers."""

    def __init__(self, dataset: PreferenceDataset, rows: ImageRows, images: Sequence[int]) -> None:
        self._dataset, self._rows, self._images = dataset, rows, images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]] | UndecodableImageError:
        image = self._images[index]
        try:
            return self._variants(image)
        except UndecodableImageError as error:
            return type(error)(str(error))  # without what it holds of the image

    def _variants(self, image: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pair, side = self._rows.places[image].tolist()
        found = self._dataset.image_variants(pair, side, self._rows.draws_of(image))
        return [(pixels, torch.tensor([*sizes, pixels.shape[1:]], dtype=torch.int32)) for pixels, *sizes in found]


def _images_of(store: ShardStore, number: int, variants: int) -> range:
    rows = store.rows_of(number)
    return range(rows.start // variants, rows.stop // variants)


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _progress(name: str, total: int, peers: Peers) -> Any:
    return tqdm(total=total, desc=name, disable=peers.index != 0 or total == 0)
