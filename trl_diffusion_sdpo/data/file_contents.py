"""Checksums of the content of local files, which are kept in the cache of `datasets`: a file is read once, and again
when its size or time changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from ..utils.files import write_atomically
from .checking import usable_cores
from .images import MAX_FILE_BYTES, OF_THE_PATH
from .kept_index import remove_all_but_the_last_used

logger = logging.getLogger(__name__)

READING = "Reading images once, to recognize them"
AT_ONCE = 64  # blocks or files, of which a thread has one
MAX_THREADS = 8
SHOWN_AFTER = 5.0  # seconds
MISSING = hashlib.sha256(b"missing").digest()  # in place of a file's
CHECKSUMS_FOLDER = "image_checksums"  # within the cache of `datasets`
KEPT_CHECKSUMS = 64  # files; those that were used the longest time ago are removed
STATED = 512  # files at which a thread looks at a time, or that are looked up
READ = 16  # files that a thread reads at a time
WRITTEN = 4096  # files after which what was read of them is kept
FILES = "image_checksums.sqlite"  # within the cache of `datasets`
KEPT_FILES = 5_000_000  # of a gigabyte; those that were read the longest time ago are removed
LOCKED = 30.0  # seconds that another process may write
_FILE = np.dtype([("status", "<i8", 2), ("sha256", "V32")])
VERSION = 1  # of what is kept: raise it where the same images would give another checksum


def checksum_of_files(names: Sequence[str]) -> str:
    """Of the content of local files, in this order; of a file that is missing, that it is.

    Raises:
        OSError: If a file cannot be read for a reason that may pass.
    """
    if not names:
        return ""
    distinct = list(dict.fromkeys(names))
    places = {name: place for place, name in enumerate(distinct)}
    order = np.array([places[name] for name in names])
    statuses, paths = _statuses_of(distinct), _paths_of(distinct)
    stated = hashlib.sha256(b"\0".join(paths))
    for array in (statuses, order):
        stated.update(array.tobytes())
    file = _kept_file(f"files-{stated.hexdigest()}-{VERSION}.json")
    keeps = datasets.is_caching_enabled()
    if keeps:  # of these files together, in place of a million rows of a table
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return str(json.loads(_read_kept(file))["sha256"])
    digests = _digests_of(distinct, paths, statuses)
    found = hashlib.sha256(digests[order].tobytes()).hexdigest()
    if keeps and not _may_be_read_again(digests, statuses):
        _keep(file, json.dumps({"sha256": found}).encode())
    return found


def in_threads(function: Callable, items: Iterable) -> Iterator:
    """`map` by several threads, which does not read far ahead."""
    rest = iter(items)
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores())) as pool:
        while some := list(islice(rest, AT_ONCE)):
            yield from pool.map(function, some)


# ---- What is kept ---------------------------------------------------------------------------------------------------


def kept(name: str | None, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` returns, from the disk where it is there under this name."""
    if name is None:
        return compute()
    file = _kept_file(f"{name}-{VERSION}.json")
    try:
        return dict(json.loads(_read_kept(file)))
    except (OSError, ValueError, TypeError):
        found = compute()
    _keep(file, json.dumps(found).encode())
    return found


def _kept_file(name: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE, CHECKSUMS_FOLDER, name)


def _read_kept(file: Path) -> bytes:
    content = file.read_bytes()
    with contextlib.suppress(OSError):  # of another user
        os.utime(file)
    return content


def _keep(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content, ending=f".{socket.gethostname()}-{os.getpid()}.partial")
    except OSError as error:
        logger.warning("The checksum of the images was not kept in %s: %s. They are read at every start.", file, error)
        return
    with contextlib.suppress(OSError):  # another process removes the same
        remove_all_but_the_last_used(file.parent.iterdir(), KEPT_CHECKSUMS)


# ---- Files ----------------------------------------------------------------------------------------------------------


def _statuses_of(names: list[str]) -> np.ndarray:
    """Size and time of each file, `(F, 2)`."""
    count = -(-len(names) // STATED)
    bar = tqdm(
        in_threads(_statuses, _parts(names, STATED)), "Looking at the files of images", count, delay=SHOWN_AFTER
    )
    return np.concatenate(list(bar))


def _paths_of(names: list[str]) -> list[bytes]:
    if not all(map(os.path.isabs, names)):
        folder = os.getcwd()
        names = [os.path.join(folder, name) for name in names]
    return [name.encode("utf-8", "surrogatepass") for name in names]


def _may_be_read_again(digests: np.ndarray, statuses: np.ndarray) -> bool:
    """Whether a file is there that could not be read."""
    missing = np.frombuffer(digests.tobytes(), np.uint8).reshape(-1, len(MISSING)) == np.frombuffer(MISSING, np.uint8)
    return bool((missing.all(axis=1) & (statuses[:, 0] >= 0)).any())


def _digests_of(names: list[str], paths: list[bytes], statuses: np.ndarray) -> np.ndarray:
    """Of each file the digest, which is kept beside its size and time, and read again when they change."""
    known = _known_files(paths)
    unread = np.flatnonzero((known["status"] != statuses).any(axis=1))
    if not len(unread):
        return known["sha256"]
    parts = _parts([names[place] for place in unread], READ)
    read = kept = 0
    with tqdm(desc=READING, total=len(unread), delay=SHOWN_AFTER) as bar:
        try:
            for digests, error in in_threads(_digests_of_files, parts):
                places = unread[read : read + len(digests)]
                known["status"][places] = statuses[places]
                known["sha256"][places] = np.array(digests, dtype="V32")
                read += len(digests)
                bar.update(len(digests))
                if error is not None:
                    raise error
                if read - kept >= WRITTEN:
                    _keep_files(paths, known, unread[kept:read])
                    kept = read
        finally:  # what was read before an error is not read again
            _keep_files(paths, known, unread[kept:read])
    return known["sha256"]


def _parts(names: list, size: int) -> Iterator[list]:
    return (names[start : start + size] for start in range(0, len(names), size))


def _known_files(paths: list[bytes]) -> np.ndarray:
    """What is kept of files; a status that no file has where nothing is."""
    known = np.zeros(len(paths), dtype=_FILE)
    known["status"] = -2

    def look_up(database: sqlite3.Connection) -> None:
        places = {path: place for place, path in enumerate(paths)}
        for part in _parts(paths, STATED):
            asked = f"SELECT path, size, time, sha256 FROM files WHERE path IN ({','.join('?' * len(part))})"
            for path, *status, digest in database.execute(asked, part):
                if digest != MISSING or status[0] < 0:  # of a file that is there, reading it again may succeed
                    known[places[path]] = tuple(status), digest

    _with_database(look_up)
    return known


def _keep_files(paths: list[bytes], known: np.ndarray, places: np.ndarray) -> None:
    def store(database: sqlite3.Connection) -> None:
        rows = ((paths[at], *map(int, known["status"][at]), known["sha256"][at].tobytes()) for at in places)
        database.executemany("REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        database.execute("DELETE FROM files WHERE rowid <= (SELECT max(rowid) FROM files) - ?", (KEPT_FILES,))

    if len(places):
        _with_database(store)


def _with_database(work: Callable[[sqlite3.Connection], None]) -> None:
    """Call `work` with what is kept of the files of any data set, in one transaction; nothing where it cannot be
    opened."""
    if not datasets.is_caching_enabled():
        return
    file = Path(datasets.config.HF_DATASETS_CACHE, FILES)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(file, timeout=LOCKED)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size, time, sha256)")
            work(database)
    except (OSError, sqlite3.Error, TypeError, ValueError) as error:
        logger.warning("Checksums of images are not kept in %s: %s. They are read at every start.", file, error)
        if type(error) is sqlite3.DatabaseError:  # damaged
            file.unlink(missing_ok=True)


def _statuses(names: list[str]) -> np.ndarray:
    return np.array([_status(name) for name in names], dtype=np.int64)


def _status(name: str) -> tuple[int, int]:
    """Size and time of a regular file; -1 of others."""
    try:
        found = os.stat(name)
    except ValueError:
        return -1, -1
    except OSError as error:
        if error.errno not in OF_THE_PATH:
            raise _named(error, name) from error
        return -1, -1
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (-1, -1)


def _digests_of_files(names: list[str]) -> tuple[list[bytes], OSError | None]:
    """Those before the first file that cannot be read, and its error."""
    digests: list[bytes] = []
    try:
        for name in names:
            digests.append(_digest_of_file(name))
    except OSError as error:
        return digests, error
    return digests, None


def _digest_of_file(name: str) -> bytes:
    if not 0 <= _status(name)[0] <= MAX_FILE_BYTES:  # which is not read as an image either
        return MISSING
    try:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        if error.errno not in OF_THE_PATH:
            raise _named(error, name) from error  # the file may be good, and another checksum of it would be kept
        return MISSING


def _named(error: OSError, name: str) -> OSError:
    """The same error with the file, which an error of reading does not name, and what to do."""
    advice = "an image that must be read to recognize the data. Start again, or drop its row if this stays so"
    return OSError(error.errno, f"{error.strerror}: {advice}", name)
