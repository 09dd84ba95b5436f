"""One run at a time in a folder: real processes that hold the lock, are killed with it, or hold it elsewhere."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from trl_diffusion_sdpo.saving.run_lock import LOCK_FILE, FolderInUseError, Holder, RunLock

HOLDS = """
import sys, time
from pathlib import Path
from trl_diffusion_sdpo.saving.run_lock import RunLock

RunLock(Path(sys.argv[1]), heartbeat=0.05).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def lock(folder) -> RunLock:
    return RunLock(folder, heartbeat=0.05, timeout=0.3)


def write_lock(folder, **other) -> str:
    text = json.dumps(asdict(replace(Holder.this_process(), **other)))
    (folder / LOCK_FILE).write_text(text)
    return text


def test_a_second_run_is_told_who_holds_the_folder(other, tmp_path):
    with pytest.raises(FolderInUseError, match=rf"process {other.pid} on this machine .*{LOCK_FILE}"):
        lock(tmp_path).acquire()


def test_a_killed_run_blocks_nobody_even_before_its_parent_has_waited_for_it(other, tmp_path, caplog):
    other.kill()
    while open(f"/proc/{other.pid}/stat").read().split()[2] != "Z":
        time.sleep(0.01)
    started = time.monotonic()
    mine = lock(tmp_path)
    mine.acquire()
    assert time.monotonic() - started < 0.3  # at once: no timeout for a local process
    assert f"from process {other.pid}" in caplog.text
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_process_number_that_was_given_again_is_another_process(tmp_path):
    write_lock(tmp_path, started="1")
    lock(tmp_path).acquire()


def test_the_own_process_holds_it_against_another_trainer_in_it(tmp_path):
    first = lock(tmp_path)
    first.acquire()
    with pytest.raises(FolderInUseError):
        lock(tmp_path).acquire()
    first.release()
    lock(tmp_path).acquire()


ELSEWHERE = [{"host": "node17"}, {"machine": "another boot"}, {"machine": ""}]


@pytest.mark.parametrize("elsewhere", ELSEWHERE, ids=["host", "container", "unknown"])
def test_a_lock_from_elsewhere_is_taken_over_if_it_gives_no_sign_of_life(elsewhere, tmp_path, caplog):
    write_lock(tmp_path, pid=1, **elsewhere)
    started = time.monotonic()
    lock(tmp_path).acquire()
    assert time.monotonic() - started >= 0.3
    assert "Took over the folder" in caplog.text


def test_a_lock_from_elsewhere_that_gives_signs_of_life_is_kept(tmp_path):
    """The holder is this process, under the name of another machine; its own signs are what is seen."""
    holder = lock(tmp_path)
    holder.acquire()
    holder._text = write_lock(tmp_path, host="node17", pid=4711)
    with pytest.raises(FolderInUseError, match=r"process 4711 on node17 .*delete"):
        RunLock(tmp_path, heartbeat=0.05, timeout=10).acquire()
    holder.release()


def test_a_lock_cut_off_while_it_was_written_blocks_for_a_moment_only(tmp_path):
    (tmp_path / LOCK_FILE).write_text('{"host": "')
    lock(tmp_path).acquire()


def test_a_lock_that_somebody_else_has_taken_over_is_left_to_him(tmp_path):
    mine = lock(tmp_path)
    mine.acquire()
    text = write_lock(tmp_path, host="node17")
    time.sleep(0.12)  # two heartbeats: none is sent for another process
    changed = (tmp_path / LOCK_FILE).stat().st_mtime_ns
    time.sleep(0.12)
    assert (tmp_path / LOCK_FILE).stat().st_mtime_ns == changed
    mine.release()
    assert (tmp_path / LOCK_FILE).read_text() == text


def test_a_lock_that_is_away_for_a_moment_gives_signs_of_life_again(tmp_path):
    mine = lock(tmp_path)
    mine.acquire()
    (tmp_path / LOCK_FILE).rename(tmp_path / "away")
    time.sleep(0.2)  # four heartbeats
    (tmp_path / "away").rename(tmp_path / LOCK_FILE)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    until = time.monotonic() + 10
    while (tmp_path / LOCK_FILE).stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / LOCK_FILE).stat().st_mtime > 0
    mine.release()


def test_a_lock_that_cannot_be_given_back_leaves_the_run_s_own_error(tmp_path, caplog):
    """The file has become a folder, which can be neither read nor deleted as one."""
    mine = lock(tmp_path)
    mine.acquire()
    (tmp_path / LOCK_FILE).unlink()
    (tmp_path / LOCK_FILE).mkdir()
    mine.release()
    assert f"Could not delete {tmp_path / LOCK_FILE}" in caplog.text


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    """Four processes at once, ten times."""
    script = """
import sys
from pathlib import Path
from trl_diffusion_sdpo.saving.run_lock import FolderInUseError, RunLock

print("ready", flush=True)
sys.stdin.readline()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        RunLock(folder).acquire()
    except FolderInUseError:
        continue
    with open(folder / "winners", "a") as file:
        file.write("x")
print("through", flush=True)
sys.stdin.readline()
"""
    folders = [tmp_path / str(number) for number in range(10)]
    for folder in folders:
        folder.mkdir()
        write_lock(folder, started="1")
    command, pipe = [sys.executable, "-c", script, str(tmp_path)], subprocess.PIPE
    runs = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for word in ("ready", "through"):  # all live until the last one is through
        assert [run.stdout.readline().strip() for run in runs] == [word] * 4
        for run in runs:
            run.stdin.write("\n")
            run.stdin.flush()
    for run in runs:
        run.communicate()
        assert run.returncode == 0
    assert [(folder / "winners").read_text() for folder in folders] == ["x"] * 10


def test_the_holder_names_machine_and_process():
    holder = Holder.this_process()
    assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
    assert holder.is_local and holder.is_running
    assert not replace(holder, pid=2**22 + 1).is_running
