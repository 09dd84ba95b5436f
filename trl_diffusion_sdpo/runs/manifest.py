"""A checkpoint's files with their sizes and checksums: a list that is written last and says that all is there."""

from __future__ import annotations

import contextlib
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

MANIFEST_FILE = "checkpoint_manifest.json"
ARGS_FILE = "training_args.json"  # a run resumes without it, as from what was published: it names local folders
# Of one process or DDP, FSDP2 (whole or in shards), DeepSpeed.
OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
# What only a run that resumes reads; DeepSpeed keeps the weights beside the optimizer's state, which is not of these.
NOT_WEIGHTS = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_*",
    SCHEDULER_NAME,
    "rng_state*",
    TRAINER_STATE_NAME,
    ARGS_FILE,
)
CUT_OFF = "it was not written to its end"
NOT_THERE = "there is no such folder"
_BLOCK = 16 * 2**20  # bytes read at once
# The number of the process that writes a file: of random states, of ZeRO's parts, of FSDP2's parts.
_WRITER = re.compile(r"rng_state_(\d+)\.pth$|pp_rank_(\d+)_mp_rank_|/__(\d+)_\d+\.distcp$")


@dataclass
class Manifest:
    """What stands in the file of the manifest.

    Attributes:
        sequence (`int`): Counts the checkpoints of an output folder in the order in which they were begun; 0 of those
            from before there were manifests.
        complete (`bool`): Whether the checkpoint was written to its end.
        files (`dict[str, list]`): Size in bytes and checksum of each file, by its path within the checkpoint.
    """

    sequence: int = 0
    complete: bool = False
    files: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """That of a checkpoint; `None` if there is none, and an unfinished one if it cannot be read."""
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
        """Write it, whole or not at all, so that it survives a loss of power."""
        content = {"sequence": self.sequence, "complete": self.complete, "files": self.files}
        write_whole(folder / MANIFEST_FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")
        _settle_folder(folder.parent)


def write_whole(file: Path, text: str) -> None:
    """Write a file, whole or not at all, so that it survives a kill and a loss of power."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _settle(partial)
    os.replace(partial, file)
    _settle_folder(file.parent)


def files_of(folder: Path) -> list[str]:
    """Paths of a checkpoint's files within it, sorted, without those of the manifest."""
    inside = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in inside if not name.startswith(MANIFEST_FILE))


def written_by(names: Iterable[str], process: int, processes: int) -> list[str]:
    """Those files that a process has written, by the numbers in their names; the first also has all the others."""

    def writer(name: str) -> int:
        found = _WRITER.search(f"/{name}")
        number = 0 if found is None else int(next(part for part in found.groups() if part is not None))
        return number if number < processes else 0

    return [name for name in names if writer(name) == process]


def measure(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """Size and checksum of files that were just written, by path; they are on the disk afterwards, with their folders.

    Reads them once, mostly from memory: some GiB a second.
    """
    measured = {}
    for name in names:
        _settle(folder / name)
        measured[name] = [(folder / name).stat().st_size, checksum(folder / name)]
    for place in {(folder / name).parent for name in measured}:
        _settle_folder(place)
    return measured


def damage(
    folder: Path, *, part: int = 0, parts: int = 1, checksums: bool = True, without: Iterable[str] = ()
) -> list[str]:
    """What is wrong with a checkpoint, in words that name the file; nothing if it is as it was written.

    Args:
        folder (`Path`): The checkpoint. One from before there were manifests must hold the files that every resumed
            run reads.
        part, parts (`int`): Which share of the files to look at, so that several processes look at all of them.
        checksums (`bool`): Whether to read the files. Otherwise only their sizes are compared.
        without (`Iterable[str]`): Patterns of the files and folders in it that do not matter.
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
    found = (_damage_of_file(folder, name, *manifest.files[name], checksums) for name in names[part::parts])
    return [word for word in found if word is not None]


def checksum(file: Path) -> str:
    """XXH3 with 128 bits: tells damage, at the speed at which files are read; no protection against forgery."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _damage_of_file(folder: Path, name: str, size: int, expected: str, checksums: bool) -> str | None:
    file = folder / name
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
        return [CUT_OFF]  # the trainer's state was the last file of such a checkpoint
    trains_on = any(True for pattern in OPTIMIZER_STATES for _ in folder.glob(pattern))
    if trains_on and not (folder / SCHEDULER_NAME).is_file():  # without it, nobody reads the optimizer's state either
        return [f"{SCHEDULER_NAME} is missing"]
    return []


def _settle(file: Path) -> None:
    with open(file, "r+b") as stream:  # some systems want it open for writing
        os.fsync(stream.fileno())


def _settle_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems and some network file systems know this of files only
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
