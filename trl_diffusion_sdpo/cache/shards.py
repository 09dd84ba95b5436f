"""Rows of tensors in safetensors files, in a folder named by a hash of everything that they depend on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..utils.disk import naming_the_disk
from ..utils.files import write_atomically

logger = logging.getLogger(__name__)

FORMAT = 3  # version of the files, part of the key
KEY_FILE, LOCK_FILE, PARTIAL = "key.json", ".lock", ".partial"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
NONE = -1


class ShardStore:
    """Numbered rows of named tensors, in the folder `folder / <hash of the key>`.

    A shard is a safetensors file with some of the rows. It is written under another name and then renamed, so a kill
    leaves whole shards only.

    Args:
        folder (`Path`): Folder of the stores of any key.
        key (`Mapping`): Everything that the rows depend on, as values of JSON.
        rows (`int`): Number of rows.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], rows: int) -> None:
        self._key = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1, default=str) + "\n"
        self.path = Path(folder) / hashlib.sha256(self._key.encode()).hexdigest()[:16]
        self._files: list[Path] = []
        self._file_of = np.full(rows, NONE, dtype=np.int32)  # index into `_files`
        self._open: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return len(self._file_of)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # memory maps cannot be pickled

    def missing(self) -> np.ndarray:
        """Index the shards of the folder, and return the rows that none of them has. Damaged shards are named in a
        warning, and their rows are missing."""
        self._files = sorted(self.path.glob("*.safetensors"))
        self._file_of.fill(NONE)
        self._open.clear()
        for number, file in enumerate(self._files):
            try:
                with safe_open(file, "pt") as shard:
                    rows = {int(name.partition(".")[0]) for name in shard.keys()}  # noqa: SIM118
            except (SafetensorError, ValueError) as error:
                logger.warning("The shard %s is damaged (%s). Its rows are computed again.", file, error)
                continue
            self._file_of[[row for row in rows if row < len(self._file_of)]] = number
        return np.flatnonzero(self._file_of == NONE)

    @property
    def nbytes(self) -> int:
        """Size of the shards on the disk."""
        return sum(file.stat().st_size for file in self._files)

    def write(self, number: int, rows: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Write a shard. No other process may write one of the same number at the same time."""
        tensors = {f"{row}.{name}": tensor.contiguous() for row, of in rows.items() for name, tensor in of.items()}
        write_atomically(self.path / f"{number:06d}.safetensors", save(tensors), ending=PARTIAL)

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a row. Raise `KeyError` if no shard has it, `SafetensorError` if its shard is
        damaged."""
        number = int(self._file_of[row])
        if number == NONE:
            raise KeyError(row)
        if number not in self._open:
            self._open[number] = _Shard(self._files[number])
        shard = self._open[number]
        return {name: shard.file.get_tensor(f"{row}.{name}") for name in shard.names[row]}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, wait until no other run writes into it, and delete what a killed run left unfinished."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.warning("Another run writes into %s. Waiting for it to end.", self.path)
            lock.acquire()
        try:
            for left in self.path.glob(f"*{PARTIAL}"):
                left.unlink()
            if not (self.path / KEY_FILE).exists():
                write_atomically(self.path / KEY_FILE, self._key.encode())
            yield
        finally:
            lock.release()


class _Shard:
    """Open file with the names of the tensors of each row."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        self.names: dict[int, list[str]] = {}
        for key in self.file.keys():  # noqa: SIM118
            row, _, name = key.partition(".")
            self.names.setdefault(int(row), []).append(name)


@contextlib.contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn errors of writing into messages that name the folder, the cause and the setting.

    Raises:
        DiskFullError: If the disk is full. Finished shards stay.
        ValueError: If nothing can be written into the folder.
    """
    try:
        with naming_the_disk(folder, setting="precompute_dir"):
            yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise ValueError(
            f"Not everything that this run reads is in {folder}, and the rest cannot be written there: {error}. Make "
            "the folder writable, or choose another `precompute_dir`. A complete one may be read-only."
        ) from error
