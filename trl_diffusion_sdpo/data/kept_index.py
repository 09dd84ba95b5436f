"""Indexes of large data sets, kept between starts: reading the labels of ten million rows takes a minute.

A kept index is mapped into memory, so the processes of a node share one copy. The first of them makes it, and the
others wait for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.disk import free_bytes, readable_size
from ..utils.files import file_facts, json_object, user_cache, write_atomically
from ..utils.identity import short_hash
from ..utils.locks import FolderLock
from ..utils.mapped_arrays import map_array
from .data_report import MAX_EXAMPLES
from .formats import Reject
from .pair_table import PairTable

logger = logging.getLogger(__name__)

KEPT_ROWS = 50_000  # a smaller index is made faster than it is looked for
KEPT_INDEXES = 8  # of those beyond, the ones that no start has used for `KEPT_SECONDS` are deleted
KEPT_SECONDS = 30 * 24 * 3600  # longer than a run that has mapped an index
ROW_BYTES = 64  # of a kept index, at most
FACTS = "facts.json"  # written last: a folder without it is not complete
Rejection = tuple[str, int, str, int]  # arguments of `Reject`


def kept_index(key: Callable[[], Any], rows: int, make: Callable[[Reject], PairTable], reject: Reject) -> PairTable:
    """Return the index that `make` makes, from the disk if it is kept there. For `key` and `rows`, see
    [`kept_arrays`].

    Args:
        make (`Callable`): Makes the index, and calls its argument for dropped rows and pairs.
        reject (`Callable`): Is called in the same way. Of each kind, all but the first rows come in one call.
    """
    if rows < KEPT_ROWS:
        return make(reject)

    def arrays() -> tuple[dict[str, np.ndarray], list[Rejection]]:
        rejections = _Rejections()
        index = make(rejections)
        return {"positions": index.positions, **index.columns}, rejections.calls()

    columns, rejected = kept_arrays(key, rows, arrays)
    for call in rejected:
        reject(*call)
    return PairTable(columns.pop("positions"), columns)


def kept_arrays(
    key: Callable[[], Any], rows: int, make: Callable[[], tuple[dict[str, np.ndarray], Any]]
) -> tuple[dict[str, np.ndarray], Any]:
    """Return arrays by name and facts, as `make` returns them, from the disk if they are kept there.

    Args:
        key (`Callable`): Returns what they depend on beside the code of this package, as values for JSON.
        rows (`int`): Number of rows of the data.
        make (`Callable`): Makes them. The facts are values for JSON.
    """
    if rows < KEPT_ROWS:
        return make()
    try:
        folder = user_cache() / "indexes" / short_hash([key(), _code()])
    except FileNotFoundError as error:
        logger.warning("The index of %d rows is made anew at each start. %s", rows, error)
        return make()
    kept = _read(folder)
    if kept is not None:
        return kept
    lock, problem = None, f"its disk has less than {readable_size(rows * ROW_BYTES)} free"
    try:
        if free_bytes(folder) >= rows * ROW_BYTES:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(folder.with_suffix(".lock"))
            lock.acquire()
    except OSError as error:
        lock, problem = None, str(error)
    if lock is None:
        logger.warning(
            "The index of %d rows is made anew at each start. %s cannot keep it: %s.", rows, folder, problem
        )
        return make()
    try:
        return _read(folder) or _make_and_keep(folder, make)  # another process may have made it meanwhile
    finally:
        lock.release()


def _make_and_keep(
    folder: Path, make: Callable[[], tuple[dict[str, np.ndarray], Any]]
) -> tuple[dict[str, np.ndarray], Any]:
    arrays, facts = make()
    try:
        folder.mkdir(exist_ok=True)
        for name, values in arrays.items():
            write_atomically(_file(folder, name), partial(np.save, arr=values, allow_pickle=False))
        write_atomically(folder / FACTS, json.dumps({"arrays": list(arrays), "facts": facts}).encode())
        _delete_old(folder.parent)
    except OSError as error:
        logger.warning("The index of the data could not be kept in %s: %s", folder, error)
    return _read(folder) or (arrays, facts)


def _read(folder: Path) -> tuple[dict[str, np.ndarray], Any] | None:
    """Return kept arrays, mapped into memory, and their facts, or `None` if there are none or they cannot be read."""
    try:
        kept = json_object((folder / FACTS).read_text(encoding="utf-8"))
        arrays = {name: map_array(_file(folder, name)) for name in kept["arrays"]}
        facts = kept["facts"]
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(folder)
    except (OSError, ValueError, KeyError):
        return None
    return arrays, facts


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _delete_old(indexes: Path) -> None:
    """Delete indexes that no start has used for long. On a network disk, a run that has mapped one would crash."""
    folders = sorted((path for path in indexes.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-KEPT_INDEXES]:
        if time.time() - folder.stat().st_mtime < KEPT_SECONDS:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.with_suffix(".lock").unlink()


def _code() -> list[Any]:
    """Return facts of this package's files that make an index."""
    package = Path(__file__).parents[1]
    files = (file for room in ("cache", "data", "utils") for file in sorted((package / room).glob("[!.]*.py")))
    return [file_facts(file)[1:] for file in files]


class _Rejections:
    """Dropped rows and pairs: the first of each kind, and one call for all others of the kind."""

    def __init__(self) -> None:
        self._first: list[Rejection] = []
        self._seen: Counter[str] = Counter()
        self._others: dict[str, Rejection] = {}

    def __call__(self, kind: str, row: int, reason: str, amount: int) -> None:
        self._seen[kind] += 1
        if self._seen[kind] <= MAX_EXAMPLES:
            self._first.append((kind, row, reason, amount))
        else:
            others = self._others[kind][3] if kind in self._others else 0
            self._others[kind] = (kind, row, reason, others + amount)

    def calls(self) -> list[Rejection]:
        return [*self._first, *self._others.values()]
