"""Loads a model once a machine: one process reads it, and the others map the memory of its weights."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import secrets
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import TrainingArguments

from ..utils.errors import UserError
from .engine_settings import shards_weights
from .processes import failing_together, gather_objects, several_processes
from .sharding import return_freed_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")
SMALLEST = 1 << 14  # bytes; smaller tensors are sent by value, because a mapping takes whole pages
FILES_AT_ONCE = 128  # by default, a process may have 1024 files open
FREED_AT_ONCE = 1 << 26  # bytes


def load_once(load: Callable[[], T], args: TrainingArguments) -> T:
    """Return what `load` returns, with weights that take host memory once for all processes of a machine. Call it in
    all processes.

    The first process of each machine calls `load`. The others get a copy of its result whose large tensors map the same
    memory, or the same safetensors file. Who writes to a tensor gets a private copy of the pages, so no process sees
    another's changes. The memory is free once all processes have moved or sharded the tensor.

    Every process calls `load` where that saves nothing (one process, or CPUs with an engine that keeps all weights in
    each), and where tensors are not plain ones on the CPU (quantized models) or no memory can be shared.

    Raises:
        `ValueError`: In all processes, if `load` raises an error in one.
    """
    saves = shards_weights(args) or args.device.type != "cpu"
    if sys.platform != "linux" or not saves or not several_processes():
        return load()
    rank = args.process_index
    with contextlib.ExitStack() as opened:
        reader = _find_reader(args.local_process_index == 0, rank, opened)
    readers = gather_objects(reader)
    loaded: Any = None
    packed: _Packer | None = None
    with failing_together(UserError, during_upload=True):  # a download may take hours too
        if reader == rank:
            loaded = load()
            packed = _pack(loaded) if readers.count(rank) > 1 else None
    counts = gather_objects(None if packed is None else len(packed.tensors))
    received: list[torch.Tensor] = []
    for start in range(0, max(count or 0 for count in counts), FILES_AT_ONCE):
        with contextlib.ExitStack() as opened:
            files: list[tuple[int, int]] = []
            with failing_together(UserError):
                if packed is not None:
                    files = _publish(packed.tensors[start : start + FILES_AT_ONCE], opened)
            pid, files = gather_objects((os.getpid(), files))[reader]
            with failing_together(UserError):  # the reader's files stay open until all have mapped them
                if reader != rank:
                    received += [_map(f"/proc/{pid}/fd/{file}", size) for file, size in files]
    if reader != rank:
        loaded = load() if counts[reader] is None else _Unpickler(received).load()
    return loaded


def _find_reader(offers: bool, rank: int, opened: contextlib.ExitStack) -> int:
    """Return the rank of the process that reads for this one: one that `offers` and whose open files this process can
    read, or this one. A random number in a file tells: in containers, another process may have the same id."""
    token = secrets.token_bytes(16)
    file = _memory_file(len(token), opened) if offers else None
    if file is not None:
        os.pwrite(file, token, 0)
    offered = gather_objects((os.getpid(), file, token))
    found = rank
    for other, (pid, file_of_other, theirs) in enumerate(offered if file is None else ()):
        with contextlib.suppress(OSError):
            if file_of_other is not None and _read_bytes(f"/proc/{pid}/fd/{file_of_other}") == theirs:
                found = other
                break
    gather_objects(None)  # the files stay open until all have looked
    return found


def _read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


class _Packer(pickle.Pickler):
    """Pickles an object without its large tensors: `tensors` has those in memory, and of those in a mapped file the
    place is pickled.

    Raises:
        `pickle.PicklingError`: If a tensor is not a plain one on the CPU or the meta device.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = [torch.empty(0)]  # the first one is the pickled object itself
        self._records: dict[int, tuple] = {}
        self._kept: list[torch.Tensor] = []  # so that no other tensor gets the same id
        self._mapped_files = _mapped_files()

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, torch.Tensor):
            return None
        is_plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided
        if not is_plain or value.is_quantized or value.device.type not in ("cpu", "meta"):
            raise pickle.PicklingError(f"it has a {type(value).__name__} of {value.dtype} on {value.device}")
        if value.is_meta or value.nbytes < SMALLEST or not value.is_contiguous():
            return None
        if id(value) not in self._records:
            place: Any = self._place_in_file(value)
            if place is None:
                place = len(self.tensors)
                self.tensors.append(value)
            self._kept.append(value)
            trains = value.requires_grad if isinstance(value, nn.Parameter) else None
            self._records[id(value)] = (id(value), place, value.dtype, tuple(value.shape), trains, vars(value))
        return self._records[id(value)]

    def _place_in_file(self, value: torch.Tensor) -> tuple[str, int, int] | None:
        """Return the path, offset and size of a tensor that lies in a mapped file, unchanged."""
        begin = value.data_ptr()
        for start, end, offset, path in self._mapped_files:
            if start <= begin and begin + value.nbytes <= end:
                return path, begin - start + offset, value.nbytes
        return None


class _Unpickler(pickle.Unpickler):
    """Reads what [`_Packer`] has pickled. `received` has its `tensors`, as bytes."""

    def __init__(self, received: list[torch.Tensor]):
        super().__init__(io.BytesIO(received[0].numpy().tobytes()))
        self._received = received
        self._tensors: dict[int, torch.Tensor] = {}  # one object for a tensor that modules share

    def persistent_load(self, record: tuple) -> torch.Tensor:
        key, place, dtype, shape, trains, attributes = record
        if key not in self._tensors:
            values = self._received[place] if isinstance(place, int) else _map_part(*place)
            tensor = values.view(dtype).view(shape)
            tensor = tensor if trains is None else nn.Parameter(tensor, requires_grad=trains)
            vars(tensor).update(attributes)
            self._tensors[key] = tensor
        return self._tensors[key]


def _pack(loaded: Any) -> _Packer | None:
    """Pickle what a process has loaded, or return `None` and log why it cannot be shared."""
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        packer.dump(loaded)
    except (pickle.PicklingError, TypeError, AttributeError) as error:  # all three say that an object has no pickle
        logger.info("Every process loads the model itself, because processes cannot share it: %s.", error)
        return None
    packer.tensors[0] = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    return packer


def _publish(tensors: list[torch.Tensor], opened: contextlib.ExitStack) -> list[tuple[int, int]]:
    """Move tensors one after the other into files in memory. Return each file and its size in bytes."""
    files = []
    moved = 0
    for tensor in tensors:
        file = _memory_file(tensor.nbytes, opened)
        path = f"/proc/self/fd/{file}"
        torch.from_file(path, True, tensor.nbytes, dtype=torch.uint8).copy_(tensor.detach().view(-1).view(torch.uint8))
        tensor.data = _map(path, tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        files.append((file, tensor.nbytes))
        moved += tensor.nbytes
        if moved >= FREED_AT_ONCE or tensor is tensors[-1]:
            return_freed_memory()
            moved = 0
    return files


def _memory_file(size: int, opened: contextlib.ExitStack) -> int:
    """Open a file in memory. Unlike files in /dev/shm, it may take all of the memory in a container too."""
    file = os.memfd_create("weights")
    opened.callback(os.close, file)
    os.ftruncate(file, size)
    return file


def _map(path: str, size: int) -> torch.Tensor:
    """Map a file, copied on write, as a tensor of bytes."""
    return torch.from_file(path, False, size, dtype=torch.uint8)


def _map_part(path: str, offset: int, size: int) -> torch.Tensor:
    """Map a part of a file, copied on write, as a tensor of bytes that has the part as its storage."""
    storage = torch.UntypedStorage.from_file(path, False, offset + size)
    return torch.asarray(storage[offset:], dtype=torch.uint8)


def _mapped_files() -> list[tuple[int, int, int, str]]:
    """Return start and end address, offset in the file and path of each mapping of a file whose pages this process has
    not changed."""
    unchanged = []
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            words = line.rstrip("\n").split(maxsplit=5)
            if not words[0].endswith(":"):
                mapping = words
            elif words[0] == "Anonymous:" and words[1] == "0" and len(mapping) == 6 and mapping[1] == "rw-p":
                unchanged.append(mapping)
    found = []
    for addresses, _, offset, _, inode, path in unchanged:
        if os.path.isfile(path) and os.stat(path).st_ino == int(inode):  # else the file was replaced meanwhile
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((start, end, int(offset, 16), path))
    return found
