"""Rows of tensors in checksummed Arrow files, under a key of everything that they depend on. Several processes write
them, each file atomically, so that a killed run continues where it was; they are read by memory map."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch

from ..utils.files import write_atomically

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files
OPEN_SHARDS = 512  # memory maps of a process, of which the system allows some ten thousand
ABANDONED = 3600.0  # seconds after which a file that another machine was writing counts as left over
MANIFEST = "manifest.json"
SHAPE, CHECKSUM, DTYPE = ".shape", "checksum", "dtype"  # endings and names of columns, and a field's metadata


class DamagedShardError(ValueError):
    """A shard does not hold what was written into it."""


class ShardStore:
    """`rows` rows of named tensors, `shard_rows` in each file, in the folder `folder / <hash of the key>`.

    A file is an Arrow stream, which `datasets.Dataset.from_file` opens as well. A tensor is stored as its bytes
    without the zeros at their end, such as padding, with its shape in each row, which may differ between rows, and its
    dtype in the schema, which may not. A shard is finished when there is a checksum beside it.

    Args:
        folder (`str` or `os.PathLike`): Of stores of any key.
        key (`Mapping`): Everything that the rows depend on, as values of JSON. Another key is another folder.
        rows (`int`): Number of rows.
        shard_rows (`int`): Rows of a file.

    Raises:
        ValueError: If the key is no JSON, or a number is negative.
    """

    def __init__(self, folder: str | os.PathLike, key: Mapping[str, Any], rows: int, shard_rows: int) -> None:
        if rows < 0 or shard_rows < 1:
            raise ValueError(f"`rows` must be at least 0 and `shard_rows` at least 1, got {rows} and {shard_rows}.")
        self.rows, self.shard_rows = rows, shard_rows
        facts = {"format": FORMAT, "key": key, "rows": rows, "shard_rows": shard_rows}
        self._manifest = json.dumps(facts, sort_keys=True, indent=1, allow_nan=False) + "\n"
        self.digest = hashlib.sha256(self._manifest.encode()).hexdigest()
        self.path = Path(folder) / self.digest[:16]
        self._open: dict[int, pa.RecordBatch] = {}

    def __len__(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a pickled table would be a copy of the file

    def rows_of(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    def file(self, number: int) -> Path:
        """The Arrow file of a shard."""
        return self.path / f"{number:06d}.arrow"

    def missing(self, numbers: Iterable[int] | None = None) -> list[int]:
        """Shards to write: those that are unfinished, and those that are damaged or stale, which a warning names.

        A file that has not changed since its checksum was written is not read again, see `verify`. Remains of killed
        processes are deleted, so no other process may write these shards at the same time.

        Args:
            numbers (`Iterable[int]`, *optional*): The shards to look at; all by default. Processes may divide them.
        """
        return self._unusable(numbers, every_byte=False)

    def verify(self, numbers: Iterable[int] | None = None) -> list[int]:
        """As `missing`, but reads every file and compares its checksum."""
        return self._unusable(numbers, every_byte=True)

    def write(self, number: int, columns: Mapping[str, Sequence[torch.Tensor] | torch.Tensor]) -> None:
        """Write a shard; a kill leaves all of it or nothing.

        Args:
            number (`int`): Of the shard.
            columns (`Mapping[str, Sequence[torch.Tensor]]`): For each name a tensor a row, of one dtype and any shapes.

        Raises:
            ValueError: If a column has another number of rows than the shard, or several dtypes.
            OSError: If the disk is full; nothing of the shard is left on it.
        """
        batch, file = (
            self._record_batch(number, {name: list(column) for name, column in columns.items()}),
            self.file(number),
        )
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(self.path / MANIFEST, self._manifest.encode())
        self._write(file, lambda opened: _write_batch(opened, batch))
        facts = {"sha256": _sha256(file), "bytes": file.stat().st_size, "schema": _schema_checksum(batch)}
        self._write(self._checksum_file(number), (json.dumps(facts) + "\n").encode())
        self._open.pop(number, None)

    @staticmethod
    def _write(file: Path, content: Any) -> None:
        write_atomically(file, content, ending=own_ending())

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """The tensors of a row, copied to memory of their own.

        Raises:
            DamagedShardError: If the row's bytes are not those that were written, or its shard is not finished. The
                shard counts as unfinished from then on.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"The cache has the rows 0 to {self.rows - 1}, got {row}.")
        number, index = divmod(row, self.shard_rows)
        batch = self._batch(number)
        values = {name: batch.column(name)[index] for name in self._names(batch)}
        shapes = {name: batch.column(name + SHAPE)[index].as_py() for name in values}
        checksum = 0
        for name, value in values.items():
            checksum = _checksum(value.as_buffer(), shapes[name], checksum)
        if checksum != batch.column(CHECKSUM)[index].as_py():
            self._set_aside(number)
            raise DamagedShardError(self._refusal(number, f"row {row} does not have its checksum"))
        return {name: _tensor(value, shapes[name], self._dtype(batch, name)) for name, value in values.items()}

    @property
    def is_finished(self) -> bool:
        """Whether every shard has its checksum, as this process sees the folder."""
        return len({path.name for path in self.path.glob("*.sha256.json")}) == len(self)

    @cached_property
    def nbytes(self) -> int:
        """Size of the finished shards on the disk."""
        return sum(self.file(number).stat().st_size for number in range(len(self)))

    # ---- Checks ---------------------------------------------------------------------------------------------------

    def _unusable(self, numbers: Iterable[int] | None, every_byte: bool) -> list[int]:
        found = []
        numbers = range(len(self)) if numbers is None else list(numbers)
        own = set(numbers)
        for left in self.path.glob("*.tmp"):  # once: a million rows have thousands of shards
            is_own = int(left.name[:6]) in own if left.name[:1].isdigit() else 0 in own
            if is_own and not _is_being_written(left):
                left.unlink(missing_ok=True)
        for number in numbers:
            if not self._checksum_file(number).exists():
                found.append(number)
            elif problem := self._problem(number, every_byte):
                logger.warning("The shard %s %s. It will be rebuilt.", self.file(number), problem)
                self._set_aside(number)
                found.append(number)
        return found

    def _problem(self, number: int, every_byte: bool) -> str:
        """Why a finished shard cannot be used; empty if it can."""
        try:
            facts = json.loads(self._checksum_file(number).read_bytes())
            expected, size, schema = str(facts["sha256"]), int(facts["bytes"]), int(facts["schema"])
        except (ValueError, KeyError, TypeError):
            return "has a damaged checksum"
        try:
            status, checked = self.file(number).stat(), self._checksum_file(number).stat()
        except FileNotFoundError:
            return "is missing"
        if status.st_size != size:
            return f"has {status.st_size} bytes instead of {size}"
        changed = status.st_mtime_ns > checked.st_mtime_ns
        if (every_byte or changed) and _sha256(self.file(number)) != expected:
            return "does not have its checksum"
        try:
            batch = _open_batch(self.file(number))
        except (pa.ArrowException, OSError, StopIteration) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the system, such as too many open files: the shard may be good
            return f"is no Arrow file ({error})"
        if _schema_checksum(batch) != schema:
            return "has a damaged schema"
        stated = (batch.schema.metadata or {}).get(b"key", b"").decode()
        if stated != f"{self.digest}/{number}":
            return "is stale: it was written for another key"
        if changed:
            self._checksum_file(number).touch()  # not to be read again at the next start
        return ""

    def _set_aside(self, number: int) -> None:
        self._checksum_file(number).unlink(missing_ok=True)
        self._open.pop(number, None)

    def _refusal(self, number: int, problem: str) -> str:
        return f"The shard {self.file(number)} cannot be used: {problem}. Start again: it will be rebuilt."

    def _checksum_file(self, number: int) -> Path:
        return self.path / f"{number:06d}.sha256.json"

    # ---- Arrow ----------------------------------------------------------------------------------------------------

    def _record_batch(self, number: int, columns: dict[str, list[torch.Tensor]]) -> pa.RecordBatch:
        size = len(self.rows_of(number))
        arrays, fields, checksums = [], [], [0] * size
        for name, tensors in columns.items():
            dtypes = {tensor.dtype for tensor in tensors}
            if len(tensors) != size or len(dtypes) != 1:
                raise ValueError(
                    f"A column of shard {number} must have {size} tensors of one dtype; {name!r} has {len(tensors)} of "
                    f"{', '.join(sorted(str(dtype) for dtype in dtypes)) or 'none'}."
                )
            data, shapes = [_bytes(tensor) for tensor in tensors], [list(tensor.shape) for tensor in tensors]
            checksums = [_checksum(*row) for row in zip(data, shapes, checksums, strict=True)]
            arrays += [pa.array(data, pa.large_binary()), pa.array(shapes, pa.list_(pa.int32()))]
            dtype = str(dtypes.pop()).removeprefix("torch.")
            fields += [pa.field(name, pa.large_binary(), metadata={DTYPE: dtype})]
            fields += [pa.field(name + SHAPE, pa.list_(pa.int32()))]
        arrays += [pa.array(checksums, pa.uint32())]
        fields += [pa.field(CHECKSUM, pa.uint32())]
        schema = pa.schema(fields, metadata={"key": f"{self.digest}/{number}"})
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _batch(self, number: int) -> pa.RecordBatch:
        if number not in self._open:
            if not self._checksum_file(number).exists():
                raise DamagedShardError(self._refusal(number, "it is not finished"))
            if problem := self._problem(number, every_byte=False):
                self._set_aside(number)
                raise DamagedShardError(self._refusal(number, problem))
            self._open[number] = _open_batch(self.file(number))
        self._open[number] = batch = self._open.pop(number)  # the last used one is the last
        if len(self._open) > OPEN_SHARDS:
            self._open.pop(next(iter(self._open)))
        return batch

    @staticmethod
    def _names(batch: pa.RecordBatch) -> list[str]:
        return [name for name in batch.schema.names if name != CHECKSUM and not name.endswith(SHAPE)]

    @staticmethod
    def _dtype(batch: pa.RecordBatch, name: str) -> torch.dtype:
        return getattr(torch, batch.schema.field(name).metadata[DTYPE.encode()].decode())


def stored_bytes(tensor: torch.Tensor) -> int:
    """The space that a tensor takes in a shard."""
    return len(_bytes(tensor))


def _open_batch(path: Path) -> pa.RecordBatch:
    """The one record batch of a file, by memory map; the file itself is closed again, and the map stays."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_stream(source).read_next_batch()
    batch.validate(full=True)  # Arrow trusts offsets: reading by damaged ones would crash the process
    return batch


def _write_batch(file: BinaryIO, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)


def own_ending() -> str:
    """The ending of this process's temporary files."""
    return f".{socket.gethostname()}-{os.getpid()}.tmp"


def _is_being_written(temporary: Path) -> bool:
    """Whether the process that wrote a temporary file is alive; of another machine, whether the
    file is recent."""
    host, _, process = temporary.name.removesuffix(".tmp").rpartition("-")
    if not host.endswith(f".{socket.gethostname()}"):
        with contextlib.suppress(FileNotFoundError):
            return time.time() - temporary.stat().st_mtime < ABANDONED
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _schema_checksum(batch: pa.RecordBatch) -> int:
    return zlib.crc32(batch.schema.serialize())


def _checksum(data: Any, shape: list[int], start: int) -> int:
    """Of one tensor, after those before it in the row."""
    return zlib.crc32(data, zlib.crc32(repr(shape).encode(), start))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().rstrip(b"\0")


def _tensor(value: Any, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    stored, tensor = value.as_buffer(), torch.empty(shape, dtype=dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    data[: stored.size], data[stored.size :] = np.frombuffer(stored, dtype=np.uint8), 0
    return tensor
