"""What measures the time of steps and the memory of their parts, for `gpu_speed.py` and `real_run.py`."""

import json
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.step.pair_forward import PairForward

WARMUP, TIMED = 2, 10  # steps
TIMED_SECONDS = 25  # fewer steps are timed if `TIMED` steps take longer
GIB = 2**30
# Part of the device name that PyTorch reports -> TFLOP/s of dense bf16 matrix products with float32 sums. The first
# match counts. NVIDIA also states twice these numbers, for matrices of which half is zeros. Sources: data sheets of
# B200, H100
# (H200 has the same die), A100, L40S, L4 and A10; white papers of GA102 (RTX 3090, A6000), AD102 (RTX 4090) and GB202
# (RTX 5090).
PEAK_TERAFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "A6000": 154.8,
}


def peak_flops(device_name: str) -> float | None:
    """Return the FLOP/s that the maker states for a device, or `None` if the device is not in the table."""
    matches = (peak for part, peak in PEAK_TERAFLOPS.items() if re.search(rf"\b{part}\b", device_name))
    return next((1e12 * peak for peak in matches), None)


class Memory:
    """Peak memory of the parts of a step.

    On CUDA, this is what PyTorch has allocated. On the CPU, it is the largest memory that the process ever had, so a
    part only shows if it exceeds all earlier parts.

    Attributes:
        name (`str`): Name of the device.
        total (`int`): Memory of the device in bytes.
        peaks (`dict[str, float]`): Peak of each part in GiB.
    """

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self.name = torch.cuda.get_device_name() if self._cuda else "CPU"
        self.total = torch.cuda.mem_get_info()[1] if self._cuda else 0
        self.peaks: dict[str, float] = {}
        self._highest = 0

    def now(self) -> float:
        """Return the time in seconds, after all queued work has finished."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def note(self, name: str) -> None:
        """Record how much memory is allocated now."""
        self.peaks[name] = (torch.cuda.memory_allocated() if self._cuda else self._peak()) / GIB

    def begin(self) -> None:
        """Begin a step. `end` records its peak."""
        self.note("between steps")
        self._highest = 0
        self._reset()

    def end(self) -> None:
        self._highest = max(self._highest, self._peak())
        self.peaks["step"] = self._highest / GIB
        self.peaks["policy and backward pass"] = self._peak() / GIB

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note the peak of a part of the step; parts do not overlap."""
        self._highest = max(self._highest, self._peak())
        self._reset()
        try:
            yield
        finally:
            peak = self._peak()
            self.peaks[name] = max(self.peaks.get(name, 0), peak / GIB)
            self._highest = max(self._highest, peak)
            self._reset()

    def _peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()


class MeasuredForward(PairForward):
    """Records the peak memory of each part of a step while `memory` is set."""

    memory: Memory | None = None

    def encode(self, inputs: dict[str, Any]) -> Any:
        with self._part("encoding"):
            return super().encode(inputs)

    def predict_reference(self, model: Any, batches: Any) -> Any:
        with self._part("reference"):
            return super().predict_reference(model, batches)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        if self.memory is None:
            yield
            return
        with self.memory.part(name):
            yield


class MeasuredTrainer(DiffusionSDPOTrainer):
    pair_forward_class = MeasuredForward
    first_loss: torch.Tensor | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.first_loss = loss.detach() if self.first_loss is None else self.first_loss
        return loss


class Meter(TrainerCallback):
    """Times at most `TIMED` steps after `WARMUP` steps, within `TIMED_SECONDS`, then measures memory in one more step.

    Attributes:
        seconds (`list[float]`): Times from the end of a step to the end of the next, including the loading of its
            batch.
        working (`list[float]`): Times from the batch to the new weights.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self.seconds: list[float] = []
        self.working: list[float] = []
        self.trainer: MeasuredTrainer | None = None
        self._last = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended = self.memory.now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        enough = len(self.seconds) >= WARMUP + 1 and sum(self.seconds[WARMUP:]) >= TIMED_SECONDS
        self._last = enough or state.global_step == args.max_steps - 1
        if self._last:
            self.memory.begin()
            self.trainer.pair_forward.memory = self.memory
        self._began = self.memory.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._last:
            self.memory.end()
            self.trainer.pair_forward.memory = None
            control.should_training_stop = True
            return
        now = self.memory.now()
        self.seconds.append(now - self._ended)
        self.working.append(now - self._began)
        self._ended = now


class SpeedLog(TrainerCallback):
    """Appends the seconds of each step and the peak memory to a file, at the end of each call that trains the run."""

    def __init__(self, memory: Memory, file: Path):
        self.memory = memory
        self.file = file
        self.seconds: list[float] = []
        memory.note("before the run")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.begin()
        self._ended = self.memory.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.memory.now()
        self.seconds.append(now - self._ended)
        self._ended = now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.end()
        line = {"device": self.memory.name, "seconds": self.seconds, "peaks_gib": self.memory.peaks}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
