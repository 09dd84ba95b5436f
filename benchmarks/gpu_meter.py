"""A trainer that measures the time of its steps and the memory of each part of a step, for `gpu_speed.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_device import Memory
from transformers import TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.step.pair_forward import PairForward

WARMUP, TIMED = 2, 10  # steps
TIMED_SECONDS = 25  # fewer steps are timed if `TIMED` steps take longer


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
