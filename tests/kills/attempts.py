"""Attempts of a run: each starts one or two processes, and ends when they are done or killed.

Imports take seconds, so they happen once, in a process that does not train. Every attempt is forked from it.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkProcess as Process
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "distributed")]
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets  # noqa: E402  the environment above must be set before the imports
import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.comm.torch import build_shm_op  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tiny_pipelines import stable_diffusion  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from worker import RecordingTrainer, engine_args  # noqa: E402

from trl_diffusion_sdpo import DiffusionSDPOConfig  # noqa: E402

FORK = multiprocessing.get_context("fork")
PHASES = ("building", "training", "saving a checkpoint", "saving the result")
SECONDS = 120  # timeout of an attempt
# One block: the engines' cost grows with the number of tensors.
UNET = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
COMMON_ARGS = {
    "max_steps": 5,  # ends between two checkpoints and in the middle of an epoch
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "beta": 500.0,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
PAIRS = 20


@dataclass
class Attempt:
    """The result of an attempt: exit codes of its processes, the seconds since training began, and the kill with its
    phase, unless the attempt had ended before."""

    exit_codes: list[int]
    training_seconds: float
    killed: dict

    @property
    def done(self) -> bool:
        return not any(self.exit_codes)


@dataclass
class Kill:
    """SIGKILL to a process, `seconds` after the first process enters a phase."""

    process: int
    seconds: float
    phase: int


class PhaseCallback(TrainerCallback):
    def __init__(self, set_phase: Callable[[int], None]):
        self.set_phase = set_phase

    def on_train_begin(self, args, state, control, **kwargs):
        self.set_phase(1)


class Trainer(RecordingTrainer):
    """Reports its phase."""

    set_phase: Callable[[int], None]

    def _save_checkpoint(self, model, trial):
        self.set_phase(2)
        super()._save_checkpoint(model, trial)
        self.set_phase(1)


def prepare(folder: Path) -> None:
    """Write the tiny pipeline and the pairs in a subprocess. Build DeepSpeed's extension before any process is killed,
    because a process that dies while building leaves a lock file, and all others wait for it."""
    build_shm_op()
    if not (folder / "pairs").is_dir():
        assert wait_for([fork(lambda: _prepare(folder), folder / "prepare.txt")], time.monotonic() + SECONDS) == [0]


def _prepare(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    stable_diffusion.build(**UNET).save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(2 * PAIRS)]
    rows = [{"prompt": f"prompt {i}", "chosen": images[2 * i], "rejected": images[2 * i + 1]} for i in range(PAIRS)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "pairs"))


def attempt(run: dict, folder: Path, kill: Kill | None = None) -> Attempt:
    """Make one attempt of a run, in `folder`.

    Args:
        run (`dict`): `name`, `engine` (`"plain"` for one process, else two), `lora`, `args`, and `resume`, as
            `train()` takes it; `count_writes` and `die_at_write` for [`faults`].
        kill ([`Kill`], *optional*): Which process to kill, and when.
    """
    world = 1 if run["engine"] == "plain" else 2
    phases = multiprocessing.RawArray("i", world)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    (folder / run["name"]).mkdir(parents=True, exist_ok=True)
    began, processes = time.monotonic(), []
    for rank in range(world):
        environment = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        function = _process(run, folder, rank, phases, environment)
        processes.append(fork(function, folder / run["name"] / f"log{rank}.txt"))
    deadline, killed, training_began = began + SECONDS, {}, began
    if kill is None or kill.phase > 0:
        training_began = wait_until(lambda: phases[0] >= 1 or any_ended(processes), deadline)
    if kill is not None:
        moment = wait_until(lambda: phases[0] >= kill.phase or any_ended(processes), deadline) + kill.seconds
        wait_until(lambda: time.monotonic() >= moment or any_ended(processes), deadline)
        if not any_ended(processes):
            killed = {"process": kill.process, "seconds": kill.seconds, "phase": PHASES[phases[kill.process]]}
            processes[kill.process].kill()
    codes = wait_for(processes, deadline)
    return Attempt(codes, time.monotonic() - training_began, killed)


def _process(run: dict, folder: Path, rank: int, phases, environment: dict[str, str]) -> Callable[[], None]:
    def run_rank() -> None:
        os.environ.update(environment)
        if environment:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
            deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)

        def set_phase(phase: int) -> None:
            phases[rank] = phase

        train(run, folder, rank, set_phase)

    return run_rank


def train(run: dict, folder: Path, rank: int, set_phase: Callable[[int], None]) -> None:
    torch.manual_seed(0)  # for the initial weights of a LoRA
    engine = {} if run["engine"] == "plain" else engine_args(run["engine"].removesuffix("-sharded"))
    if run["engine"] == "fsdp2-sharded":  # accelerate's default
        engine["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
    output = folder / run["name"] / "output"
    args = DiffusionSDPOConfig(str(output), **{**COMMON_ARGS, **engine, **run["args"]})
    trainer = Trainer(
        str(folder / "model"),
        None,
        args,
        datasets.load_from_disk(str(folder / "pairs")),
        peft_config=LoraConfig(**LORA) if run["lora"] else None,
        callbacks=[PhaseCallback(set_phase)],
    )
    trainer.set_phase = set_phase
    with faults(run, folder / run["name"]):
        trainer.train(resume_from_checkpoint=run["resume"])
        set_phase(3)
        trainer.save_model()
    if rank == 0:
        losses = [{name: entry[name] for name in ("step", "loss", "grad_norm")} for entry in logged(trainer)]
        facts = {"step": trainer.state.global_step, "steps_taken": len(trainer.batches), "log": losses}
        (folder / run["name"] / "facts.json").write_text(json.dumps(facts))


def logged(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- Kills at a write ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def faults(run: dict, folder: Path):
    """Record the writes to the output folder, or SIGKILL this process at one of them.

    `count_writes` lists them in `writes.json`; `die_at_write` is an index into that list.
    """
    if not run.get("count_writes") and run.get("die_at_write") is None:
        yield
        return
    import safetensors.torch

    writes = Writes(str(folder / "output"), run.get("die_at_write"))
    torch.save = writes.wrapped(torch.save)
    safetensors.torch.serialize_file = writes.wrapped(safetensors.torch.serialize_file)
    sys.addaudithook(writes.audit)
    yield
    (folder / "writes.json").write_text(json.dumps(writes.listed))


class Writes:
    """The writes to a folder; the process is killed before one of them, or after the first half of a large file.

    Args:
        folder (`str`): The folder.
        last (`int`, *optional*): Index of the write at which to kill the process.
    """

    def __init__(self, folder: str, last: int | None):
        self.folder, self.last = folder, last
        self.listed: list[str] = []
        self._nested = False  # files opened within `torch.save` belong to its write

    def add(self, what: str, path, before_kill: Callable[[], None] | None = None) -> None:
        if not str(path).startswith(self.folder):
            return
        self.listed.append(f"{what} {os.path.relpath(path, self.folder)}")
        if len(self.listed) - 1 == self.last:
            if before_kill is not None:
                before_kill()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(self, writer: Callable) -> Callable:
        """Return a function that records the writes of `writer`, which writes to its second argument."""

        def write(*given, **named):
            path, was_nested = given[1], self._nested
            self.add("before", path)
            self._nested = True
            result = writer(*given, **named)
            self._nested = was_nested
            self.add("half of", path, lambda: os.truncate(path, os.path.getsize(path) // 2))
            return result

        return write

    def audit(self, event: str, values: tuple) -> None:
        if self._nested:
            return
        if event == "open" and isinstance(values[0], (str, os.PathLike)) and writes_to(values):
            self.add("open", values[0])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            self.add(event.removeprefix("os."), values[0])


def writes_to(values: tuple) -> bool:
    _, mode, flags = values
    return any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


# ---- Processes -------------------------------------------------------------------------------------------------------


def fork(function: Callable[[], None], log: Path) -> Process:
    """Run a function in a child process with a new process group, whose output goes into a file."""

    def run() -> None:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        function()

    process = FORK.Process(target=run)
    process.start()
    return process


def wait_until(condition: Callable[[], bool], deadline: float) -> float:
    """Wait until a condition is true or the deadline has passed, and return the time."""
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return time.monotonic()


def any_ended(processes: list[Process]) -> bool:
    return any(process.exitcode is not None for process in processes)


def wait_for(processes: list[Process], deadline: float) -> list[int]:
    """Return the exit codes of all processes. When one fails, end the others like a launcher: SIGTERM, then SIGKILL."""
    wait_until(lambda: all(process.exitcode == 0 for process in processes) or any(map(failed, processes)), deadline)
    for process in processes:
        if process.exitcode is None:
            process.terminate()
    limit = time.monotonic() + 1.0
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):  # DataLoader workers may outlive their process
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return [process.exitcode for process in processes]


def failed(process: Process) -> bool:
    return process.exitcode not in (None, 0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def generator_of(*words: object) -> random.Random:
    """Return a random generator that is seeded by words."""
    return random.Random("/".join(str(word) for word in words))
