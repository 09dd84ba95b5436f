"""Files that a kill, a full disk or a loss of power leaves either as they were or whole."""

from __future__ import annotations

import contextlib
import os
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
