"""Checksums of the content of local files, which are kept in the cache of `datasets`: a file is read once, and again
when its size or time changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from ..files import write_atomically
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
STATED = 1024  # files at which a thread looks at a time
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
    return hashlib.sha256(_digests_of(distinct)[order].tobytes()).hexdigest()


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


def _digests_of(names: list[str]) -> np.ndarray:
    """Of each file the digest, which is kept beside its size and time, and read again when they change."""
    parts = (names[start : start + STATED] for start in range(0, len(names), STATED))
    count = -(-len(names) // STATED)
    bar = tqdm(in_threads(_statuses, parts), "Looking at the files of images", count, delay=SHOWN_AFTER)
    statuses = np.concatenate(list(bar))
    folder = "" if all(map(os.path.isabs, names)) else os.getcwd()
    text = "\0".join([folder, *names]).encode("utf-8", "surrogatepass")
    file = _kept_file(f"{hashlib.sha256(text).hexdigest()[:32]}-{VERSION}.bin")
    keeps = datasets.is_caching_enabled()
    known = _known_files(file if keeps else None, len(names))
    unread = np.flatnonzero((known["status"] != statuses).any(axis=1))
    if not len(unread):
        return known["sha256"]
    read = in_threads(_digest_of_file, (names[place] for place in unread))
    try:
        for place, digest in zip(unread, tqdm(read, READING, len(unread), delay=SHOWN_AFTER), strict=True):
            known[place] = statuses[place], digest
    finally:  # what was read before an error is not read again
        if keeps:
            data = known.tobytes()
            _keep(file, hashlib.sha256(data).digest() + data)
    return known["sha256"]


def _known_files(file: Path | None, count: int) -> np.ndarray:
    """What is kept of so many files; a status that no file has where nothing is."""
    try:
        content = b"" if file is None else _read_kept(file)
    except OSError:
        content = b""
    if len(content) == 32 + count * _FILE.itemsize and hashlib.sha256(content[32:]).digest() == content[:32]:
        return np.frombuffer(content, dtype=_FILE, offset=32).copy()
    known = np.zeros(count, dtype=_FILE)
    known["status"] = -2
    return known


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
