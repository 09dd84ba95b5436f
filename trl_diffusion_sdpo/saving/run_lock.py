"""A lock file against two runs in one folder; the lock of a killed run expires."""

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

LOCK_FILE = "_run.lock"  # files with an underscore are not published
HEARTBEAT_SECONDS = 20.0
WAITS_A_HEARTBEAT = 10  # between two looks at a lock that another run holds
TIMEOUT_SECONDS = 90.0  # without a heartbeat, of a holder on another machine
BOOT_ID, PID_NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class FolderInUseError(ValueError):
    """Another running process has locked the folder."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str  # name of its machine
    machine: str  # see `_machine`
    pid: int
    started: str  # its start time, since process ids are reused

    @classmethod
    def this_process(cls) -> Holder:
        """The calling process."""
        machine = _machine()
        return cls(socket.gethostname(), machine, os.getpid(), (_start_time(os.getpid()) or "") if machine else "")

    @property
    def is_local(self) -> bool:
        """Whether its process id is one of this machine and container."""
        return self.machine != "" and (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def is_running(self) -> bool:
        """Whether the process is running; of a local one only."""
        return _start_time(self.pid) == self.started


class RunLock:
    """A lock file in a folder that names the process that holds it.

    The lock of a dead process is taken over: at once if the process was local, and otherwise (on other machines, in
    other containers, on systems other than Linux) after `timeout` seconds without a heartbeat. The holder updates the
    file's modification time every `heartbeat` seconds. The folder must exist; `setting` is what chooses it, for
    messages.
    """

    def __init__(
        self,
        folder: Path,
        *,
        setting: str = "output_dir",
        heartbeat: float = HEARTBEAT_SECONDS,
        timeout: float = TIMEOUT_SECONDS,
    ):
        self.file, self.setting = folder / LOCK_FILE, setting
        self._said: set[str] = set()
        self.heartbeat, self.timeout = heartbeat, timeout
        self._text = ""
        self._released = threading.Event()

    def acquire(self, *, wait: bool = False) -> None:
        """Take the lock; where another run holds it, `FolderInUseError`, or `wait` until it has ended."""
        self._text = json.dumps(asdict(Holder.this_process())) + "\n"
        while not self._create():
            try:
                self._remove_if_dead()
            except FolderInUseError as error:
                if not wait:
                    raise
                self._say_once("%s Waiting for it to end.", error)
                time.sleep(self.heartbeat / WAITS_A_HEARTBEAT)
        self._released.clear()
        threading.Thread(target=self._send_heartbeats, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Delete the file, unless another process has taken the lock over. Failing storage is logged and not raised,
        so that it does not replace an error that ends the run."""
        self._released.set()
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

    def _remove_if_dead(self) -> None:
        found = _content(self.file)
        if found is None:
            return
        holder = _parsed(found)
        if holder is None:
            if self._wait_for(lambda: _content(self.file) != found, poll=0.05):
                return  # its holder was writing it
        elif holder.is_running if holder.is_local else self._has_heartbeat(holder):
            place = f"this machine ({holder.host})" if holder.is_local else holder.host
            raise FolderInUseError(
                f"A folder takes one run at a time, and process {holder.pid} on {place} writes into "
                f"{self.file.parent}. Name another `{self.setting}`, or wait until that run has ended; if you are sure "
                f"that there is none, delete {self.file}."
            )
        self._remove(found, holder)

    def _say_once(self, message: str, *values: object) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)

    def _has_heartbeat(self, holder: Holder) -> bool:
        self._say_once(
            "%s is of process %d on %s: waiting up to %.0f seconds for a heartbeat.",
            *(self.file, holder.pid, holder.host, self.timeout),
        )
        before = _modified(self.file)
        return self._wait_for(lambda: _modified(self.file) != before, poll=1.0) and _modified(self.file) is not None

    def _wait_for(self, condition: Callable[[], bool], *, poll: float) -> bool:
        """Whether a condition becomes true before the timeout."""
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(min(poll, self.heartbeat))
        return False

    def _remove(self, found: str, holder: Holder | None) -> None:
        """Remove a dead process's lock, unless another process has done so and taken the lock."""
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

    def _send_heartbeats(self) -> None:
        while not self._released.wait(self.heartbeat):
            try:
                if _content(self.file) not in (self._text, None):
                    return  # another process's; a missing file may return, as another process renames it to check it
                os.utime(self.file)
            except OSError:  # storage may be unavailable for a moment
                continue


def _machine() -> str:
    """Identifies this machine or container since its last start; empty where the system has no such identifier."""
    if not (BOOT_ID.is_file() and PID_NAMESPACE.is_symlink()):
        return ""
    return f"{BOOT_ID.read_text(encoding='ascii').strip()} {os.readlink(PID_NAMESPACE)}"


def _start_time(pid: int) -> str | None:
    """Start time of a Linux process in clock ticks since boot; `None` if it has ended, also as a zombie."""
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


def _modified(file: Path) -> int | None:
    """Modification time of a file; it is opened, since network file systems refresh their cache only then."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _parsed(text: str) -> Holder | None:
    """The holder; `None` if the lock is incomplete."""
    try:
        values = json.loads(text)
        return Holder(**{field.name: values[field.name] for field in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        return None
