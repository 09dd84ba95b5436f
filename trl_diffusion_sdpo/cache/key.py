"""What encoded images and prompts depend on: the key of their cache. Files are hashed once, and again when they
change."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PipelineQuantizationConfig
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.checking import ALONE, Peers, usable_cores
from ..data.pairs import PreferenceDataset
from ..families import Family
from ..utils.files import write_atomically
from .encoded_pairs import ImageRows
from .shards import own_ending

logger = logging.getLogger(__name__)

VERSION = 1  # of the contents: raise it where the same settings give other moments or embeddings
HASHES = "file_hashes.json"
MAX_THREADS = 8  # that hash tensors, each of them a copy on the host of one on the device
VAE = "vae"
# Entries of configurations that say where a model was loaded from, by which versions, how its attention runs, and how a
# tokenizer was called last; pipelines state lengths and padding at each call.
UNRELATED = (
    *("name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "attn_implementation"),
    *("processor_class", "truncation", "padding"),
)


class EncoderFacts:
    """Facts about VAE, text encoders and tokenizers of a pipeline.

    Args:
        family ([`~trl_diffusion_sdpo.families.Family`]): As loaded. Its VAE and text encoders may be on the meta
            device.
        name_or_path (`str`, *optional*): The folder or Hub id that their weights were read from. Without it, the
            tensors in memory are hashed.
        options (`Mapping`): With which they were read, of the pipeline's `from_pretrained`. Components in it came from
            elsewhere.
        folder (`Path`): Where hashes of files are kept.
        peers (`Peers`): The processes of this training. All of them must ask for facts together; the first reads the
            weights, once.
        setting (`str`): That asks for facts, in messages.
    """

    def __init__(
        self,
        family: Family,
        *,
        name_or_path: str | None,
        options: Mapping[str, Any],
        folder: Path,
        peers: Peers = ALONE,
        setting: str = "precompute_latents",
    ) -> None:
        self._family, self._origin, self._options, self._folder = family, name_or_path, options, folder
        self._peers, self._setting = peers, setting

    @functools.cached_property
    def of_vae(self) -> dict[str, Any]:
        """Of the VAE."""
        return self._peers.first(lambda: self._of_component(VAE))

    @functools.cached_property
    def of_text(self) -> dict[str, Any]:
        """Of text encoders and tokenizers."""
        return self._peers.first(self._of_text)

    def _of_text(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            name: self._of_component(name) for name in self._family.frozen_components if name != VAE
        }
        for name, part in self._family.pipeline.components.items():
            if isinstance(part, PreTrainedTokenizerBase | ProcessorMixin):
                facts[name] = _of_saved_files(part)
        return facts

    def _of_component(self, name: str) -> dict[str, Any]:
        part = getattr(self._family.pipeline, name)
        facts = {"class": type(part).__name__, "config": config_of(part), "weights": self._weights(name, part)}
        # The dtype in which it was loaded rounds the weights, whatever it runs in.
        quantization = _quantization(self._options.get("quantization_config"), name)
        loaded = {"dtype": str(part.dtype), "quantization": quantization}
        return {**facts, "loaded": loaded, "variant": self._options.get("variant")}

    def _weights(self, name: str, part: nn.Module) -> Any:
        if self._origin is None or name in self._options:
            return hash_of_tensors(part.state_dict())
        if Path(self._origin).is_file():
            return hashes_of([Path(self._origin)], self._folder / HASHES)
        folder = Path(self._origin) / name
        if folder.is_dir():
            files = sorted(folder.glob("*.safetensors"))  # others are never read
            return dict(zip([file.name for file in files], hashes_of(files, self._folder / HASHES), strict=True))
        options = {key: self._options[key] for key in ("cache_dir", "revision") if self._options.get(key) is not None}
        found = try_to_load_from_cache(self._origin, "model_index.json", **options)
        if not isinstance(found, str):
            raise ValueError(
                f"`{self._setting}` needs to know which commit of {self._origin} was loaded, and its files are not "
                "in the Hub's cache. Pass the folder of the pipeline."
            )
        return {"repository": self._origin, "commit": Path(found).parent.name}


def image_key(
    facts: Mapping[str, Any], family: Family, dataset: PreferenceDataset, rows: ImageRows, peers: Peers = ALONE
) -> dict[str, Any]:
    """Everything that the moments of a data set's images depend on. All processes must call it together.

    Args:
        facts (`Mapping`): Of the VAE.
        family ([`~trl_diffusion_sdpo.families.Family`]): With the VAE in the precision in which it encodes.

    Raises:
        ValueError: If two reads of a row differ.
    """
    variants = {"flips": rows.flips} if rows.crops is None else {"crops": rows.crops, "seed": rows.seed}
    data = dataset.fingerprint(thorough=True, peers=peers)
    if None in (data.pop("prompts"), data["images"]):
        raise ValueError(
            "`precompute_latents=True` needs data whose rows are equal at every read, and two reads of a row of the "
            f"{dataset.report.name} data differ. Use a data set without random rows, or leave it off."
        )
    return {
        "kind": "moments of images",
        "version": VERSION,
        "family": family.name,
        "vae": {**facts, "dtype": str(family.pipeline.vae.dtype)},
        "pixels": dataset.pixel_settings(),
        "data": data,
        "variants": variants,
    }


def prompt_key(facts: Mapping[str, Any], family: Family, digests: np.ndarray) -> dict[str, Any]:
    """Everything that the conditioning of prompts depends on; arguments as of `image_key`."""
    text_encoders = [name for name in family.frozen_components if name != VAE]
    return {
        "kind": "conditioning of prompts",
        "version": VERSION,
        "family": family.name,
        "text": dict(facts),
        "dtypes": {name: str(getattr(family.pipeline, name).dtype) for name in text_encoders},
        "prompts": hashlib.sha256(np.ascontiguousarray(digests, dtype="<i8").data).hexdigest(),
    }


def hashes_of(files: list[Path], memory: Path) -> list[str]:
    """The sha256 of each file; those of unchanged size and time are taken from `memory`, which is updated."""
    try:
        known = dict(json.loads(memory.read_bytes()))
    except (OSError, ValueError, TypeError):
        known = {}
    found, changed = [], False
    for file in files:
        path, status = str(file.resolve()), file.stat()
        stated = [status.st_size, status.st_mtime_ns]
        if known.get(path, [])[:2] != stated:
            with open(file, "rb") as content:
                known[path] = [*stated, hashlib.file_digest(content, "sha256").hexdigest()]
            changed = True
        found.append(known[path][2])
    if changed:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps(known, indent=1).encode(), ending=own_ending())
        except OSError as error:  # a finished cache may be read-only
            logger.warning("The hashes of the model's files were not kept in %s: %s.", memory, error)
    return found


def _quantization(config: Any, name: str) -> Any:
    """How a pipeline's configuration quantizes a component as it is read. Its own text names only what it has met."""
    if not isinstance(config, PipelineQuantizationConfig):
        return None if config is None else str(config)
    if config.quant_mapping:
        found = config.quant_mapping.get(name)
        return None if found is None else [type(found).__name__, _related(found.to_dict())]
    is_meant = not config.components_to_quantize or name in config.components_to_quantize
    return [config.quant_backend, _related(config.quant_kwargs)] if is_meant else None


def hash_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of names, dtypes, shapes and every byte of tensors that are whole in this process, on any device."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores())) as pool:
        return hashlib.sha256(b"".join(pool.map(lambda name: _digest(name, tensors[name]), names))).hexdigest()


def _digest(name: str, tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def config_of(part: Any) -> Any:
    """A model's configuration as values of JSON, without what says where it was loaded from and by what."""
    config = part.config.to_dict() if callable(getattr(part.config, "to_dict", None)) else dict(part.config)
    return _related(config)


def _related(value: Any) -> Any:
    """Values of JSON without `UNRELATED` and private entries."""
    if isinstance(value, Mapping):
        kept = {str(key): _related(entry) for key, entry in value.items()}
        return {key: kept[key] for key in sorted(kept) if key not in UNRELATED and not key.startswith("_")}
    if isinstance(value, list | tuple):
        return [_related(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _of_saved_files(part: Any) -> str:
    """A hash of the files that a tokenizer or processor saves."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(os.fsencode(path.relative_to(folder)) + b"\n" + _content(path))
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".json":
        return data
    try:
        return json.dumps(_related(json.loads(data)), sort_keys=True).encode()
    except ValueError:
        return data
