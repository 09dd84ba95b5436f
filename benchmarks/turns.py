"""Run steps of several trainers and hand-written loops in turns within one process, so that other load affects all
alike."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOTrainer


def now(device: str) -> float:
    """Return the time in seconds.

    On CUDA this is wall time after all queued work. On the CPU it is the process's CPU time, which excludes other
    programs.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations and the bytes of the tensors that they return. Both are equal in every run."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = operation(*args, **(kwargs or {}))
        self.count += 1
        for tensor in returned if isinstance(returned, tuple | list) else (returned,):
            if isinstance(tensor, torch.Tensor):
                self.bytes += tensor.numel() * tensor.element_size()
        return returned


class InTurns:
    """A thread that waits before every step until it may continue.

    All contestants run in such threads, because the main thread allocates memory differently.

    Args:
        work (`Callable`): Function that calls `begin` before and `end` after each step.
        device (`str`): Device, which decides how time is measured.
        threads (`int`): Number of PyTorch threads. Every Python thread has its own setting.

    Attributes:
        steps (`list[float]`): Seconds of each step, from the batch to the new weights.
        turns (`list[float]`): Seconds of each step together with the loading of the next batch.
        losses (`list[torch.Tensor]`): Loss of each step.
        operations (`Operations`): Operations of the last step, which `advance(counted=True)` ran. Its time is not in
            `steps`.
    """

    def __init__(self, work: Callable[["InTurns"], None], device: str, threads: int):
        self.steps: list[float] = []
        self.turns: list[float] = []
        self.losses: list[torch.Tensor] = []
        self._work = work
        self._device = device
        self._threads = threads
        self.operations = Operations()
        self._counted = False
        self._go = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._began = now(device)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def advance(self, *, counted: bool = False) -> None:
        """Do one step and load the next batch."""
        self._counted = counted
        began = now(self._device)
        self._go.release()
        self._wait()
        if not counted:
            self.turns.append(now(self._device) - began)

    def begin(self) -> None:
        """Wait for the turn. The thread calls this."""
        self._arrived.release()
        self._go.acquire()
        if self._counted:
            self.operations.__enter__()
        self._began = now(self._device)

    def end(self) -> None:
        """Finish the step. The thread calls this."""
        if self._counted:
            self.operations.__exit__(None, None, None)
            return
        self.steps.append(now(self._device) - self._began)

    def _wait(self) -> None:
        """Wait until the thread waits for its next turn or has ended."""
        while not self._arrived.acquire(timeout=1):  # wake up regularly, so that Python can handle Ctrl-C
            pass
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            self._work(self)
        except BaseException as error:
            self._error = error
        finally:
            self._arrived.release()


class Recording:
    """Mixin for a trainer that records the loss of every step."""

    def take_turns(self, turns: InTurns) -> None:
        """Train as the work of `turns`."""
        self._turns = turns
        self.add_callback(_Turns(turns))
        self.train()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._turns.losses.append(loss.detach())
        return loss


class RecordingTrainer(Recording, DiffusionSDPOTrainer):
    """A trainer of this package that records the loss of every step."""


class _Turns(TrainerCallback):
    def __init__(self, turns: InTurns):
        self._turns = turns

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._turns.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._turns.end()


def loop(step: Callable[[Any], torch.Tensor], batches: Iterator[Any]) -> Callable[[InTurns], None]:
    """Return the work of an [`InTurns`] that does a hand-written step with each batch. Making batches is not timed."""

    def work(turns: InTurns) -> None:
        for batch in batches:
            turns.begin()
            loss = step(batch)
            turns.end()
            turns.losses.append(loss)

    return work
