"""Describe what a stored result depends on, and say what differs when it is used again.

A cache, saved scores, images of an evaluation, a resumed run: each stores its description as JSON beside its values. A
name is not an identity: files are described by size and times, objects in memory by their weights **and** configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedTokenizerBase

from .files import file_facts, write_atomically

_SHOWN = 60  # characters of a value in a sentence


def plain(value: Any) -> Any:
    """Return a description as `json` would read it back: tuples become lists, unknown objects their text."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return what differs between two descriptions, one phrase per value: `scheduler.shift was 3.0, is 1.0`.

    Values under names that only one of the two has differ too.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for key in sorted({*before, *now}, key=str):
            inner = f"{name}.{key}" if name else str(key)
            if key not in before:
                found.append(f"{inner} was not there, is {_short(now[key])}")
            elif key not in now:
                found.append(f"{inner} was {_short(before[key])}, is not there")
            else:
                found += differences(before[key], now[key], inner)
        return found
    before, now = plain(before), plain(now)
    return [] if before == now else [f"{name or 'the value'} was {_short(before)}, is {_short(now)}"]


def write_description(path: Path, description: Mapping[str, Any]) -> None:
    """Write a description as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plain(description), indent=1, sort_keys=True).encode() + b"\n")


def read_description(path: Path) -> dict[str, Any] | None:
    """Return a stored description, or `None` if there is no file or it is not a JSON object."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def short_hash(description: Any) -> str:
    """Return 16 hexadecimal digits that name a description, for names of files and folders."""
    return hashlib.sha256(json.dumps(plain(description), sort_keys=True).encode()).hexdigest()[:16]


# ---- Models ---------------------------------------------------------------------------------------------------------


def describe_files(files: Iterable[Path], root: Path | None = None) -> dict[str, Any]:
    """Return size, modification time and change time of files, by their path (relative to `root` if it is given).

    The description of a file changes whenever the file is replaced, because programs cannot set the change time back.
    """
    return {str(file if root is None else file.relative_to(root)): file_facts(file)[1:] for file in sorted(files)}


def describe_source(source: str | Path, **where: Any) -> dict[str, Any]:
    """Describe a model's folder, file or Hub id: local files with sizes and times, or the commit on the Hub.

    Args:
        where: `cache_dir` and `revision` with which a Hub id is loaded.
    """
    path = Path(source)
    if path.is_file():
        return {"source": str(path.absolute()), "files": describe_files([path], path.parent)}
    if path.is_dir():
        # A run's checkpoints are not part of its final model.
        files = [file for file in path.rglob("*") if file.is_file() and _is_part_of_a_model(file.relative_to(path))]
        return {"source": str(path.absolute()), "files": describe_files(files, path)}
    return {"source": str(source), "commit": hub_commit(str(source), **where)}


def hub_commit(name: str, file: str = "model_index.json", **where: Any) -> str | None:
    """Return the commit of a Hub id whose file is in the local cache, or `None` if the file is not there."""
    known = {key: where[key] for key in ("cache_dir", "revision") if where.get(key) is not None}
    found = try_to_load_from_cache(name, file, **known)
    return Path(found).parent.name if isinstance(found, str) else None


def describe_pipeline(pipeline: DiffusionPipeline, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """Describe a pipeline in memory: its class and settings, and every component that is not left out."""
    left_out = {*leave_out}
    components = {name: part for name, part in pipeline.components.items() if name not in left_out}
    settings = {key: value for key, value in pipeline.config.items() if key not in pipeline.components}
    return {
        "class": type(pipeline).__name__,
        "config": _public(settings),
        **{name: describe_component(part) for name, part in sorted(components.items())},
    }


def describe_component(part: Any) -> Any:
    """Describe a component of a pipeline: a network by all its weights and its configuration, a tokenizer by its
    vocabulary and settings, a scheduler or image processor by its configuration."""
    if part is None:
        return None
    described: dict[str, Any] = {"class": type(part).__name__}
    config = getattr(part, "config", None)
    if config is not None:
        described["config"] = _public(config.to_dict() if callable(getattr(config, "to_dict", None)) else config)
    if isinstance(part, nn.Module):
        described["weights"] = hash_of_tensors(part.state_dict())
    elif isinstance(part, PreTrainedTokenizerBase):
        described |= {
            "vocabulary": short_hash(part.get_vocab()),
            "settings": _public({**part.init_kwargs, "model_max_length": part.model_max_length}),
            "chat_template": part.chat_template,
        }
    elif config is None and callable(getattr(part, "to_dict", None)):  # image processors of transformers
        described["config"] = _public(part.to_dict())
    return described


def hash_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one SHA-256 of the names, dtypes, shapes and all bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out private entries, which say where a component came from and not what it does."""
    return {str(key): value for key, value in config.items() if not str(key).startswith("_")}


def _is_part_of_a_model(file: Path) -> bool:
    return not any(part.startswith("checkpoint-") or part.startswith(".") for part in file.parts) and (
        file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model", ".gguf", ".ckpt", ".jinja")
    )


def _short(value: Any) -> str:
    text = json.dumps(plain(value), sort_keys=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
