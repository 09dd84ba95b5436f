"""One error for a full disk and one for an unwritable folder, in place of each library's own, and checks of the free
space."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
LITTLE = 64 * 2**20  # bytes


class DiskFullError(OSError, UserError):
    """Files do not fit on the disk. The message names the folder and the disk's free space."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOSPC


@contextlib.contextmanager
def naming_the_disk(
    folder: str | os.PathLike, needed: int | None = None, *, setting: str = "output_dir"
) -> Iterator[None]:
    """Return a context manager that turns any library's error about a full disk into a `DiskFullError`, and one about a
    file in `folder` that cannot be written into a `ValueError`.

    Args:
        folder (`str` or `os.PathLike`): Folder of the files, which need not exist yet.
        needed (`int`, *optional*): Bytes that the files need at least, for the message.
        setting (`str`): Name of the setting that chooses the folder, for the message.
    """
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE and _is_in(folder, error.filename):
            raise UserError(
                f"The folder {folder} must be writable, and {error.filename} cannot be written: {error.strerror}. "
                f"Change the folder's permissions, or choose another `{setting}`."
            ) from error
        if not _is_of_a_full_disk(error, Path(folder)):
            raise
        free = free_bytes(Path(folder))
        needs = "" if needed is None else f" The files need at least {readable_size(needed)}."
        advice = f"Free some space, or choose another `{setting}`."
        if free > max(LITTLE, needed or 0):
            advice = (
                "This is enough, so look for another full disk, such as that of temporary files or of caches, or for a "
                "used-up quota or number of files."
            )
        raise DiskFullError(
            f"A disk is full, or the disk quota is used up: {error}. The disk of {folder} has {readable_size(free)} "
            f"free.{needs} {advice}"
        ) from error


def check_room(folder: Path, needed: int) -> None:
    """Raise `DiskFullError` if a folder's disk has fewer than `needed` free bytes. Call it before writing."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskFullError(
            f"The disk of {folder} has {readable_size(free)} free, and at least {readable_size(needed)} are needed. "
            "Nothing was written. Free some space, or choose another `output_dir`."
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _is_in(folder: str | os.PathLike, file: object) -> bool:
    return isinstance(file, str | os.PathLike) and Path(file).absolute().is_relative_to(Path(folder).absolute())


def _is_of_a_full_disk(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    if isinstance(error, SafetensorError):  # safetensors reports the errno only in the text
        return any(f"(os error {number})" in str(error) for number in FULL)
    return "inline_container" in str(error) and free_bytes(folder) < LITTLE  # `torch.save` names no cause


def readable_size(size: float) -> str:
    """Return a number of bytes as text with a unit, such as "1.2 GB"."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
