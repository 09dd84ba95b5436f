"""Lock of a folder against other processes, also on disks that cannot lock files."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

from filelock import FileLock

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)  # another process holds the lock


class FolderLock:
    """Lock on a file in a folder, which a process may acquire several times, and which ends with it.

    On a disk without locks, such as some network disks, it only logs a warning. `filelock` itself would create a file
    there that locks the folder for ever if its process is killed.

    Args:
        file (`Path`): File to lock, which is created and stays.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = FileLock(file)
        self._has_warned = False

    def acquire(self, timeout: float = -1) -> None:
        """Wait up to `timeout` seconds for the lock, by default for ever. Raise `filelock.Timeout` if another process
        still holds it."""
        problem = _why_unlockable(self._file)
        if problem is None:
            self._lock.acquire(timeout)
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The disk of %s cannot lock files (%s). Let no other run use this folder at the same time.",
                self._file.parent,
                problem,
            )

    def release(self) -> None:
        """Release the lock once, if it is held."""
        self._lock.release()


def _why_unlockable(file: Path) -> str | None:
    """Return why a file cannot be locked, or `None` if it can be."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in HELD else str(error.strerror)
    finally:
        os.close(descriptor)
    return None
