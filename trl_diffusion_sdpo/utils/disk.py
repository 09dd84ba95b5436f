"""A single error class for a full disk, for all libraries that write files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)
LITTLE = 64 * 2**20  # bytes; if more is free, the full disk may be another one


class DiskFullError(OSError):
    """Error of a file that could not be written completely. The message names the folder and its free space."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOSPC


@contextlib.contextmanager
def naming_the_disk(
    folder: str | os.PathLike, needed: int | None = None, *, setting: str = "output_dir"
) -> Iterator[None]:
    """Turn errors of a full disk within the context into a `DiskFullError`.

    Args:
        folder (`str` or `os.PathLike`): Folder of the files. It need not exist yet.
        needed (`int`, *optional*): Lower bound of the files' bytes.
        setting (`str`): Name of the setting that chooses the folder.
    """
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        try:
            free = free_bytes(Path(folder))
        except OSError:
            free = None  # the storage is unreachable: raise the first error
        if free is None or not _is_of_a_full_disk(error, free):
            raise
        raise DiskFullError(_message(error, Path(folder), free, needed, setting)) from error


def check_room(folder: Path, needed: int) -> None:
    """Raise a `DiskFullError` before writing if the disk of a folder has fewer than `needed` bytes free."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskFullError(
            f"The disk of {folder} is full: {readable_size(free)} are free, and at least {readable_size(needed)} are "
            "needed. Nothing of it was written, and what was saved before is as it was. Free some, or choose another "
            "`output_dir`."
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder. If the folder does not exist, its nearest existing parent
    counts."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _is_of_a_full_disk(error: Exception, free: int) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    if isinstance(error, SafetensorError):  # its Rust code reports the errno only in the text
        return any(f"(os error {number})" in str(error) for number in FULL)
    return "inline_container" in str(error) and free < LITTLE  # `torch.save` names no cause


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
    """Return a size in words, such as "1.2 GB"."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
