"""Describe what a stored result depends on, and say what differs when it is used again.

A cache, saved scores, images of an evaluation, a resumed run: each stores its description as JSON beside its values. A
name is not an identity: files are described by size and times, objects in memory by weights **and** configuration.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ._compat import float32_precision, repo_folder_name
from .files import file_facts, write_atomically
from .secrets import masked

_SHOWN = 60  # characters of a value in a sentence
_LISTED = 8  # differences in a sentence
# A model's files are in its folder and in those of its components. A folder without any such file is no component.
_OF_A_COMPONENT = ("config.json", "index.json", "setup.json", ".safetensors", ".bin", ".gguf", ".ckpt", ".pt", ".pth")
_OF_NO_COMPONENT = (".md", ".png", ".jpg", ".jpeg", ".webp", ".svg", ".html", ".csv", ".log", ".jsonl", ".partial")
_OF_TRAINING = ("training", "gradient_checkpointing")  # switches that change no result
# Settings of a tokenizer that say where it came from, not what it does.
_WHERE = re.compile(r"_file|name_or_path|is_local|local_files_only|cache_dir|revision|commit_hash|^token$|auth_token")


# ---- Comparing ------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return a description as `json` would read it back: tuples and sets become lists, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=_text)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        return hash_of_tensors({"": value})
    if isinstance(value, type | FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, str | int | float):
        return value
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))  # the address of an object is another in every run


def differences(before: Any, now: Any) -> list[str]:
    """Return what differs between two descriptions, one phrase per value: `scheduler.shift was 3.0, is 1.0`.

    Values under names that only one of the two has differ too. Join the phrases with [`listed`].
    """
    return list(_differences(plain(before), plain(now), ""))


def _differences(before: Any, now: Any, name: str) -> Iterator[str]:
    key = name.rpartition(".")[2]
    if isinstance(before, dict) and isinstance(now, dict):
        for inner in sorted({*before, *now}):
            path = f"{name}.{inner}" if name else inner
            if inner not in before:
                yield f"{path} was not there, is {_short(now[inner], inner)}"
            elif inner not in now:
                yield f"{path} was {_short(before[inner], inner)}, is not there"
            else:
                yield from _differences(before[inner], now[inner], path)
    elif before != now and _text(before) != _text(now):  # NaN equals itself only as text
        yield f"{name or 'the value'} was {_short(before, key)}, is {_short(now, key)}"


def listed(found: Sequence[str]) -> str:
    """Join what [`differences`] found for a sentence: the first few, and the number of the others."""
    more = [f"and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
    return "; ".join([*found[:_LISTED], *more])


def write_description(path: Path, description: Mapping[str, Any]) -> None:
    """Write a description as JSON, atomically. It must have no secrets: leave out keys, tokens and signatures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plain(description), indent=1, sort_keys=True).encode() + b"\n")


def read_description(path: Path) -> dict[str, Any] | None:
    """Return a stored description, or `None` if there is no file or it is not a JSON object."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return stored if isinstance(stored, dict) else None


def short_hash(description: Any) -> str:
    """Return 16 hexadecimal digits that name a description, for names of files and folders."""
    return hashlib.sha256(_text(plain(description)).encode()).hexdigest()[:16]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any, name: str) -> str:
    text = _text(masked(value, name))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


# ---- Files ----------------------------------------------------------------------------------------------------------


def describe_files(files: Iterable[Path], root: Path | None = None) -> dict[str, Any]:
    """Return size, modification time and change time of files, by their path (relative to `root` if given).

    They change whenever a file is replaced, because programs cannot set the change time back.
    """
    return {
        (file if root is None else file.relative_to(root)).as_posix(): file_facts(file)[1:] for file in sorted(files)
    }


def describe_source(source: str | Path, **where: Any) -> dict[str, Any]:
    """Describe a model's folder, file or Hub id: local files with sizes and times, or the commit on the Hub.

    A model that needs another one, such as a LoRA its base, is described without it: describe both.

    Args:
        where: `cache_dir` and `revision` with which a Hub id is loaded. Others are ignored.
    """
    path = Path(source)
    if path.is_file():
        return {"source": str(path.absolute()), "files": describe_files([path], path.parent)}
    if path.is_dir():
        return {"source": str(path.absolute()), "files": describe_files(_model_files(path), path)}
    return {"source": str(source), "commit": hub_commit(str(source), **where)}


def hub_commit(name: str, cache_dir: Any = None, revision: str | None = None, **_: Any) -> str | None:
    """Return the commit of a Hub id that the local cache holds for a revision, or `None`."""
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    revision = revision or constants.DEFAULT_REVISION
    try:
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except OSError:  # a commit has no file in `refs`
        return revision if (folder / "snapshots" / revision).is_dir() else None


def _model_files(folder: Path) -> list[Path]:
    """Return the files of a model in a folder. A run's checkpoints, images and logs are not part of its model."""
    # Not `rglob`, which does not enter folders that are links.
    found = [file for pattern in ("*", "*/*", "*/*/*") for file in folder.glob(pattern) if file.is_file()]
    files = [
        file
        for file in found
        if file.suffix not in _OF_NO_COMPONENT
        and not any(part.startswith(("checkpoint-", ".")) for part in file.relative_to(folder).parts)
    ]
    components = {file.parent for file in files if file.name.endswith(_OF_A_COMPONENT)}
    return [file for file in files if file.parent in components]


# ---- Objects in memory ----------------------------------------------------------------------------------------------


def describe_pipeline(
    pipeline: DiffusionPipeline, leave_out: Iterable[str] = (), *, weights: Callable[[Any], str] | None = None
) -> dict[str, Any]:
    """Describe a pipeline in memory: its class and settings, and every component that is not left out.

    Args:
        weights (`Callable`, *optional*): From a network's tensors to their hash, by default of all bytes. Networks
            without weights (on the device `meta`) have no hash.
    """
    left_out = {*leave_out}
    components = {name: part for name, part in pipeline.components.items() if name not in left_out}
    settings = {key: value for key, value in pipeline.config.items() if key not in pipeline.components}
    return {
        "class": type(pipeline).__name__,
        "config": public_config(settings),
        **{name: describe_component(part, weights=weights) for name, part in sorted(components.items())},
    }


def describe_component(part: Any, *, weights: Callable[[Any], str] | None = None) -> Any:
    """Describe a component of a pipeline: a network by all its weights, its adapters' scales and its configuration, a
    tokenizer by its words and settings, a scheduler or image processor by its configuration. For `weights`, see
    [`describe_pipeline`]."""
    config = getattr(part, "config", None)
    described: dict[str, Any] = {"class": type(part).__name__}
    if isinstance(part, nn.Module):
        tensors = part.state_dict()
        if not any(tensor.is_meta for tensor in tensors.values()):
            described["weights"] = (weights or hash_of_tensors)(tensors)
        described |= _switches(part)
    elif isinstance(part, PreTrainedTokenizerBase):
        return described | _describe_tokenizer(part)
    elif config is None and _is_described(part):  # image processors of transformers
        described["config"] = public_config(part.to_dict())
    elif config is None:
        return plain(part)
    if isinstance(part, ProcessorMixin):
        parts = {name: value for name, value in vars(part).items() if _is_described(value)}
        described |= {name: describe_component(value) for name, value in parts.items()}
        described["chat_template"] = part.chat_template
    if config is not None:
        described["config"] = public_config(config.to_dict() if callable(getattr(config, "to_dict", None)) else config)
    return described


def _is_described(part: Any) -> bool:
    return isinstance(part, PreTrainedTokenizerBase) or callable(getattr(part, "to_dict", None))


def _switches(network: nn.Module) -> dict[str, Any]:
    """Return what neither weights nor configuration say: switches, such as the VAE's tiling, and adapters' scales."""
    switches = {
        name: value
        for name, value in vars(network).items()
        if isinstance(value, bool | int | float) and name[0] != "_" and name not in _OF_TRAINING
    }
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}
    scales = {
        name: [layer.active_adapters, layer.disable_adapters, layer.merged_adapters, getattr(layer, "scaling", None)]
        for name, layer in layers.items()
    }
    return {"switches": switches, **({"adapters": short_hash(scales)} if scales else {})}


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if not _WHERE.search(name)}
    words: Any = tokenizer.get_vocab()
    if tokenizer.is_fast:
        words = json.loads(tokenizer.backend_tokenizer.to_str())  # merges and normalization too
        words = {name: value for name, value in words.items() if name not in ("truncation", "padding")}  # of a call
    return {
        "words": short_hash(words),
        "config": public_config({**settings, "model_max_length": tokenizer.model_max_length}),
        "chat_template": tokenizer.chat_template,
    }


def describe_software() -> dict[str, Any]:
    """Describe the versions and the precision with which networks compute. Both change results in the last digits."""
    versions = {library.__name__: library.__version__ for library in (diffusers, transformers, torch)}
    return {**versions, "float32": float32_precision()}


def hash_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one SHA-256 of the names, dtypes, shapes and all bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def public_config(config: Any) -> Any:
    """Return a component's configuration without private entries, which say where it came from, and without its
    library's version, which [`describe_software`] has."""
    if isinstance(config, Mapping):
        entries = {str(key): value for key, value in config.items()}
        hidden = {key for key in entries if key.startswith("_") or key == "transformers_version"}
        return {key: public_config(value) for key, value in entries.items() if key not in hidden}
    return plain(config)
