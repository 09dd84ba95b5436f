"""One error for a full disk, whatever library was writing, that names the folder and its free space."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)
LITTLE = 64 * 2**20  # bytes; with more than this free, another disk may be the full one


class DiskFullError(OSError):
    """A file could not be written completely; the message names the folder and its free space."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOSPC


@contextlib.contextmanager
def naming_the_disk(
    folder: str | os.PathLike, needed: int | None = None, *, setting: str = "output_dir"
) -> Iterator[None]:
    """Turn errors of a full disk within the context into a `DiskFullError`. Files are written into `folder`, which need
    not exist yet and is chosen by `setting`; `needed` is a lower bound of their bytes."""
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        try:
            free = free_bytes(Path(folder))
        except OSError:
            free = None  # unreachable storage: the first error is the one to raise
        if free is None or not _is_of_a_full_disk(error, free):
            raise
        raise DiskFullError(_message(error, Path(folder), free, needed, setting)) from error


def check_room(folder: Path, needed: int) -> None:
    """Raise a `DiskFullError` where a disk has less room than files in a folder will need, before any is written."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskFullError(
            f"The disk of {folder} is full: {readable_size(free)} are free, and at least {readable_size(needed)} are "
            "needed. Nothing of it was written, and what was saved before is as it was. Free some, or choose another "
            "`output_dir`."
        )


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, or of its nearest parent that exists."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _is_of_a_full_disk(error: Exception, free: int) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    if isinstance(error, SafetensorError):  # written by Rust, whose errors arrive as text
        return any(f"(os error {number})" in str(error) for number in FULL)
    return "inline_container" in str(error) and free < LITTLE  # of `torch.save`, which names no cause


def _message(error: Exception, folder: Path, free: int, needed: int | None, setting: str) -> str:
    if isinstance(error, OSError) and error.errno == errno.EDQUOT:
        return f"The quota of the disk of {folder} is used up. Free some of it, or choose another `{setting}`."
    if free < max(LITTLE, needed or 0):
        ask = "" if needed is None else f", and at least {readable_size(needed)} are needed"
        full = f"The disk of {folder} is full: {readable_size(free)} are free{ask}."
        return f"{full} Free some, or choose another `{setting}`."
    return (
        f"A disk is full ({error}), though {folder} has {readable_size(free)} free: see to the folders of caches and "
        "of temporary files."
    )


def readable_size(size: float) -> str:
    """Bytes in words, such as "1.2 GB"."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
