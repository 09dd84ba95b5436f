"""Loading a checkpoint's pickled files such that none of them can run code."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..engines.sharding import unwrapping_refused_pickles
from ..utils._compat import numpy_safe_globals

TORCH_FILES = (".pt", ".pth", ".bin")
DISTRIBUTED_METADATA = "optimizer_*/*.metadata"  # of `torch.distributed.checkpoint`, for FSDP2's shards
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_METADATA_NAMES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def foreign_code(folder: Path, known: Sequence[type], *, part: int = 0, parts: int = 1) -> list[str]:
    """What a checkpoint's pickled files import besides tensors, numbers, settings and `known`, the engine's classes;
    one sentence a name. Of several shares of the files, `parts`, it checks one, and runs no code of them."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in TORCH_FILES and path.is_file())
    metadata = sorted(path for path in folder.glob(DISTRIBUTED_METADATA) if path.is_file())
    found = []
    with numpy_safe_globals(), safe_globals(list(known)):
        for file in files[part::parts]:
            found += [f"{file.relative_to(folder)} {word}" for word in _foreign_to_torch(file)]
    for file in metadata[part::parts]:
        found += [f"{file.relative_to(folder)} {word}" for word in _foreign_to_metadata(file)]
    return found


@contextlib.contextmanager
def tensors_only(known: Sequence[type], *, trust: bool) -> Iterator[None]:
    """Make every `torch.load` within raise `ValueError` on pickles that could run code, also in libraries that allow
    them. The classes `known`, the engine's, are allowed; with `trust`, all are."""
    if trust:
        yield
        return
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with safe_globals(list(known)), unwrapping_refused_pickles():
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            "A checkpoint must hold tensors, numbers and settings only. One of its files can run code when it is read: "
            "if you know who wrote it, set `trust_checkpoint=True`."
        ) from error
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _foreign_to_torch(file: Path) -> list[str]:
    try:
        return [f"asks for {name}" for name in sorted(get_unsafe_globals_in_checkpoint(file))]
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError, BadZipFile) as error:
        return [f"cannot be looked through: {error}"]


def _foreign_to_metadata(file: Path) -> list[str]:
    try:
        with open(file, "rb") as stream:
            _MetadataUnpickler(stream).load()
    except Exception as error:  # malformed pickles raise errors of many types
        return [str(error) if isinstance(error, _Foreign) else f"cannot be looked through: {error}"]
    return []


class _Foreign(pickle.UnpicklingError):
    """An import that the metadata of a distributed checkpoint does not need."""


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the metadata's classes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_NAMES:
            raise _Foreign(f"asks for {module}.{name}")
        return super().find_class(module, name)
