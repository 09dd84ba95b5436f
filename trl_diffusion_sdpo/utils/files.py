"""Atomic writing of files, and detection of replaced files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

VERDICT_FILE = "verdict.json"  # in a run's folder
MANIFEST_FILE = "manifest.jsonl"  # in a folder of images
NEW_FILES = "_new"  # files that [`replacing`] has not moved yet; the underscore excludes it from uploads


def user_cache() -> Path:
    """Return the default folder of all caches: `trl-diffusion-sdpo` in the user's cache folder.

    Raises:
        FileNotFoundError: If the user has no home folder, as in some containers.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~"):
        raise FileNotFoundError("A cache needs a folder, and this user has no home. Set `XDG_CACHE_HOME` to a folder.")
    return Path(folder) / "trl-diffusion-sdpo"


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None], *, ending: str = ".partial") -> None:
    """Write a file under a temporary name, and then rename it: after a crash, `path` is either unchanged or complete.

    Args:
        content (`bytes` or `Callable`): Content, or a function that writes it into an open file.
        ending (`str`): Ending of the temporary name, which is random: several processes may write the same file at the
            same time.
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


@contextlib.contextmanager
def replacing(folder: Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder for new files. When the context ends, flush them and move them into `folder`.

    After an error or a crash within the context, `folder` is unchanged. After a crash while files are moved, each file
    is either the earlier or the new one, and the files `last` are missing.

    Args:
        folder (`Path`): Folder whose files of the same names are replaced. Others stay.
        last (`Sequence[str]`): Names of new files without which nobody reads the folder, so that nobody reads a mixture
            of earlier and new ones. They are removed before files are moved, and moved last.
    """
    new = folder / NEW_FILES
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        names = [file.relative_to(new) for file in sync_files(new)]
        names.sort(key=lambda name: str(name) in last)
        for marker in last:
            if (new / marker).exists():
                (folder / marker).unlink(missing_ok=True)
        sync_folder(folder)
        for name in names:
            if str(name) in last:
                sync_folder(folder)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)
        for parent in {(folder / name).parent for name in names}:
            sync_folder(parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync_files(folder: Path) -> list[Path]:
    """Write the files of a folder and its subfolders to the disk, and return their paths."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with open(path, "r+b") as stream:  # some systems flush only files that are open for writing
            os.fsync(stream.fileno())
    for parent in {path.parent for path in files}:
        sync_folder(parent)
    return files


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object. Raise `ValueError` if the text is anything else, or nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise UserError("the JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise UserError(f"the JSON must be an object, got {type(value).__name__}")
    return value


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return a JSON Lines file: one JSON object per row, each on its own line."""
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

    It changes whenever the file is replaced, because programs cannot set the change time back.

    Raises:
        OSError: If the file does not exist.
    """
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
