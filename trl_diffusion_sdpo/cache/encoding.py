"""Encodes images and prompts before training. The processes share the rows that the cache lacks; in training, data sets
read it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.data_report import MAX_EXAMPLES
from ..data.dataset import PreferenceDataset
from ..data.images import UndecodableImageError
from ..data.transforms import pixels_as_floats
from ..engines.processes import failing_together
from ..families import Family
from ..families.base import PIXELS_AT_ONCE
from ..models.frozen_components import FrozenComponents
from ..utils.errors import UserError
from ..utils.processes import Peers
from .encoded_pairs import (
    MOMENTS,
    SIZES,
    UNREADABLE,
    Edit,
    EncodedPairs,
    ImageRows,
    drawn_edits,
    rows_and_digests,
    sorted_by_hash,
    texts_of,
)
from .key import EncoderKey
from .shards import ShardStore, complete

logger = logging.getLogger(__name__)

LATENTS = "latents"  # subfolder
PROMPTS = "prompts"  # subfolder
SHARD_PIXELS = 256 * 512 * 512  # number of image pixels per shard file. A killed process loses at most one shard
SHARD_IMAGES = 256  # largest number of encoded images per shard file, because opening a shard lists its names
SHARD_PROMPTS = 64
FEW_EPOCHS = 2  # in more of them, training draws nearly all images plain and mirrored
IMAGES_AT_ONCE = range(2, 9)  # images per VAE batch. Within this range, a batch has at most `PIXELS_AT_ONCE` pixels
PROMPTS_AT_ONCE = range(4, 17)  # prompts per batch. Below 4, CPUs round matrix products differently


@dataclass(frozen=True)
class EncodingSettings:
    """Settings of [`PairEncoding`]."""

    folder: Path  # folder of all caches
    device: torch.device  # device that encodes the images
    size: tuple[int, int]  # height and width of the images
    crops: int  # number of random crops of each image; unused if crops are centered
    # Returns the number of epochs in which training reads a data set, or `None` if all flips and crops may be read.
    epochs: Callable[[PreferenceDataset], int | None]
    largest_batch: int  # number of pairs in the largest batch of training and evaluation
    # Returns an iterable of a data set's items in order, from the data set, the pairs that it reads from, and the size
    # of an item in bytes.
    load: Callable[[Dataset, PreferenceDataset, int], Iterable[Any]]
    peers: Peers


@dataclass
class EncodingReport:
    """Numbers of images and prompts that a run reads from its caches, and how many of them it has encoded itself."""

    images: int = 0  # each crop and flip of an image counts as one image
    prompts: int = 0  # distinct prompts
    encoded_images: int = 0
    encoded_prompts: int = 0


@dataclass(frozen=True)
class _Cache:
    """Cache of one data set: stores of images, prompts and VAE statistics, and what their rows contain."""

    rows: ImageRows
    digests: np.ndarray  # sorted hashes of the distinct prompts, or of the distinct edits if there are source images
    images: ShardStore
    prompts: ShardStore
    statistics: ShardStore  # weights of the VAE with which latents are scaled; empty for most families


class PairEncoding:
    """Encodes the images and prompts that the cache of a data set lacks, and makes the data set read the cache. VAE and
    text encoders are loaded only if something must be encoded."""

    def __init__(self, frozen: FrozenComponents, key: EncoderKey, settings: EncodingSettings) -> None:
        self._frozen = frozen
        self._key = key
        self._settings = settings
        self._peers = settings.peers
        self.report = EncodingReport()

    @property
    def folder(self) -> Path:
        """Folder of all caches."""
        return self._settings.folder

    def add_to(self, dataset: PreferenceDataset, name: str) -> None:
        """Make a data set read encoded pairs from a cache. Call it in all processes together.

        Args:
            name (`str`): Name of the data set in error messages and logs.

        Raises:
            ValueError: If a prompt's encoding depends on the others of its batch, the cache cannot be written, or
                processes do not see each other's files.
            DiskFullError: If the disk is full. The shards that were already written stay in the cache.
        """
        prompts = 2 if dataset.has_loser_prompts else 1
        check_prompt_padding("precompute_latents", self._frozen.family, self._settings.largest_batch, prompts)
        cache = self._cache_of(dataset, name)
        stores = (cache.images, cache.prompts, cache.statistics)
        complete(stores, self._peers, partial(self._complete, dataset, name, cache))
        self._use(dataset, cache)

    # ---- Which cache ----------------------------------------------------------------------------------------------

    def _cache_of(self, dataset: PreferenceDataset, name: str) -> _Cache:
        family = self._frozen.family
        data = dataset.fingerprint(thorough=True, peers=self._peers)
        with failing_together(RuntimeError):
            rows, digests = rows_and_digests(dataset, self._settings.crops, data)
        images = {
            "vae": self._key.facts["vae"],
            "pixels": dataset.pixel_settings() | {"random_flip": rows.flips},
            "data": {name: value for name, value in data.items() if name != "prompts"},
            "seed of crops": None if rows.crops is None else rows.seed,
        }
        prompts: dict[str, Any] = {
            "text": self._key.facts["text"],
            "prompts": hashlib.sha256(np.ascontiguousarray(digests, dtype="<i8").data).hexdigest(),
        }
        if dataset.has_sources:
            prompts |= {name: images[name] for name in ("vae", "data", "pixels")}  # sources are cropped as images are
        drawn: list[Callable[[np.ndarray], np.ndarray] | None] = [None, None]
        epochs = self._settings.epochs(dataset) if dataset.is_for_training else None
        if epochs is not None and epochs <= FEW_EPOCHS:
            if rows.variants > 1:
                drawn[0] = partial(rows.drawn, epochs, dataset.losers)
            if dataset.has_sources:
                edits = drawn_edits(dataset, epochs, digests)
                drawn[1] = lambda _: edits
        return _Cache(
            rows,
            digests,
            images=ShardStore(self.folder / LATENTS, images, len(rows), drawn[0]),
            prompts=ShardStore(self.folder / PROMPTS, prompts, len(digests), drawn[1]),
            statistics=ShardStore(
                self.folder / LATENTS,
                {"vae": images["vae"], "kind": "statistics"},
                int(bool(family.latent_statistics())),
            ),
        )

    def _use(self, dataset: PreferenceDataset, cache: _Cache) -> None:
        family = self._frozen.family
        if len(cache.statistics):
            with failing_together(RuntimeError):
                stored = cache.statistics.read(0)
                family.keep_statistics({name: value.to(self._settings.device) for name, value in stored.items()})
        encoded = EncodedPairs(cache.images, cache.rows, cache.prompts, cache.digests, family.host_conditioning)
        dataset.use_encoded(encoded)
        self.report.images += cache.images.wanted
        self.report.prompts += cache.prompts.wanted

    # ---- Encoding -------------------------------------------------------------------------------------------------

    def _complete(self, dataset: PreferenceDataset, name: str, cache: _Cache, missing: Sequence[np.ndarray]) -> None:
        """Encode the missing rows of a cache, given as row numbers of images, prompts and statistics."""
        if self._peers.index == 0:
            counts = len(missing[0]), len(missing[1])
            logger.info("%s data: encoding %d images and %d prompts into %s.", name, *counts, self.folder)
        with contextlib.ExitStack() as stack:
            with failing_together(RuntimeError):
                family = stack.enter_context(self._frozen.in_use())
            encoded = self._peers.gather_results(lambda: self._encode(dataset, cache, missing, family))
        self._count(name, encoded)

    def _encode(
        self, dataset: PreferenceDataset, cache: _Cache, missing: Sequence[np.ndarray], family: Family
    ) -> tuple[int, int, list[tuple[int, str]]]:
        """Write this process's shards. Return the numbers of encoded images and prompts, and reasons for bad images."""
        images, undecodable = self._encode_images(dataset, cache, missing[0], family)
        if dataset.has_sources:
            prompts, unreadable = self._encode_edits(dataset, cache, missing[1], family)
            undecodable += unreadable
        else:
            prompts = self._encode_prompts(dataset, cache, missing[1], family)
        if len(missing[2]) and self._peers.index == 0:
            cache.statistics.write(0, {0: family.latent_statistics()})
        return images, prompts, undecodable

    def _encode_images(
        self, dataset: PreferenceDataset, cache: _Cache, missing: np.ndarray, family: Family
    ) -> tuple[int, list[tuple[int, str]]]:
        """Encode this process's share of the images. A shard has the crops and flips of its images that no other
        has."""
        rows, (height, width) = cache.rows, self._settings.size
        count, variants = rows.count, rows.variants
        size = max(1, min(SHARD_IMAGES, SHARD_PIXELS // (height * width)) // variants)  # number of images in a shard
        missing = missing[np.argsort(missing % count, kind="stable")]  # all variants of an image one after the other
        shard_of = missing % count // size
        numbers = _own_share(shard_of, self._peers)
        missing = missing[np.isin(shard_of, numbers)]
        starts = np.flatnonzero(np.diff(missing % count, prepend=-1))  # of the rows of each image
        parts = np.stack([starts, np.append(starts[1:], len(missing))[: len(starts)]], axis=1)
        sources = rows.sources() if len(missing) else np.empty((0, 2), int)
        # Arrays, because workers would copy lists.
        decoded = _Results(partial(_decoded_variants, dataset, rows, sources, missing), parts)
        loaded = self._settings.load(decoded, dataset, variants * 3 * height * width) if len(missing) else ()
        undecodable: list[tuple[int, str]] = []
        encoded = zip((missing[slice(*part)] for part in parts.tolist()), loaded, strict=True)
        with _progress("Encoding images", len(missing), self._peers) as bar:
            for number, of_shard in itertools.groupby(encoded, lambda entry: int(entry[0][0]) % count // size):
                waiting = _ImageBatches(partial(self._moments, family), bar)
                for of_image, item in of_shard:
                    if isinstance(item, UndecodableImageError):
                        pair = int(sources[of_image[0] % count, 0])
                        undecodable.append((pair, f"pair {pair}: {item}"))
                        waiting.leave_out(of_image.tolist())
                        continue
                    for row, (pixels, sizes) in zip(of_image.tolist(), item, strict=True):
                        waiting.add(row, pixels, sizes)
                cache.images.add(number, waiting.finished(), step=-(-count // size))
        return len(missing), undecodable

    def _encode_prompts(self, dataset: PreferenceDataset, cache: _Cache, missing: np.ndarray, family: Family) -> int:
        """Encode this process's share of the prompts. Prompts are encoded one by one if batches would change their
        padding."""
        numbers = _own_share(missing // SHARD_PROMPTS, self._peers)
        shards = [range(len(cache.digests))[number * SHARD_PROMPTS :][:SHARD_PROMPTS] for number in numbers]
        of_rows = sorted_by_hash(texts_of(dataset))[0] if shards else []
        alone = family.prompt_padding != "fixed"
        size = 1 if alone else PROMPTS_AT_ONCE[-1]
        count = sum(map(len, shards))
        with _progress("Encoding prompts", count, self._peers) as bar:
            for number, shard in zip(numbers, shards, strict=True):
                encoded = {}
                for batch in (shard[start : start + size] for start in range(0, len(shard), size)):
                    texts = [of_rows[row] for row in batch]
                    values = conditioning_of(family, texts, 2 if alone else PROMPTS_AT_ONCE[0])
                    for index, row in enumerate(batch):
                        encoded[row] = {name: value[index] for name, value in values.items()}
                    bar.update(len(batch))
                cache.prompts.write(number, encoded)
        return count

    def _encode_edits(
        self, dataset: PreferenceDataset, cache: _Cache, missing: np.ndarray, family: Family
    ) -> tuple[int, list[tuple[int, str]]]:
        """Encode this process's share of the edits (prompts with source images), one edit at a time. A shard has the
        edits that no other has."""
        missing = missing[np.isin(missing // SHARD_PROMPTS, _own_share(missing // SHARD_PROMPTS, self._peers))]
        of_rows = sorted_by_hash(texts_of(dataset))[0] if len(missing) else []
        edits = [of_rows[row] for row in missing.tolist()]
        height, width = self._settings.size
        sources = _Results(partial(_decoded_sources, dataset), edits)
        loaded = iter(self._settings.load(sources, dataset, 3 * height * width) if edits else ())
        copies = min(2, self._settings.largest_batch)
        undecodable: list[tuple[int, str]] = []
        with _progress("Encoding edits", len(edits), self._peers) as bar:
            for number, shard in itertools.groupby(missing.tolist(), lambda row: row // SHARD_PROMPTS):
                encoded = {}
                for row in shard:
                    (source_row, *_), _, prompt = of_rows[row]
                    item = next(loaded)
                    if isinstance(item, UndecodableImageError):
                        undecodable.append((source_row, f"row {source_row} {item}"))
                        encoded[row] = {UNREADABLE: torch.empty(0)}
                    else:
                        encoded[row] = encode_edit(family, prompt, item, copies)
                    bar.update()
                cache.prompts.add(number, encoded, step=-(-len(cache.digests) // SHARD_PROMPTS))
        return len(edits), undecodable

    def _moments(self, family: Family, pixels: torch.Tensor) -> torch.Tensor:
        """Run the VAE's encoder on uint8 pixels `(N, 3, H, W)`. As in training, the device converts them to floats."""
        return family.image_moments(pixels_as_floats(pixels.to(self._settings.device)))

    def _count(self, name: str, encoded: list[tuple[int, int, list[tuple[int, str]]]]) -> None:
        """Add the numbers of encoded images and prompts to the report. Log a warning if images cannot be decoded."""
        images, prompts, undecodable = zip(*encoded, strict=True)
        self.report.encoded_images += sum(images)
        self.report.encoded_prompts += sum(prompts)
        bad = sorted({image for images_of_process in undecodable for image in images_of_process})
        if bad:
            listed = "".join(f"\n  {reason}" for _, reason in bad[:MAX_EXAMPLES])
            logger.warning(
                "%s data: %d images cannot be decoded. The next good pair takes the place of theirs:%s",
                name,
                len(bad),
                listed,
            )


def check_prompt_padding(setting: str, family: Family, largest_batch: int, prompts_of_a_pair: int = 1) -> None:
    """Raise `ValueError` if a prompt's encoding depends on the others of its batch: `setting` encodes prompts in other
    batches than training."""
    depends = {"start"} if setting == "precompute_latents" else {"start", "end, shifting the image"}
    if family.prompt_padding in depends and largest_batch * prompts_of_a_pair > 1:
        advice = (
            "Use batches of one pair (`per_device_train_batch_size=1`, `per_device_eval_batch_size=1`) with "
            "`gradient_accumulation_steps`, or set"
        )
        if prompts_of_a_pair > 1:
            advice = f"Each pair has {prompts_of_a_pair} prompts, so even a batch of one pair depends on both. Set"
        raise UserError(
            f"`{setting}=True` encodes prompts in other batches than training, and {family.name} pads prompts so that "
            f"a prediction depends on the longest prompt of its batch. The largest batch size is {largest_batch}. "
            f"{advice} `{setting}=False`."
        )


def conditioning_of(family: Family, prompts: Sequence[str], at_least: int = 1) -> dict[str, torch.Tensor]:
    """Encode prompts, and return the results on the CPU. Prompts are repeated until the batch has `at_least`
    prompts."""
    repeated = list(prompts) * -(-at_least // len(prompts))
    with torch.no_grad():
        encoded = family.encode_prompts(repeated[: max(at_least, len(prompts))])
    return {name: value[: len(prompts)].cpu() for name, value in encoded.items()}


def encode_edit(family: Family, prompt: str, sources: list[Image.Image], copies: int) -> dict[str, torch.Tensor]:
    """Encode one edit, and return the resulting tensors on the CPU. It goes in a batch of `copies`: CPUs round batches
    of one differently."""
    with torch.no_grad():
        encoded = family.encode_edits([prompt] * copies, [sources] * copies)
    return {name: value[0].cpu() for name, value in encoded.items()}


def moments_of(encode: Callable[[torch.Tensor], torch.Tensor], pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run the VAE's encoder on uint8 images `(3, H, W)`, and return its output (moments) on the CPU. A single image
    goes in two copies: CPUs round convolutions of one image differently."""
    batch = torch.stack([*pixels, *pixels] if len(pixels) == 1 else list(pixels))
    with torch.no_grad():
        return encode(batch)[: len(pixels)].cpu()


class _ImageBatches:
    """Encodes the images of a shard in batches of equal image size, and collects the shard's rows."""

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], bar: Any) -> None:
        self._encode = encode
        self._bar = bar
        self._waiting: dict[torch.Size, list[tuple[int, torch.Tensor]]] = {}
        self._rows: dict[int, dict[str, torch.Tensor]] = {}

    def add(self, row: int, pixels: torch.Tensor, sizes: list[Any]) -> None:
        """Queue an image (uint8, `(3, H, W)`) for encoding. `sizes` is stored next to its latents."""
        self._rows[row] = {SIZES: torch.tensor(sizes, dtype=torch.int32)}
        waiting = self._waiting.setdefault(pixels.shape, [])
        waiting.append((row, pixels))
        if len(waiting) >= min(max(PIXELS_AT_ONCE // pixels[0].numel(), IMAGES_AT_ONCE[0]), IMAGES_AT_ONCE[-1]):
            self._flush(pixels.shape)

    def leave_out(self, rows: Sequence[int]) -> None:
        """Add the rows of an image that cannot be decoded. In these rows, `moments` is an empty tensor."""
        for row in rows:
            self._rows[row] = {MOMENTS: torch.empty(0), SIZES: torch.zeros(3, 2, dtype=torch.int32)}
        self._bar.update(len(rows))

    def finished(self) -> dict[int, dict[str, torch.Tensor]]:
        """Encode the remaining images, and return all rows of the shard."""
        for shape in list(self._waiting):
            self._flush(shape)
        return self._rows

    def _flush(self, shape: torch.Size) -> None:
        waiting = self._waiting.pop(shape)
        for (row, _), moments in zip(waiting, moments_of(self._encode, [p for _, p in waiting]), strict=True):
            self._rows[row][MOMENTS] = moments
        self._bar.update(len(waiting))


class _Results(Dataset):
    """Data set for workers. An item is the function's result for an argument, or its error if an image is
    undecodable."""

    def __init__(self, function: Callable[[Any], Any], arguments: Sequence[Any] | np.ndarray) -> None:
        self._function = function
        self._arguments = arguments

    def __len__(self) -> int:
        return len(self._arguments)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._function(self._arguments[index])
        except UndecodableImageError as error:
            return type(error)(str(error))  # a new error, without references to the image


def _decoded_variants(
    dataset: PreferenceDataset, rows: ImageRows, sources: np.ndarray, missing: np.ndarray, part: np.ndarray
) -> list[tuple[torch.Tensor, list[Any]]]:
    """Decode an image, and return pixels and sizes for each of its crops and flips in a part of the `missing` rows.

    The sizes are no tensors. They wait until the shard is full, and each tensor of a worker would keep a file open.
    """
    of_image = missing[slice(*part.tolist())].tolist()
    pair, side = sources[of_image[0] % rows.count].tolist()
    variants = dataset.image_variants(pair, side, [rows.draws_of(row) for row in of_image])
    return [(pixels, [*sizes, tuple(pixels.shape[1:])]) for pixels, *sizes in variants]


def _decoded_sources(dataset: PreferenceDataset, edit: Edit) -> list[Image.Image]:
    key, is_mirrored, _ = edit
    return dataset.sources_of(key, is_mirrored)


def _own_share(shards: np.ndarray, peers: Peers) -> list[int]:
    """Return the numbers of the shards that this process encodes. Other processes encode the other shards."""
    return np.unique(shards)[peers.index :: peers.count].tolist()


def _progress(name: str, total: int, peers: Peers) -> Any:
    return tqdm(total=total, desc=name, disable=peers.index != 0 or total == 0)
