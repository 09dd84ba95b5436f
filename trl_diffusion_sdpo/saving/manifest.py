"""The manifest of a checkpoint: sizes and checksums of its files, written last."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from ..utils.files import sync_folder, write_atomically
from .setup import ARGS_FILE

MANIFEST_FILE = "checkpoint_manifest.json"
# Of one process or DDP, FSDP2 (full or sharded), DeepSpeed.
OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
# Read only when a run resumes. Not DeepSpeed's optimizer state, whose files also hold the weights.
NOT_WEIGHTS = (*OPTIMIZER_STATES[:3], SCHEDULER_NAME, "rng_state*", TRAINER_STATE_NAME, ARGS_FILE)
CUT_OFF = "it was not written to its end"
NOT_THERE = "there is no such folder"
_BLOCK = 16 * 2**20  # bytes read at once
# The rank of the process that writes a file: of random states, ZeRO's shards, FSDP2's shards.
_RANK = re.compile(r"rng_state_(\d+)\.pth$|pp_rank_(\d+)_mp_rank_|/__(\d+)_\d+\.distcp$")


@dataclass
class Manifest:
    """The content of the manifest."""

    sequence: int = 0  # counts the checkpoints of an output folder in the order in which they were begun
    complete: bool = False  # whether all files were written
    files: dict[str, list[Any]] = field(default_factory=dict)  # path in the checkpoint -> size in bytes, checksum

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read a checkpoint's manifest; `None` if there is none, an incomplete one if it is malformed."""
        file = folder / MANIFEST_FILE
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            files = {str(name): [int(size), str(digest)] for name, (size, digest) in found["files"].items()}
            return cls(int(found["sequence"]), found["complete"] is True, files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, folder: Path) -> None:
        """Write it atomically and durably."""
        content = {"sequence": self.sequence, "complete": self.complete, "files": self.files}
        write_atomically(folder / MANIFEST_FILE, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
        sync_folder(folder.parent)


def files_of(folder: Path) -> list[str]:
    """Paths of a checkpoint's files relative to it, sorted, without the manifest."""
    inside = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in inside if not name.startswith(MANIFEST_FILE))


def written_by(names: Iterable[str], process: int, processes: int) -> list[str]:
    """The files that a process has written, by the ranks in their names; files without a rank are the first's."""

    def rank_in(name: str) -> int:
        found = _RANK.search(f"/{name}")
        rank = 0 if found is None else int(next(group for group in found.groups() if group is not None))
        return rank if rank < processes else 0

    return [name for name in names if rank_in(name) == process]


def measure(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Size and checksum of files that were just written, by path; they and their folders are synced to the disk."""
    measured = {}
    for name in names:
        _sync(folder / name)
        measured[name] = [(folder / name).stat().st_size, checksum(folder / name)]
    for parent in {(folder / name).parent for name in measured}:
        sync_folder(parent)
    return measured


def damage(
    folder: Path, *, part: int = 0, parts: int = 1, checksums: bool = True, without: Iterable[str] = ()
) -> list[str]:
    """What is wrong with a checkpoint, one sentence a file; empty if it is intact.

    Args:
        folder (`Path`): The checkpoint. Without a manifest, the files that a resumed run needs must be there.
        part, parts (`int`): Which of several shares of the files to check.
        checksums (`bool`): Whether to compare checksums, not sizes only.
        without (`Iterable[str]`): Patterns of files and folders to leave out.
    """
    if not folder.is_dir():
        return [NOT_THERE]
    manifest = Manifest.read(folder)
    if manifest is None:
        return _damage_without_manifest(folder)
    if not manifest.complete:
        return [CUT_OFF]
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))
    names = [name for name in names if not any(fnmatchcase(name.partition("/")[0], pattern) for pattern in without)]
    found = (_damage_of_file(folder, name, manifest.files[name], checksums) for name in names[part::parts])
    return [word for word in found if word is not None]


def checksum(file: Path) -> str:
    """XXH3 with 128 bits, as fast as files are read. It detects damage, not forgery."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _damage_of_file(folder: Path, name: str, written: list[Any], checksums: bool) -> str | None:
    file, (size, expected) = folder / name, written
    if not file.is_file():
        return None if name == ARGS_FILE else f"{name} is missing"
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size} bytes, and was written with {size}"
    if checksums and checksum(file) != expected:
        return f"{name} is not as it was written"
    return None


def _damage_without_manifest(folder: Path) -> list[str]:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [CUT_OFF]  # transformers writes this file last
    trains_on = any(True for pattern in OPTIMIZER_STATES for _ in folder.glob(pattern))
    if trains_on and not (folder / SCHEDULER_NAME).is_file():  # transformers then ignores the optimizer's state
        return [f"{SCHEDULER_NAME} is missing"]
    return []


def _sync(file: Path) -> None:
    with open(file, "r+b") as stream:  # some systems sync only files opened for writing
        os.fsync(stream.fileno())
