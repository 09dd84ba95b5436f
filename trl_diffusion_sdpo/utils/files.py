"""Safe writing and reading of files: a kill, a full disk or a loss of power leaves a written file either as it was or
whole, and a name that strangers chose is checked before it is opened."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

VERDICT_FILE, VERDICT_PLOT = "verdict.json", "verdict.png"  # of a run, in its folder
SWEEP_FOLDER = "scale_sweep"  # of sweeps over its scales, in its folder; that of averaged weights has a longer name


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None], *, ending: str = ".partial") -> None:
    """Write a file under a temporary name, and then rename it.

    Args:
        content (`bytes` or `Callable`): Its bytes, or what writes them into an open file.
        ending (`str`): Of the temporary name; where several processes may write the file, each needs its own.
    """
    temporary = path.with_name(path.name + ending)
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Store the names of a folder's files durably."""
    with contextlib.suppress(OSError):  # some systems sync files only
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_regular_file(path: str | os.PathLike, max_bytes: int | None) -> None:
    """Check a file before it is opened: reading a pipe blocks, and a device such as `/dev/zero` has no end.

    Raises:
        ValueError: If the path is not a regular file, or the file has more than `max_bytes`.
        OSError: If there is none.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"is not a regular file: {os.fspath(path)}")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"is too large a file: {status.st_size} bytes, {max_bytes} at most: {os.fspath(path)}")
