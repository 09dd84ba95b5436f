"""Signals to all processes of a job spare the data loaders' workers, and the run ends with a whole checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.data.worker_processes import CollateIntoSharedMemory, WorkerStart
from trl_diffusion_sdpo.utils.errors import UserError


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return torch.tensor(index)


class Stuck(Numbers):
    """The third item never comes."""

    def __getitem__(self, index):
        if index == 2:
            time.sleep(600)
        return super().__getitem__(index)


def batches_of(dataset, method, workers):
    loader = DataLoader(
        dataset,
        batch_size=1,
        num_workers=workers,
        worker_init_fn=WorkerStart(),
        multiprocessing_context=method,
    )
    return iter(loader)


def all_end(workers, seconds=30):
    deadline = time.monotonic() + seconds
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_take_no_notice_of_signals_and_end_with_their_loader(method):
    count = 2 if method == "fork" else 1
    batches = batches_of(Numbers(), method, count)
    workers = batches._workers

    def send():
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)

    assert [int(next(batches)) for _ in range(10)] == list(range(10))
    send()
    assert [int(next(batches)) for _ in range(40)] == list(range(10, 50))
    assert all(worker.is_alive() for worker in workers)
    del batches
    assert all_end(workers)


@pytest.mark.parametrize("end", ["exception", "kill"])
def test_workers_end_with_the_process_that_trains_even_if_they_are_stuck(end, tmp_path):
    """multiprocessing waits for its workers at the end of a process, after a SIGTERM that these do not notice."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_worker_processes import Stuck, batches_of\n"
        "batches = batches_of(Stuck(), 'fork', 2)\n"
        "next(batches)\n"
        "print(*(worker.pid for worker in batches._workers), flush=True)\n"
        "kept = sys.modules['kept'] = batches\n"
        "input() if sys.argv[2] == 'kill' else 1 / 0\n"
    )
    command = [sys.executable, "-c", script, os.path.dirname(__file__), end]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = [int(word) for word in run.stdout.readline().split()]
    assert len(pids) == 2
    if end == "kill":
        run.kill()
    try:
        run.wait(timeout=60)
    finally:
        run.kill()
    deadline = time.monotonic() + 30
    while any(runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(runs(pid) for pid in pids)


def runs(pid):
    """A process that has ended and that nobody has waited for does not run."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_in_a_run_with_workers_leaves_a_checkpoint_from_which_the_same_command_resumes(
    sd_folder, make_pairs, tmp_path
):
    """A terminal sends SIGINT to all processes of the group."""
    make_pairs(16).save_to_disk(str(tmp_path / "pairs"))
    command = [sys.executable, "-m", "trl_diffusion_sdpo.cli.main", "train"]
    command += ["--model_name_or_path", sd_folder, "--dataset_name", str(tmp_path / "pairs"), "--use_peft"]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "5000", "--per_device_train_batch_size", "1"]
    command += [
        "--dataloader_num_workers",
        "2",
        "--dataloader_persistent_workers",
        "true",
        "--use_cpu",
        "--report_to",
        "none",
        "--logging_steps",
        "1",
    ]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    said = []
    for line in run.stdout:
        said.append(line)
        if "  loss " in line:
            break
    else:
        pytest.fail("".join(said)[-3000:])
    os.killpg(run.pid, signal.SIGINT)
    try:
        rest = run.communicate(timeout=300)[0]
    finally:
        run.kill()
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) == 1, rest[-3000:]
    assert run.returncode == 130 and "--resume_from_checkpoint true" in rest
    assert "exited unexpectedly" not in rest and "Traceback" not in rest
    step = int(checkpoints[0].name.rpartition("-")[2])
    more = ["--resume_from_checkpoint", "true", "--max_steps", str(step + 1)]
    assert main([*command[3:], *more]) == 0
    state = json.loads((tmp_path / "run" / f"checkpoint-{step + 1}" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, step + 2))


def test_full_shared_memory_is_named(monkeypatch):
    def fail(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # workers are forked from here
    collate = CollateIntoSharedMemory(torch.stack)
    assert len(collate([torch.zeros(2)])) == 1  # without a worker, no shared memory is needed
    with pytest.raises(UserError, match="/dev/shm.*`dataloader_num_workers`"):
        next(iter(DataLoader([torch.zeros(2)], num_workers=1, collate_fn=collate)))
