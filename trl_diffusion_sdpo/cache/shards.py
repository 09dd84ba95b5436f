"""Stores rows of tensors in safetensors files, in a folder named by a hash of all that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from sys import intern
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
from ..utils.mapped_arrays import map_array
from ..utils.processes import Peers

logger = logging.getLogger(__name__)

FORMAT = 4  # version of the file format; every key contains it
KEY_FILE = "key.json"
LOCK_FILE = ".lock"
PARTIAL = ".partial"  # ending of the names of unfinished files
OF_DATA = ("data", "prompts")  # entries of keys that say of which data the rows are
LISTED_ROWS = 20_000  # a smaller cache is listed in a second
OPEN_SHARDS = 64  # Linux allows a process 65,530 memory maps, and millions of pairs have more shards
KEPT_SECONDS = 30 * 24 * 3600  # longer than a run that has mapped a list of rows
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
        needed (`Callable`, *optional*): Returns a mask of the rows that this run reads, `(rows,)`, from the mask of
            those that have a tensor without elements. By default, it reads all.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], rows: int, needed: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        self._key = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1, default=str) + "\n"
        self.path = Path(folder) / hashlib.sha256(self._key.encode()).hexdigest()[:16]
        # Number of the shard with each row, or -1 for none; of a row that has a tensor without elements, -2 minus it.
        self._shard_of = np.full(rows, -1, dtype=np.int32)
        self._needed = needed
        self.wanted = rows  # number of rows that this run reads, once [`missing`] has listed them

    def __len__(self) -> int:
        return len(self._shard_of)

    def has(self, row: int) -> bool:
        """Return whether a shard contained the row when [`missing`] listed them."""
        return bool(self._shard_of[row] != -1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what lists the rows of this run: workers only read."""
        return self.__dict__ | {"_needed": None}

    def missing(self) -> np.ndarray:
        """Return the numbers of the rows that this run reads and no shard in the folder contains. A damaged or foreign
        shard gets a warning, and its rows count as missing.

        The shards are listed once, and again when the folder changes.
        """
        _open.cache_clear()
        with self._naming_the_folder():
            if not self._read_listed():
                self._list_shards()
        missing = self._shard_of == -1
        if self._needed is not None:
            needed = self._needed(self._shard_of < -1)
            self.wanted = int(np.count_nonzero(needed))
            missing = missing & needed
        return np.flatnonzero(missing)

    def _list_shards(self) -> None:
        if self._shard_of.flags.writeable:
            self._shard_of.fill(-1)
        else:
            self._shard_of = np.full(len(self), -1, dtype=np.int32)
        listed, is_whole = self._listed(), True
        for number in sorted(int(file.stem) for file in self.path.glob("*.safetensors") if file.stem.isdecimal()):
            file = self._file(number)
            try:
                rows, empty = self._rows_in(file)
                self._shard_of[rows] = number
                self._shard_of[empty] = -2 - number
            except (SafetensorError, ValueError) as error:
                logger.warning("The cache file %s is damaged (%s). Its rows will be computed again.", file, error)
                is_whole = False
        if is_whole and len(self) >= LISTED_ROWS and listed == self._listed():  # nobody has written meanwhile
            with contextlib.suppress(OSError):  # a complete cache may be read-only
                self._delete_old()
                write_atomically(listed, partial(np.save, arr=self._shard_of, allow_pickle=False))
                self._read_listed()

    def _read_listed(self) -> bool:
        """Map the table of rows that was written when the folder was as it is now. Return whether there is one."""
        listed = self._listed()
        try:
            table = map_array(listed)
        except (OSError, ValueError):
            return False
        if table.shape != (len(self),) or table.dtype != np.int32:
            return False
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(listed)
        self._shard_of = table
        return True

    def _listed(self) -> Path:
        """Return the file of the table of rows. Its name has the time at which the folder's entries last changed."""
        changed = self.path.stat().st_mtime_ns if self.path.exists() else 0
        return self.path.with_name(f"{self.path.name}.{changed}.npy")

    def _delete_old(self) -> None:
        """Delete tables that no start has used for long. On a network disk, a run that has mapped one would crash."""
        for file in self.path.parent.glob(f"{self.path.name}.*.npy"):
            if time.time() - file.stat().st_mtime > KEPT_SECONDS:
                file.unlink()

    def add(self, number: int, rows: Mapping[int, Mapping[str, torch.Tensor]], step: int) -> None:
        """Write a shard under the first of `number`, `number + step`, ... that no good shard has: other runs may read
        those. For errors, see [`write`]."""
        while self._is_good(number):
            number += step
        self.write(number, rows)

    def _is_good(self, number: int) -> bool:
        try:
            self._rows_in(self._file(number))
        except (FileNotFoundError, SafetensorError, ValueError):  # another error must not cost the rows of the shard
            return False
        return True

    def write(self, number: int, rows: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Write a shard. Two processes must not write shards of the same number at the same time. Raise
        `DiskFullError` if the disk is full, and `ValueError` if the folder cannot be written."""
        tensors = {f"{row}.{name}": tensor.contiguous() for row, of in rows.items() for name, tensor in of.items()}
        with self._naming_the_folder():
            write_atomically(self._file(number), save(tensors, {"key": self.path.name}), ending=PARTIAL)

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """Return copies of a row's tensors by name. Raise `ValueError` if no shard has the row, or if its shard was
        damaged or deleted after [`missing`] listed it."""
        number = int(self._shard_of[row])
        problem: Exception | str = "no file contains it"
        try:
            if number != -1:
                number = max(number, -2 - number)
                shard, names = _open(self._file(number))
                of_row = names or [key.partition(".")[2] for key in shard.keys() if key.startswith(f"{row}.")]
                if of_row:
                    return {name: shard.get_tensor(f"{row}.{name}").clone() for name in of_row}
        except (OSError, SafetensorError) as error:
            problem = error
            with contextlib.suppress(OSError):
                os.utime(self.path)  # so that the next start looks into every shard
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

    def _rows_in(self, file: Path) -> tuple[list[int], list[int]]:
        """Return a shard's rows, and those of them that have a tensor without elements."""
        with safe_open(file, "pt") as shard:
            if (shard.metadata() or {}).get("key") != self.path.name:
                raise UserError("it was written for another cache")
            of_names = {name: int(name.partition(".")[0]) for name in shard.keys()}  # noqa: SIM118
            empty = [row for name, row in of_names.items() if 0 in shard.get_slice(name).get_shape()]
        return [row for row in set(of_names.values()) if row < len(self)], [row for row in empty if row < len(self)]

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
            have written their rows. It is called again if a store then needs further rows.

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
            missing = _missing(stores, peers)  # another run may have written rows
            while any(map(len, missing)):
                compute(missing)
                computed, missing = missing, _missing(stores, peers)
                if any(np.isin(*of_store).any() for of_store in zip(computed, missing, strict=True)):
                    break
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


def _missing(stores: Sequence[ShardStore], peers: Peers) -> list[np.ndarray]:
    """Return the numbers of the rows that each store lacks, as the first process sees them."""
    packed = peers.first(lambda: [_packed(store) for store in stores])
    bits = (np.unpackbits(of_store, count=len(store)) for store, of_store in zip(stores, packed, strict=True))
    return [np.flatnonzero(of_store) for of_store in bits]


def _packed(store: ShardStore) -> np.ndarray:
    """Return one bit for each row, which is 1 if the row is missing."""
    return np.packbits(np.bincount(store.missing(), minlength=len(store)) > 0)


@lru_cache(maxsize=OPEN_SHARDS)
def _open(file: Path) -> tuple[Any, tuple[str, ...]]:
    """Return an open shard, and the names of each row's tensors if all rows have the same, else `()`: listing all names
    for each read takes longer than reading."""
    shard = safe_open(file, "pt")
    keys = [key.partition(".") for key in shard.keys()]  # noqa: SIM118
    rows, names = {row for row, _, _ in keys}, {intern(name) for _, _, name in keys}
    return shard, tuple(names) if len(rows) * len(names) == len(keys) else ()
