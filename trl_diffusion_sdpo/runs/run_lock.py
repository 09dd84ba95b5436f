"""A lock file that keeps two runs from writing into one folder, and that no killed run leaves behind for good."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = "_run.lock"  # with an underscore: not published
BEAT_SECONDS = 20.0  # between two signs of life
PATIENCE_SECONDS = 90.0  # without one, for a holder that cannot be looked at from here
BOOT_ID, PID_NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class FolderInUseError(ValueError):
    """Another run that lives writes into the folder."""


@dataclass(frozen=True)
class Holder:
    """A process as a lock names it.

    Attributes:
        host (`str`): Its machine's name.
        machine (`str`): What tells apart machines and containers of one name, and one machine before and after it was
            started anew; empty where the system does not tell.
        pid (`int`): Its number there.
        started (`str`): When it started, as numbers are given again.
    """

    host: str
    machine: str
    pid: int
    started: str

    @classmethod
    def this_process(cls) -> Holder:
        """The process that asks."""
        machine = _machine()
        return cls(socket.gethostname(), machine, os.getpid(), (_start_of(os.getpid()) or "") if machine else "")

    @property
    def can_be_seen(self) -> bool:
        """Whether its number means here what it meant where the lock was taken."""
        return self.machine != "" and (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def lives(self) -> bool:
        """Whether the process is still there; only where it can be seen."""
        return _start_of(self.pid) == self.started


class RunLock:
    """A file in a folder for as long as a run writes there, with who holds it.

    A lock whose process is gone is taken over: at once where its process could be seen from here, and else, as on other
    machines, in other containers and on systems other than Linux, when it has given no sign of life for `patience`
    seconds. The holder gives one every `beat` seconds, by the file's time of change.

    Args:
        folder (`Path`): Must be there.
        beat, patience (`float`, *optional*): In seconds.
    """

    def __init__(self, folder: Path, *, beat: float = BEAT_SECONDS, patience: float = PATIENCE_SECONDS):
        self.file = folder / LOCK_FILE
        self.beat, self.patience = beat, patience
        self._text = ""
        self._over = threading.Event()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            `FolderInUseError`: If another run holds it.
        """
        self._text = json.dumps(asdict(Holder.this_process())) + "\n"
        while not self._create():
            self._take_away_if_dead()
        self._over.clear()
        threading.Thread(target=self._give_signs_of_life, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Give it back; a lock that somebody else has taken by now stays. Storage that fails is said only: what ends
        the run may be an error of its own, which must not be replaced."""
        self._over.set()
        try:
            if _content(self.file) == self._text:
                self.file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("Could not delete %s: %s. If the next run is refused for it, delete it.", self.file, error)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self._text)
        except OSError:
            self.file.unlink()
            raise
        return True

    def _take_away_if_dead(self) -> None:
        found = _content(self.file)
        if found is None:
            return
        holder = _parsed(found)
        if holder is None:
            if self._watch(lambda: _content(self.file) != found, poll=0.05):
                return  # it was just being written
        elif holder.can_be_seen:
            if holder.lives:
                raise FolderInUseError(self._refusal(f"process {holder.pid} on this machine ({holder.host})"))
        elif self._gives_signs_of_life(holder):
            raise FolderInUseError(self._refusal(f"process {holder.pid} on {holder.host}"))
        self._take_away(found, holder)

    def _refusal(self, who: str) -> str:
        return (
            f"A folder takes one run at a time, and {who} writes into {self.file.parent}. Name another `output_dir`, "
            f"or wait until that run has ended; if you are sure that there is none, delete {self.file}."
        )

    def _gives_signs_of_life(self, holder: Holder) -> bool:
        logger.warning(
            "%s is of process %d on %s, which cannot be seen from here: watching for %.0f seconds whether it lives.",
            *(self.file, holder.pid, holder.host, self.patience),
        )
        before = _changed(self.file)
        return self._watch(lambda: _changed(self.file) != before, poll=1.0) and _changed(self.file) is not None

    def _watch(self, happens: Callable[[], bool], *, poll: float) -> bool:
        """Whether something happens before the patience is at its end."""
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            if happens():
                return True
            time.sleep(min(poll, self.beat))
        return False

    def _take_away(self, found: str, holder: Holder | None) -> None:
        """Move a dead lock out of the way, unless somebody else has done so and holds a new one."""
        aside = self.file.with_name(f"{LOCK_FILE}.{os.getpid()}.{threading.get_ident()}")
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        if _content(aside) == found:
            aside.unlink()
            who = "a process" if holder is None else f"process {holder.pid} on {holder.host}"
            logger.warning("Took over the folder %s from %s, which is gone.", self.file.parent, who)
        else:
            aside.rename(self.file)

    def _give_signs_of_life(self) -> None:
        while not self._over.wait(self.beat):
            try:
                if _content(self.file) not in (self._text, None):
                    return  # somebody else's; one that is not there may be back, as from a look whether it is dead
                os.utime(self.file)
            except OSError:  # of storage that is away for a moment: the next beat tries again
                continue


def _machine() -> str:
    """This start of this machine, or of this container; empty where the system does not tell."""
    if not (BOOT_ID.is_file() and PID_NAMESPACE.is_symlink()):
        return ""
    return f"{BOOT_ID.read_text(encoding='ascii').strip()} {os.readlink(PID_NAMESPACE)}"


def _start_of(pid: int) -> str | None:
    """When a process of Linux started, in clock ticks since the machine did, which no change of the clock moves; `None`
    of one that is gone, or has ended and is not waited for yet."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    values = after_name.split()
    return None if values[0] in "ZX" else values[19]


def _content(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _changed(file: Path) -> int | None:
    """When the file was changed; opened for it, as file systems of a network look anew only then."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _parsed(text: str) -> Holder | None:
    """The holder; `None` of a lock that is just being written or was cut off."""
    try:
        values = json.loads(text)
        return Holder(**{field.name: values[field.name] for field in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        return None
