"""Refuses to load a checkpoint's pickles if they could run code."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.serialization import safe_globals

from ..engines.sharding import unwrapping_refused_pickles
from ..utils.errors import UserError

DISTRIBUTED_METADATA = "optimizer_*/*.metadata"  # written by `torch.distributed.checkpoint` for FSDP2
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_REFUSED = (
    "The files of a checkpoint must contain tensors, numbers and settings only. One is damaged or could run code when "
    "it is loaded: {}. Resume from another checkpoint, or pass this checkpoint's folder as `model` to start anew from "
    "its weights."
)
_DAMAGED = (
    "A file of the checkpoint cannot be read: {}. Copy the checkpoint again if it is a copy, or resume from another "
    "one."
)
_METADATA_CLASSES = {
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}


@contextlib.contextmanager
def tensors_only(allowed: Sequence[type]) -> Iterator[None]:
    """Make every `torch.load` within the context, also in other libraries, refuse pickles that could run code.

    Args:
        allowed (`Sequence[type]`): Classes whose objects pickles may contain, because the engine saves some.

    Raises:
        `ValueError`: If a pickle could run code, or a file is damaged.
    """
    with _forced_weights_only(), safe_globals(list(allowed)):
        try:
            with unwrapping_refused_pickles():
                yield
        except pickle.UnpicklingError as error:
            # Without torch's message, which advises to load without a check.
            asked = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(_REFUSED.format(f"it asks for {asked[1]}" if asked else "no plain pickle")) from error
        except (SafetensorError, EOFError, FileNotFoundError) as error:
            raise UserError(_DAMAGED.format(error)) from error
        except RuntimeError as error:
            if "PytorchStreamReader" not in str(error):  # torch has no error class for a damaged file
                raise
            raise UserError(_DAMAGED.format(str(error).partition("\n")[0])) from error


@contextlib.contextmanager
def _forced_weights_only() -> Iterator[None]:
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def refuse_code_in_metadata(folder: Path) -> None:
    """Raise `ValueError` if FSDP2's metadata could run code. torch itself unpickles it without a check."""
    for file in sorted(folder.glob(DISTRIBUTED_METADATA)):
        try:
            with open(file, "rb") as stream:
                _MetadataUnpickler(stream).load()
        except Exception as error:  # malformed pickles raise errors of many types
            raise UserError(_REFUSED.format(f"{file.relative_to(folder)}: {error}")) from error


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses all classes except those that FSDP2's metadata can contain."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_dtype and name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
