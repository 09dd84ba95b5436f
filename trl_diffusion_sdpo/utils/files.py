"""Atomic writing of files, and detection of replaced files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

VERDICT_FILE = "verdict.json"  # in the folder of a run


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None], *, ending: str = ".partial") -> None:
    """Write a file under a temporary name, and then rename it.

    After a crash, the file at `path` is either unchanged or complete.

    Args:
        content (`bytes` or `Callable`): Content of the file, or a function that writes the content into an open file.
        ending (`str`): Ending of the temporary name. The name itself is random, because several processes may write the
            same file at the same time.
    """
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}{ending}")
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


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the bytes of a JSON Lines file: one JSON object per row, each on its own line."""
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, so that a renamed file keeps its new name after a loss of power."""
    with contextlib.suppress(OSError):  # some systems cannot sync folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_facts(path: str | os.PathLike) -> list[str | int]:
    """Return absolute path, size, modification time and change time of a file.

    The result changes whenever the file is replaced, because programs cannot set the change time back.

    Raises:
        OSError: If the file does not exist.
    """
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
