"""The index of a data set, kept beside the caches of `datasets`, and read by memory map."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..utils._compat import dataset_fingerprint
from . import columns, formats, index
from .formats import PreferenceFormat
from .index import Drop, PairIndex

logger = logging.getLogger(__name__)

KEPT_FOLDER = "preference_pairs"  # within the cache of `datasets`
KEPT = 32  # indices; those that were used the longest time ago are removed
_FACTS, _PAIRS, _SCORES = "facts.json", "pairs.bin", "scores.bin"
_CODE = tuple(str(module.__file__) for module in (columns, formats, index))  # what pairs depend on beside the data


def kept_folder(table: datasets.Dataset, known: PreferenceFormat) -> Path | None:
    """Where the index of a data set is kept; `None` for data in memory, whose index takes less time than its name."""
    if not table.cache_files or not datasets.is_caching_enabled():
        return None
    try:
        files = [Path(cached["filename"]) for cached in table.cache_files]
        facts: list[Any] = [
            dataset_fingerprint(table),
            len(table),
            str(table.features),
            [known.name, known.score_columns],
            sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files),
            [hashlib.sha256(Path(module).read_bytes()).hexdigest() for module in _CODE],
        ]
    except OSError:  # a file that was deleted while it is open
        return None
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / KEPT_FOLDER / key


def keep(folder: Path, found: PairIndex, drops: list[Drop]) -> tuple[PairIndex, list[Drop]]:
    """The same index, read from the disk if it can be written there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as written:
            facts: dict[str, Any] = {"drops": drops, "files": {}}
            for name, values in zip((_PAIRS, _SCORES), found, strict=True):
                if values is not None:
                    kind = values.dtype.newbyteorder("<")
                    values.astype(kind).tofile(Path(written, name))
                    facts["files"][name] = [kind.str, _checksum(Path(written, name))]
            content = {"facts": facts, "sha256": _checksum_of(facts)}
            Path(written, _FACTS).write_text(json.dumps(content))
            is_there = folder.is_dir()
            if (kept := read_kept(folder)) is not None:  # of a process that was faster
                return kept
            if is_there:  # and damaged
                shutil.rmtree(folder, ignore_errors=True)
            Path(written).chmod(0o777 & ~_umask())  # others may share the folder of caches
            Path(written).rename(folder)
            Path(written).mkdir()  # for the context manager to delete
    except OSError as error:
        if (kept := read_kept(folder)) is not None:  # a process was faster by less
            return kept
        logger.warning("The index of the pairs was not kept in %s: %s. It is built at every start.", folder, error)
        return found, drops
    with contextlib.suppress(OSError):  # another process removes the same
        remove_all_but_the_last_used((path for path in folder.parent.iterdir() if path.is_dir()), KEPT)
    return read_kept(folder) or (found, drops)


def remove_all_but_the_last_used(kept: Iterable[Path], count: int) -> None:
    """Of files or folders. Also removes what a killed process has begun to write, in time."""
    for unused in sorted(kept, key=lambda path: path.stat().st_mtime)[:-count]:
        if unused.is_dir():
            shutil.rmtree(unused, ignore_errors=True)
        else:
            unused.unlink(missing_ok=True)


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def read_kept(folder: Path) -> tuple[PairIndex, list[Drop]] | None:
    if not folder.is_dir():
        return None
    try:
        content = json.loads((folder / _FACTS).read_text())
        facts = content["facts"]
        differing = [name for name, (_, known) in facts["files"].items() if _checksum(folder / name) != known]
        if _checksum_of(facts) != content["sha256"]:
            differing.append(_FACTS)
        if differing:
            raise ValueError(f"other checksum of {', '.join(differing)}")
        kinds = {name: kind for name, (kind, _) in facts["files"].items()}
        pairs = _map(folder / _PAIRS, kinds[_PAIRS], 4)
        scores = _map(folder / _SCORES, kinds[_SCORES], 2) if _SCORES in kinds else None
        with contextlib.suppress(OSError):  # of another user
            os.utime(folder)
        return PairIndex(pairs, scores), [tuple(drop) for drop in facts["drops"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The index of the pairs in %s is damaged (%s) and is built again.", folder, error)
        return None


def _map(file: Path, dtype: str, columns: int) -> np.ndarray:
    if file.stat().st_size == 0:  # which cannot be mapped
        return np.zeros((0, columns), dtype=dtype)
    return np.asarray(np.memmap(file, dtype=dtype, mode="r").reshape(-1, columns))


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checksum_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
