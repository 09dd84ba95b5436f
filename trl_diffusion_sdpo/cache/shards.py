"""Stores rows of tensors in safetensors files, in a folder named by a hash of all that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..utils.disk import DiskFullError, naming_the_disk
from ..utils.errors import UserError
from ..utils.files import write_atomically
from ..utils.identity import differences, listed, read_description
from ..utils.locks import FolderLock
from ..utils.processes import Peers

logger = logging.getLogger(__name__)

FORMAT = 4  # version of the file format; every key contains it
KEY_FILE = "key.json"
LOCK_FILE = ".lock"
PARTIAL = ".partial"  # ending of the names of unfinished files
OF_DATA = ("data", "prompts")  # entries of keys that say of which data the rows are
OPEN_SHARDS = 64  # Linux allows a process 65,530 memory maps, and millions of pairs have more shards
POLL_SECONDS = 5.0  # time between two attempts to get a lock that another run has


class ShardStore:
    """Store in the folder `folder / <hash of the key>`. Each row has a number and several named tensors.

    A shard is a safetensors file with several rows, and the hash of the key in its metadata. A shard is written under a
    temporary name and then renamed, so a killed process never leaves an incomplete shard. A reader keeps four bytes a
    row in memory, which forked workers share, and at most [`OPEN_SHARDS`] open shards.

    Args:
        folder (`Path`): Subfolder of `precompute_dir`.
        key (`Mapping`): Everything that the rows depend on, as values for JSON.
        rows (`int`): Number of rows that the store has when it is complete.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], rows: int) -> None:
        self._key = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1, default=str) + "\n"
        self.path = Path(folder) / hashlib.sha256(self._key.encode()).hexdigest()[:16]
        self._shard_of = np.full(rows, -1, dtype=np.int32)  # number of the shard with each row, or -1 for none

    def __len__(self) -> int:
        return len(self._shard_of)

    def missing(self) -> np.ndarray:
        """List the shards in the folder, and return the numbers of the rows that none contains. A damaged or foreign
        shard gets a warning, and its rows count as missing."""
        self._shard_of.fill(-1)
        _open.cache_clear()
        with self._naming_the_folder():
            numbers = sorted(int(file.stem) for file in self.path.glob("*.safetensors") if file.stem.isdecimal())
            for number in numbers:
                file = self._file(number)
                try:
                    self._shard_of[self._rows_in(file)] = number
                except (SafetensorError, ValueError) as error:
                    logger.warning("The cache file %s is damaged (%s). Its rows will be computed again.", file, error)
        return np.flatnonzero(self._shard_of == -1)

    def write(self, number: int, rows: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Write a shard. Two processes must not write shards of the same number at the same time. Raise
        `DiskFullError` if the disk is full, and `ValueError` if the folder cannot be written."""
        tensors = {f"{row}.{name}": tensor.contiguous() for row, of in rows.items() for name, tensor in of.items()}
        with self._naming_the_folder():
            write_atomically(self._file(number), save(tensors, {"key": self.path.name}), ending=PARTIAL)

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """Return copies of a row's tensors by name. Raise `ValueError` if no shard has the row, or if its shard was
        damaged or deleted after [`missing`] listed it."""
        number, prefix = int(self._shard_of[row]), f"{row}."
        problem: Exception | str = "no file contains it"
        try:
            if number >= 0:
                shard = _open(self._file(number))
                names = [name for name in shard.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name.removeprefix(prefix): shard.get_tensor(name).clone() for name in names}
        except (OSError, SafetensorError) as error:
            problem = error
        raise UserError(
            f"Row {row} of the cache {self.path} cannot be read: {problem}. A cache must stay as it is while a run "
            "reads it. Start the run again, which computes the missing rows."
        )

    def lock(self, stack: contextlib.ExitStack) -> bool:
        """Create the store's folder, and lock it against other runs until `stack` is closed. Delete the unfinished
        files of killed runs. Return whether the folder is locked: `False` if another run has locked it."""
        with self._naming_the_folder():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.path / LOCK_FILE)
            try:
                lock.acquire(0)
            except Timeout:
                return False
            stack.callback(lock.release)
            for left in self.path.glob(f"*{PARTIAL}"):
                left.unlink()
            if not (self.path / KEY_FILE).exists():
                self._name_differences()
                write_atomically(self.path / KEY_FILE, self._key.encode())
        return True

    def is_visible(self) -> bool:
        """Return whether this process sees what the process that locked the store has written."""
        with self._naming_the_folder():
            self.path.mkdir(parents=True, exist_ok=True)  # network disks may remember that there was no folder
            return (self.path / KEY_FILE).is_file()

    def _rows_in(self, file: Path) -> list[int]:
        with safe_open(file, "pt") as shard:
            if (shard.metadata() or {}).get("key") != self.path.name:
                raise UserError("it was written for another cache")
            rows = {int(name.partition(".")[0]) for name in shard.keys()}  # noqa: SIM118
        return [row for row in rows if row < len(self)]

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.safetensors"

    @contextlib.contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        try:
            with naming_the_disk(self.path.parents[1], setting="precompute_dir"):
                yield
        except DiskFullError:
            raise
        except OSError as error:
            raise UserError(
                f"A cache needs a folder that this run can read and, if rows are missing, write. {self.path} is not "
                f"such a folder: {error}. Choose another `precompute_dir`, or change the permissions of this folder."
            ) from error

    def _name_differences(self) -> None:
        """Log what differs between the keys of this new store and of the most similar one of the same data."""
        key = json.loads(self._key)
        found = {}
        for file in self.path.parent.glob(f"*/{KEY_FILE}"):
            other = read_description(file) or {}
            if other.keys() == key.keys() and all(other.get(name) == key.get(name) for name in OF_DATA):
                found[file.parent.name] = differences(other, key)
        if found:
            nearest = min(found, key=lambda name: len(found[name]))
            message = "%s is new. The most similar cache of these data, %s, differs: %s."
            logger.info(message, self.path, nearest, listed(found[nearest]))


def complete(stores: Sequence[ShardStore], peers: Peers, compute: Callable[[list[np.ndarray]], None]) -> None:
    """Compute the rows that stores lack. Call it in all processes together.

    Meanwhile, the first process locks the stores against other runs, or all wait without a time limit for the run that
    has locked one.

    Args:
        compute (`Callable`): Function that computes and writes rows. Its argument is, for each store, an array with the
            numbers of the missing rows. It is called in all processes or in none, and must return after all processes
            have written their rows.

    Raises:
        ValueError: If a folder cannot be written, or processes do not see each other's files.
    """

    def lacks_rows() -> bool:
        return sum(len(store.missing()) for store in stores) > 0  # lists every store

    if not any(peers.gather_results(lacks_rows)):
        return  # without locking, because a complete cache may be read-only
    with contextlib.ExitStack() as stack:
        for store in stores:
            _lock_together(store, peers, stack)
        if all(peers.gather_results(lambda: all(store.is_visible() for store in stores))):
            packed = peers.first(lambda: [_packed(store) for store in stores])  # another run may have written rows
            bits = [np.unpackbits(of_store, count=len(store)) for store, of_store in zip(stores, packed, strict=True)]
            missing = [np.flatnonzero(of_store) for of_store in bits]
            if any(map(len, missing)):
                compute(missing)
            if not any(peers.gather_results(lacks_rows)):
                return
    raise UserError(
        f"All processes must see all files of the cache, but some do not see all of {stores[0].path}. Choose a "
        "`precompute_dir` on storage that they share."
    )


def _lock_together(store: ShardStore, peers: Peers, stack: contextlib.ExitStack) -> None:
    """Lock a store in the first process. The processes exchange the result of each attempt, so that none of them waits
    for another longer than `ddp_timeout` allows."""
    waits = False
    while not peers.first(lambda: store.lock(stack)):
        if not waits and peers.index == 0:
            logger.warning("Another run is writing into %s. Waiting until it has finished.", store.path)
        waits = True
        time.sleep(POLL_SECONDS)


def _packed(store: ShardStore) -> np.ndarray:
    """Return one bit for each row, which is 1 if the row is missing."""
    return np.packbits(np.bincount(store.missing(), minlength=len(store)) > 0)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(file: Path) -> Any:
    return safe_open(file, "pt")
