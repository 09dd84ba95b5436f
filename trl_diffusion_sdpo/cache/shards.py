"""Stores rows of tensors in safetensors files. The folder's name is a hash of all that the tensors depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..utils.files import write_atomically
from ..utils.identity import differences, listed, read_description
from ..utils.locks import FolderLock

logger = logging.getLogger(__name__)

FORMAT = 3  # version of the file format; every key contains it
KEY_FILE, LOCK_FILE, PARTIAL = "key.json", ".lock", ".partial"


class ShardStore:
    """Store in the folder `folder / <hash of the key>`. Each row has a number and several named tensors.

    A shard is a safetensors file with several rows. A shard is written under a temporary name and then renamed, so a
    killed process never leaves an incomplete shard. `key` contains everything that the rows depend on, as values for
    JSON. `rows` is the number of rows that the store has when it is complete.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], rows: int) -> None:
        self._key = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1, default=str) + "\n"
        self.path = Path(folder) / hashlib.sha256(self._key.encode()).hexdigest()[:16]
        self._files: list[Path] = []
        self._file_of = np.full(rows, -1, dtype=np.int32)  # index into `_files`, or -1 for a missing row
        self._open: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return len(self._file_of)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # memory maps cannot be pickled

    def missing(self) -> np.ndarray:
        """List the shards in the folder, and return the numbers of the rows that no shard contains. If a shard is
        damaged, log a warning and return its rows as missing."""
        self._files = sorted(self.path.glob("*.safetensors"))
        self._file_of.fill(-1)
        self._open.clear()
        for number, file in enumerate(self._files):
            try:
                with safe_open(file, "pt") as shard:
                    rows = {int(name.partition(".")[0]) for name in shard.keys()}  # noqa: SIM118
            except (SafetensorError, ValueError) as error:
                logger.warning("The cache file %s is damaged (%s). Its rows will be computed again.", file, error)
                continue
            self._file_of[[row for row in rows if row < len(self._file_of)]] = number
        return np.flatnonzero(self._file_of == -1)

    def write(self, number: int, rows: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Write a shard. Two processes must not write shards of the same number at the same time."""
        tensors = {f"{row}.{name}": tensor.contiguous() for row, of in rows.items() for name, tensor in of.items()}
        write_atomically(self.path / f"{number:06d}.safetensors", save(tensors), ending=PARTIAL)

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """Return a row's tensors by name. Raise `KeyError` if no shard has the row, `SafetensorError` if its shard is
        damaged."""
        number = int(self._file_of[row])
        if number < 0:
            raise KeyError(row)
        if number not in self._open:
            self._open[number] = _Shard(self._files[number])
        shard = self._open[number]
        return {name: shard.file.get_tensor(f"{row}.{name}") for name in shard.names[row]}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the store's folder, and lock it against other runs while the context is open. If another run has
        locked the folder, wait for that run. Delete the unfinished files of killed runs."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.path / LOCK_FILE)
        try:
            lock.acquire(0)
        except Timeout:
            logger.warning("Another run is writing into %s. Waiting until that run has finished writing.", self.path)
            lock.acquire()
        try:
            for left in self.path.glob(f"*{PARTIAL}"):
                left.unlink()
            if not (self.path / KEY_FILE).exists():
                self._name_differences()
                write_atomically(self.path / KEY_FILE, self._key.encode())
            yield
        finally:
            lock.release()

    def _name_differences(self) -> None:
        """Log what differs between this new store's key and the most similar key in the folder of all stores."""
        key = json.loads(self._key)
        others = {file.parent: read_description(file) for file in self.path.parent.glob(f"*/{KEY_FILE}")}
        found = {
            path: differences(other, key) for path, other in others.items() if other and other.keys() == key.keys()
        }
        if found:
            nearest = min(found, key=lambda path: len(found[path]))
            logger.info(
                "%s is new. The most similar cache, %s, differs: %s.", self.path, nearest.name, listed(found[nearest])
            )


class _Shard:
    """A shard file that is open, and the names of the tensors in each of its rows."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        self.names: dict[int, list[str]] = {}
        for key in self.file.keys():  # noqa: SIM118
            row, _, name = key.partition(".")
            self.names.setdefault(int(row), []).append(name)
