"""Computes cache keys of VAE and text encoders: from facts about the model's files, or from hashes of the weights if
the model was not loaded from files."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import is_bs4_available, is_ftfy_available
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.frozen_components import VAE, FrozenComponents
from ..models.loading import LoadedModel
from ..utils.files import file_facts
from ..utils.processes import ALONE, Peers

VERSION = 3  # increase this if a code change alters encoded images, encoded prompts or reference errors
WHERE = ("cache_dir", "revision", "token")  # arguments that say where files are. The key does not contain them


class EncoderKey:
    """Cache key that identifies VAE and text encoders. Other models or other settings have another key."""

    def __init__(self, frozen: FrozenComponents, loaded: LoadedModel, peers: Peers = ALONE) -> None:
        self._frozen, self._loaded, self._peers = frozen, loaded, peers

    @functools.cached_property
    def facts(self) -> dict[str, dict[str, Any]]:
        """Everything that encoded images (`vae`) and encoded prompts (`text`) depend on, as values for JSON. All
        processes must read this property together, because the first process computes it for all."""
        return self._peers.first(self._facts)

    def _facts(self) -> dict[str, dict[str, Any]]:
        family, options = self._frozen.family, self._loaded.options
        dtypes = {name: str(getattr(family.pipeline, name).dtype) for name in family.frozen_components}
        configuration: Any = self._loaded.denoiser.config  # sets FLUX.1's prompt length
        common = {
            "version": VERSION,
            "family": family.name,
            "options": {name: str(options[name]) for name in sorted(options) if name not in WHERE},
            "libraries": [diffusers.__version__, transformers.__version__, torch.__version__],
        }
        weights = self._files() or self._hashes()
        return {
            "vae": {**common, "weights": weights["vae"], "dtype": dtypes[VAE]},
            "text": {
                **common,
                "weights": weights["text"],
                "dtypes": {name: dtype for name, dtype in dtypes.items() if name != VAE},
                "denoiser": {name: value for name, value in configuration.items() if not name.startswith("_")},
                "cleaning": {"bs4": is_bs4_available(), "ftfy": is_ftfy_available()},
            },
        }

    def _files(self) -> dict[str, Any] | None:
        """Return the model's commit on the Hub, or facts about its local files, such as sizes. Return `None` if the
        model was not loaded from files."""
        origin, options = self._loaded.name_or_path, self._loaded.options
        if origin is None or not options or any(isinstance(value, nn.Module) for value in options.values()):
            return None
        path = Path(origin)
        if path.is_file():
            return dict.fromkeys(("vae", "text"), [file_facts(path)])
        if path.is_dir():
            others = (VAE, self._frozen.family.denoiser_name)
            texts = [file for file in path.glob("*/*") if file.is_file() and file.parent.name not in others]
            return {
                "vae": [file_facts(file) for file in sorted(path.glob(f"{VAE}/*"))],
                "text": [file_facts(file) for file in sorted([*texts, *path.glob("*.json")])],
            }
        where = {key: options[key] for key in ("cache_dir", "revision") if options.get(key) is not None}
        index = try_to_load_from_cache(origin, "model_index.json", **where)
        return dict.fromkeys(("vae", "text"), [origin, Path(index).parent.name]) if isinstance(index, str) else None

    def _hashes(self) -> dict[str, str]:
        """Return hashes of all weights of VAE and text encoders, and of the tokenizers' vocabularies."""
        with self._frozen.in_use() as family:
            texts = {
                f"{part}.{name}": value
                for part in family.frozen_components
                if part != VAE
                for name, value in getattr(family.pipeline, part).state_dict().items()
            }
            tokenizers = [part for part in family.pipeline.components.values() if _is_tokenizer(part)]
            words = [[tokenizer.get_vocab(), tokenizer.model_max_length] for tokenizer in tokenizers]
            return {
                "vae": hash_of_tensors(family.pipeline.vae.state_dict()),
                "text": hash_of_tensors(texts, json.dumps(words, sort_keys=True)),
            }


def hash_of_tensors(tensors: Mapping[str, torch.Tensor], more: str = "") -> str:
    """Return one SHA-256 of the names, dtypes, shapes and all bytes of tensors, and of the text `more`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(more.encode())
    return digest.hexdigest()


def _is_tokenizer(part: Any) -> bool:
    return isinstance(part, PreTrainedTokenizerBase)
