"""Find out why diffusers could not load a pipeline, and say it."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from ..utils.errors import UserError

# Errors that diffusers and transformers raise for files that are missing, damaged or absurd. A `RuntimeError` may also
# say that weights do not fit into memory.
LOADING_ERRORS = (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "Download it again."


def check_parts(name_or_path: str, index: Mapping[str, Any], passed: Container[str]) -> None:
    """Raise `ValueError` if a pipeline's folder lacks a component that its `model_index.json` names, such as a
    tokenizer, or has a weight file without weights.

    Args:
        name_or_path (`str`): Folder or Hub id of the pipeline. A Hub id is not checked.
        index (`Mapping`): The pipeline's `model_index.json`.
        passed: Names of components that the caller passes as objects and the folder may lack.
    """
    for name, entry in index.items() if os.path.isdir(name_or_path) else ():
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or None in entry or name in passed:
            continue
        folder = Path(name_or_path) / name
        if not folder.is_dir() or not any(folder.iterdir()):
            raise UserError(
                f"The model_index.json of {name_or_path} lists the component {name} ({entry[1]}), but the folder "
                f"{folder} is missing or empty. Download the whole pipeline, or copy this folder from the base model."
            )
        for file in folder.glob("*.safetensors"):
            if _has_no_tensors(file):
                raise UserError(f"{file} must contain weights, but has no tensors. {_AGAIN}")


def what_is_wrong(name_or_path: str) -> str:
    """Return what is wrong with a pipeline's weight files and what to do about it. For a Hub id, these are the files in
    the local cache."""
    folder = _folder_of(name_or_path)
    files = sorted(folder.glob("*/*.safetensors")) if folder is not None else []
    for file in files:
        damage = _damage(file)
        if damage is not None:
            return f"{file} is damaged: {damage}. {_AGAIN}"
    for listing in sorted(folder.glob("*/*.safetensors.index.json")) if folder is not None else []:
        missing = _missing_shards(listing)
        if missing:
            return f"{listing.parent} lacks {len(missing)} of its weight files, such as {missing[0]}. {_AGAIN}"
    # Pickled weights beside safetensors files do no harm: they are not read.
    read = {file.parent for file in files}
    pickled = [file for file in folder.glob("*/*") if file.suffix in _PICKLES] if folder is not None else []
    pickled = [file for file in pickled if file.parent not in read]
    if pickled:
        return (
            f"The weights of every component must be in safetensors files. {name_or_path} has pickled weights such as "
            f"{pickled[0]}, which are never read. To convert them, load the pipeline in diffusers and call "
            "`save_pretrained`."
        )
    return (
        f"{name_or_path} could not be loaded. Every component of a pipeline needs its configuration and its weights "
        "in safetensors files."
    )


def _folder_of(name_or_path: str) -> Path | None:
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    try:
        cached = try_to_load_from_cache(name_or_path, "model_index.json")
    except ValueError:  # not a valid Hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _damage(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, or `None` if the file is complete."""
    try:
        with safe_open(file, "pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"it has {file.stat().st_size} bytes, and {error}" if file.exists() else "it is a broken symbolic link"


def _has_no_tensors(file: Path) -> bool:
    """Return whether a safetensors file is complete but empty. diffusers would then train from random weights."""
    try:
        with safe_open(file, "pt") as opened:
            return not opened.keys()
    except (SafetensorError, OSError):
        return False  # `what_is_wrong` explains this one


def _missing_shards(listing: Path) -> list[str]:
    try:
        names = set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return [listing.name]
    return sorted(name for name in names if not (listing.parent / name).is_file())
