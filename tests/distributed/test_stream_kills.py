"""A run on a stream, killed and restarted, trains on the same pairs as an undisturbed one: none twice, none left out,
in one process and in two."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("stream_worker.py")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
STEPS, SECONDS, KILLS = 9, 240, 3


def start(folder: Path, processes: int, workers: int, kind: str) -> subprocess.Popen:
    arguments = [str(WORKER), str(folder), str(STEPS), str(workers), kind]
    command = [sys.executable, *(LAUNCH if processes == 2 else ()), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(folder: Path, processes: int, workers: int, kind: str) -> None:
    run = start(folder, processes, workers, kind)
    assert run.wait(SECONDS) == 0, (folder / "log.txt").read_text()[-3000:]


def notes(folder: Path, rank: int) -> list:
    """Steps, prompts and images of a process, of all its starts."""
    file = folder / f"notes-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def trained(folder: Path, rank: int) -> list:
    """Return the notes that count. A start that continues at a step replaces earlier notes from that step on."""
    kept: list = []
    is_new = False
    for step, batch in notes(folder, rank):
        if step == "start":
            is_new = True
            continue
        if is_new:
            kept, is_new = [note for note in kept if note[0] < step], False
        kept.append([step, batch])
    return kept


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["pairs", "single images"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_and_resumed_run_trains_on_the_pairs_of_an_undisturbed_one(tmp_path, processes, workers, kind):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    finish(undisturbed, processes, workers, kind)
    generator, killed = random.Random(processes + 2 * workers), 0
    for _ in range(KILLS):
        before, run, deadline = (
            len(notes(disturbed, 0)),
            start(disturbed, processes, workers, kind),
            time.monotonic() + SECONDS,
        )
        wanted = before + 1 + generator.randint(1, 7)  # micro-batches, of two in a step, after the note of the start
        while run.poll() is None and len(notes(disturbed, 0)) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(generator.random() * 0.1)
        killed += run.poll() is None
        os.killpg(run.pid, signal.SIGKILL)
        for process in subprocess.run(["pgrep", "-f", str(disturbed)], capture_output=True, text=True).stdout.split():
            os.kill(int(process), signal.SIGKILL)  # torchrun gives each process a session of its own
        run.wait(SECONDS)
    finish(disturbed, processes, workers, kind)
    assert killed
    for rank in range(processes):
        assert trained(disturbed, rank) == trained(undisturbed, rank)
        assert len(trained(undisturbed, rank)) == 2 * STEPS
