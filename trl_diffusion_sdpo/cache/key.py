"""Cache keys of what encodes: hashes of weights, and of what a fixed image and a fixed prompt are encoded to."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from datasets.fingerprint import Hasher
from diffusers.utils import is_bs4_available, is_ftfy_available
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.checking import ALONE, Peers, usable_cores
from ..data.transforms import pixels_as_floats
from ..families import Family
from ..models.frozen_components import VAE, FrozenComponents
from ..models.loading import LoadedModel
from ..utils.files import write_atomically

logger = logging.getLogger(__name__)

VERSION = 2  # raise it if the same settings give other moments, embeddings or errors
ENCODERS = "encoders"  # subfolder of hashes
MAX_THREADS = 8  # that hash tensors, each of them a copy on the host of one on the device
# What templates, cleaning and truncation change. It is longer than any family's limit of tokens.
PROBE = "A “photo” of 2 cats &amp; <b>one DOG</b>,  see https://example.org/a_b (très joli)! " * 60


class EncoderKey:
    """Cache key of VAE and text encoders.

    Each hash depends on all weights, and on what a fixed image or prompt is encoded to: so on precision, tokenizers,
    templates, and lengths of prompts. The encoders are loaded for it once. The hashes are then stored in `folder`, and
    read again as long as the model's files and the versions of the libraries stay the same.

    Args:
        frozen ([`~trl_diffusion_sdpo.models.frozen_components.FrozenComponents`]): VAE and text encoders.
        loaded ([`~trl_diffusion_sdpo.models.loading.LoadedModel`]): The model that they belong to.
        folder (`Path`): Folder of all caches.
        peers (`Peers`): The processes of this training. All must ask for hashes together; the first computes them.
    """

    def __init__(self, frozen: FrozenComponents, loaded: LoadedModel, folder: Path, peers: Peers = ALONE) -> None:
        self._frozen, self._loaded, self._folder, self._peers = frozen, loaded, folder, peers

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """The hashes `vae` and `text`."""
        return self._peers.first(self._hashes)

    def _hashes(self) -> dict[str, str]:
        files = self._files()
        if files is None:
            return self._computed()
        memory = self._folder / ENCODERS / f"{Hasher.hash([files, self._circumstances()])}.json"
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(memory.read_bytes()))
        hashes = self._computed()
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps(hashes).encode(), ending=f".{os.getpid()}.partial")
        except OSError as error:  # a complete cache may be read-only
            logger.warning("The hashes of the encoders cannot be stored in %s: %s.", memory.parent, error)
        return hashes

    def _files(self) -> Any:
        """The commit on the Hub, or names, sizes and times of local files; `None` if weights came from elsewhere."""
        origin, options = self._loaded.name_or_path, self._loaded.options
        if origin is None or not options or any(isinstance(value, nn.Module) for value in options.values()):
            return None
        path = Path(origin)
        if path.is_file():
            return file_key(path)
        if path.is_dir():
            return [file_key(file) for file in sorted([*path.glob("*.json"), *path.glob("*/*")]) if file.is_file()]
        where = {key: options[key] for key in ("cache_dir", "revision") if options.get(key) is not None}
        index = try_to_load_from_cache(origin, "model_index.json", **where)
        return [origin, Path(index).parent.name] if isinstance(index, str) else None

    def _circumstances(self) -> list[Any]:
        """What the same files may be encoded differently by."""
        family, options = self._frozen.family, self._loaded.options
        denoiser: Any = self._loaded.denoiser
        return [
            VERSION,
            family.name,
            dict(denoiser.config),  # FLUX.1 has its number of tokens from it
            self._loaded.denoiser_folder,
            {name: str(getattr(family.pipeline, name).dtype) for name in family.frozen_components},
            {name: options[name] for name in sorted(options) if name != "token"},
            (diffusers.__version__, transformers.__version__, torch.__version__),
            (is_bs4_available(), is_ftfy_available()),
        ]

    def _computed(self) -> dict[str, str]:
        with self._frozen.in_use() as family, torch.no_grad(), _without_warnings():
            prompt = family.encode_prompts([PROBE])
            tensors = {f"{VAE}.{name}": value for name, value in family.pipeline.vae.state_dict().items()}
            tensors["image"] = family.image_moments(pixels_as_floats(_fixed_image(family)))
            hashes = {"vae": hash_of_tensors(tensors)}
            for part in family.frozen_components:
                if part != VAE:
                    prompt |= {f"{part}.{k}": v for k, v in getattr(family.pipeline, part).state_dict().items()}
            parts = family.pipeline.components.values()
            words = [part.get_vocab() for part in parts if isinstance(part, PreTrainedTokenizerBase)]
            hashes["text"] = hash_of_tensors(prompt, json.dumps(words, sort_keys=True))
        return hashes


def file_key(file: Path) -> list[Any]:
    """Path, size, modification time and change time of a file. The change time cannot be set back."""
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def hash_of_tensors(tensors: Mapping[str, torch.Tensor], more: str = "") -> str:
    """Return the SHA-256 of names, dtypes, shapes and every byte of tensors on any device, and of further text."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores())) as pool:
        digests = pool.map(lambda name: _digest(name, tensors[name]), names)
        return hashlib.sha256(b"".join(digests) + more.encode()).hexdigest()


def _digest(name: str, tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _fixed_image(family: Family) -> torch.Tensor:
    """An image `(1, 3, H, W)`, uint8, with edges and all values."""
    side = 8 * family.vae_scale_factor
    values = torch.arange(3 * side * side, device=family.pipeline.vae.device) * 37 % 256
    return values.to(torch.uint8).view(1, 3, side, side)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the warnings about a prompt that is too long."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
