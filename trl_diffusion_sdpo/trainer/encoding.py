"""Images and prompts encoded before training: a cache is built where it is not finished, by all processes together, and
data sets read from it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset

from ..cache.encoded_pairs import EncodedPairs, EncodedPrompts, ImageRows, distinct_prompts
from ..cache.encoder import (
    Written,
    conditioning_of,
    encode_images,
    encode_prompts,
    missing_shards,
    moments_of,
)
from ..cache.key import EncoderFacts, image_key, prompt_key
from ..cache.reference_pass import ErrorSettings
from ..cache.shards import ShardStore, stored_bytes
from ..data.checking import evenly_spaced
from ..data.pairs import PreferenceDataset
from ..data.transforms import pixels_as_floats
from ..engines.batch_loaders import load_one_by_one
from ..engines.processes import failing_together, peers
from ..families import Family
from ..models.frozen_components import FrozenComponents
from ..models.loading import LoadedModel
from ..utils.disk import DiskFullError, free_bytes, naming_the_disk, readable_size
from .diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

SHARD_PIXELS = 256 * 512 * 512  # of the images of a shard: a killed process repeats at most so many
SHARD_PROMPTS = 64
SAMPLED_PROMPTS = 8  # whose size is measured before all are encoded
TOLD = 5  # pairs that cannot be decoded


@dataclass
class EncodingReport:
    """Rows of the caches that are read, and what this run has encoded of them, by all processes.

    Attributes:
        images, prompts (`int`): Images, with each of their variants, and distinct prompts.
        bytes (`int`): On the disk.
        encoded_images, encoded_prompts (`int`): Of these, encoded in this run.
        image_seconds, prompt_seconds (`float`): That the images took, and then the prompts.
    """

    images: int = 0
    prompts: int = 0
    bytes: int = 0
    encoded_images: int = 0
    encoded_prompts: int = 0
    image_seconds: float = 0.0
    prompt_seconds: float = 0.0


@dataclass(frozen=True)
class _Cache:
    """The cache of a data set."""

    dataset: PreferenceDataset
    name: str
    rows: ImageRows
    texts: Sequence[str]
    digests: np.ndarray
    images: ShardStore
    prompts: ShardStore
    statistics: ShardStore  # of the VAE's weights

    @property
    def stores(self) -> tuple[ShardStore, ShardStore, ShardStore]:
        return self.images, self.prompts, self.statistics


class PairEncoding:
    """Makes data sets read encoded pairs, which are encoded first where they are not.

    Args:
        frozen ([`~trl_diffusion_sdpo.models.frozen_components.FrozenComponents`]): VAE and text encoders; brought only
            if something is to be encoded.
        loaded ([`~trl_diffusion_sdpo.models.loading.LoadedModel`]): Where they come from.
    """

    def __init__(self, frozen: FrozenComponents, loaded: LoadedModel, args: DiffusionSDPOConfig) -> None:
        self._frozen, self._args = frozen, args
        self.folder = Path(args.latent_cache_dir or default_cache_dir()).expanduser()
        self._peers = peers(args)
        self.facts = encoder_facts(loaded, args, self.folder)
        self.report = EncodingReport()

    def add_to(self, dataset: Any, name: str, *, compare: bool = True) -> None:
        """Make a data set read encoded pairs; one that does is left as it is. All processes must call it together.

        Args:
            name (`str`): Of the data set in messages.
            compare (`bool`): Whether to refuse data whose checked pairs have identical images.

        Raises:
            ValueError: If the data are a stream, prompts depend on others in their batch, or other processes do not see
                the files that one writes.
            DiskFullError: If there is too little room; what is finished stays.
        """
        self._check(dataset, name)
        if dataset.is_encoded:
            return
        cache, family = self._cache_of(dataset, name), self._frozen.family
        if any(missing_shards(store, self._peers) for store in cache.stores):  # a finished cache may be read-only
            with naming_the_disk(self.folder, setting="latent_cache_dir"), self._locked(cache.prompts, cache.images):
                self._complete(cache, compare)
        if len(cache.statistics):
            with failing_together(RuntimeError):
                stored = cache.statistics.read(0)
                family.keep_statistics({name: value.to(self._args.device) for name, value in stored.items()})
        prompts = EncodedPrompts(cache.prompts, cache.digests, family.host_conditioning)
        dataset.use_encoded(EncodedPairs(cache.images, cache.rows, prompts))
        self.report.images += len(cache.rows)
        self.report.prompts += len(cache.texts)
        self.report.bytes += cache.images.nbytes + cache.prompts.nbytes

    def _check(self, dataset: Any, name: str) -> None:
        if not isinstance(dataset, PreferenceDataset):
            raise ValueError(
                f"`precompute_latents=True` needs data whose rows can be read again, and the {name} data are a stream. "
                "Load them without `streaming=True`, or leave it off."
            )
        check_prompt_padding("precompute_latents", self._frozen.family, self._args)
        if dataset.has_loser_prompts and self._frozen.family.prompt_padding == "start":
            raise ValueError(
                f"`precompute_latents=True` encodes every prompt alone, and {self._frozen.family.name} pads prompts at "
                f"the start and attends to the padding: the two prompts of each pair of the {name} data depend on each "
                "other. Leave it off."
            )

    # ---- Which cache ----------------------------------------------------------------------------------------------

    def _cache_of(self, dataset: PreferenceDataset, name: str) -> _Cache:
        family, rows = self._frozen.family, ImageRows.of(dataset, self._args.latent_crops)
        with failing_together(RuntimeError):  # it reads rows
            texts, digests = distinct_prompts(dataset.prompts())
        key = image_key(self.facts.of_vae, family, dataset, rows, self._peers)
        return _Cache(
            dataset,
            name,
            rows,
            texts,
            digests,
            images=ShardStore(self.folder, key, len(rows), self._shard_rows(rows)),
            prompts=ShardStore(
                self.folder, prompt_key(self.facts.of_text, family, digests), len(texts), SHARD_PROMPTS
            ),
            statistics=ShardStore(
                self.folder, {**key, "kind": "statistics"}, int(bool(family.latent_statistics())), 1
            ),
        )

    def _shard_rows(self, rows: ImageRows) -> int:
        height, width = self._size
        return max(1, SHARD_PIXELS // (height * width) // rows.variants) * rows.variants

    @property
    def _size(self) -> tuple[int, int]:
        sides: Any = self._args.resolution
        return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])

    @contextlib.contextmanager
    def _locked(self, *stores: ShardStore) -> Iterator[None]:
        """Hold the stores' locks, in the first process, once other runs have released them."""
        with contextlib.ExitStack() as stack:
            self._peers.gather_results(lambda: _lock(stores if self._peers.index == 0 else (), stack))
            yield
            self._peers.gather_results(lambda: None)  # before the locks are released

    # ---- Encoding -------------------------------------------------------------------------------------------------

    def _complete(self, cache: _Cache, compare: bool) -> None:
        """Write the shards that are missing."""
        missing = [missing_shards(store, self._peers) for store in cache.stores]
        if any(missing):
            if self._args.verify_images == "sample":
                cache.dataset.check_sample(self._peers, compare=compare)
            with contextlib.ExitStack() as stack:
                with failing_together(RuntimeError):  # a device may have too little memory
                    family = stack.enter_context(self._frozen.in_use())
                self._peers.gather_results(lambda: self._check_disk(cache, missing, family))
                written = self._peers.gather_results(lambda: self._encode(cache, missing, family))
            self._tell(cache.name, written)
        self._peers.gather_results(lambda: self._check_finished(cache))

    def _encode(self, cache: _Cache, missing: list[list[int]], family: Family) -> tuple[Written, Written]:
        """This process's share."""
        images = encode_images(
            cache.dataset,
            cache.rows,
            cache.images,
            partial(self._moments, family),
            shards=missing[0],
            peers=self._peers,
            load=partial(self._load, cache),
        )
        alone = family.prompt_padding != "fixed"
        prompts = encode_prompts(
            cache.texts, cache.prompts, family.encode_prompts, shards=missing[1], peers=self._peers, alone=alone
        )
        if missing[2] and self._peers.index == 0:
            cache.statistics.write(0, {name: [value] for name, value in family.latent_statistics().items()})
        return images, prompts

    def _load(self, cache: _Cache, items: Dataset) -> Iterable[Any]:
        return load_one_by_one(self._args, items, cache.dataset, cache.rows.variants * 3 * math.prod(self._size))

    def _moments(self, family: Family, pixels: torch.Tensor) -> torch.Tensor:
        """Of pixels `(N, 3, H, W)`, uint8 on the host; as in training, they become floats on the device."""
        device = self._args.device
        if device.type in ("cpu", "mps"):  # to which nothing is copied from pinned memory
            return family.image_moments(pixels_as_floats(pixels.to(device)))
        pixels = pixels.pin_memory() if self._args.dataloader_pin_memory else pixels
        return family.image_moments(pixels_as_floats(pixels.to(device, non_blocking=True)))

    def _check_disk(self, cache: _Cache, missing: list[list[int]], family: Family) -> None:
        """Say in the first process how much will be written, and refuse what the disk has no room for."""
        if self._peers.index != 0:
            return
        blank = torch.zeros(3, *self._size, dtype=torch.uint8)
        image = stored_bytes(moments_of(partial(self._moments, family), [blank]))
        sample = [cache.texts[i] for i in evenly_spaced(len(cache.texts), SAMPLED_PROMPTS)]
        prompt = sum(
            stored_bytes(tensor)
            for text in sample
            for tensor in conditioning_of(family.encode_prompts, [text]).values()
        ) / len(sample)
        rows = [
            sum(len(store.rows_of(n)) for n in numbers) for store, numbers in zip(cache.stores, missing, strict=True)
        ]
        needed, free = rows[0] * image + int(rows[1] * prompt), free_bytes(self.folder)
        sizes = f"about {readable_size(needed)} in {self.folder}, of {readable_size(free)} that are free"
        logger.warning("%s data: encoding %d images and %d prompts, %s.", cache.name, rows[0], rows[1], sizes)
        if needed > free:
            raise DiskFullError(
                f"The {cache.name} data would take {sizes}. Free some, or choose another `latent_cache_dir`."
            )

    def _check_finished(self, cache: _Cache) -> None:
        for store in cache.stores:
            if not store.is_finished:
                raise ValueError(
                    f"All processes must see the cache that they write together, and process {self._peers.index} does "
                    f"not see all of {store.path}. Choose a `latent_cache_dir` on storage that all of them share."
                )

    def _tell(self, name: str, written: list[tuple[Written, Written]]) -> None:
        """Add to the report, and warn of images that cannot be decoded."""
        images, prompts = zip(*written, strict=True)
        self.report.encoded_images += sum(part.rows for part in images)
        self.report.encoded_prompts += sum(part.rows for part in prompts)
        self.report.image_seconds += max(part.seconds for part in images)
        self.report.prompt_seconds += max(part.seconds for part in prompts)
        bad = sorted(pair for part in images for pair in part.undecodable)
        if bad:
            listed = "".join(f"\n  pair {pair}: {reason}" for pair, reason in bad[:TOLD])
            logger.warning(
                "%s data: %d images cannot be decoded; their pairs are replaced by the next good ones:%s",
                *(name, len(bad), listed),
            )


def check_prompt_padding(setting: str, family: Family, args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` where prompts depend on the others in their batch, and `setting` meets them in others."""
    batch = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
    if family.prompt_padding == "start" and batch > 1:
        raise ValueError(
            f"`{setting}=True` encodes prompts in other batches than training, and {family.name} pads prompts at the "
            f"start and attends to the padding, so that a prompt depends on the others in its batch. Use batches of "
            f"one pair (`per_device_train_batch_size=1`, `per_device_eval_batch_size=1`) with "
            f"`gradient_accumulation_steps`, got {batch}, or leave it off."
        )


def encoder_facts(loaded: LoadedModel, args: DiffusionSDPOConfig, folder: Path) -> EncoderFacts:
    """What identifies VAE and text encoders of a model; `folder` keeps hashes of its files."""
    origin = loaded.name_or_path if loaded.options else None
    setting = "precompute_latents" if args.precompute_latents else "precompute_ref_errors"
    return EncoderFacts(
        loaded.family,
        name_or_path=origin,
        options=loaded.options,
        folder=folder,
        peers=peers(args),
        setting=setting,
    )


def stored_crops(args: DiffusionSDPOConfig) -> int | None:
    """Random crops of each image that are encoded; `None` where none are, as crops are drawn live or at the center."""
    return args.latent_crops if args.precompute_latents and args.random_crop else None


def default_cache_dir() -> Path:
    """`trl-diffusion-sdpo/encoded` in the user's folder of caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-diffusion-sdpo" / "encoded"


def _lock(stores: Sequence[ShardStore], stack: contextlib.ExitStack) -> None:
    """Take the stores' locks, waiting for other runs that hold them; the stack releases them."""
    for store in stores:
        store.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(store.path / "_run.lock")
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            logger.warning("Another run writes into %s (`latent_cache_dir`): waiting for it to end.", store.path)
            stack.enter_context(lock.acquire())


def error_settings(
    args: DiffusionSDPOConfig, folder: str, facts: Mapping[str, Any], *, to_inputs: Callable, load: Callable
) -> ErrorSettings:
    """How errors of the reference are computed before training, by settings; the rest is as of [`ErrorSettings`]."""
    return ErrorSettings(
        folder=folder,
        facts=facts,
        noise_draws=args.ref_noise_draws,
        batch_size=args.train_batch_size,
        eval_batch_size=args.eval_batch_size,
        to_inputs=to_inputs,
        load=load,
        show_progress=args.process_index == 0 and not args.disable_tqdm,
        peers=peers(args),
    )
