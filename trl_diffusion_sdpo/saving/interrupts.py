"""Ends an interrupted run with a checkpoint and a `KeyboardInterrupt` that says how to resume."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..engines.worker_processes import INTERRUPTS
from ..step.meters import StepExchange
from .setup import output_folder

logger = logging.getLogger(__name__)


class CheckpointOnInterrupt(TrainerCallback):
    """Saves a checkpoint and ends training after the current step at the first Ctrl-C (SIGINT) or SIGTERM. A second
    signal raises `KeyboardInterrupt` at once.

    It acts between begin and end of training, and only in the main thread, because Python allows no signal handlers
    elsewhere. If training ends by an exception, call [`~CheckpointOnInterrupt.restore_handlers`]. Several processes
    stop together, at most one step after the step in which any of them was interrupted.

    Attributes:
        interrupted (`signal.Signals` or `None`): The signal that ended the latest training, if one did.
    """

    def __init__(self):
        self.interrupted: signal.Signals | None = None
        self.exchange = StepExchange()
        self._agreed = False
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._agreed, self.interrupted = False, None
        self.exchange.reset()
        self.restore_handlers()
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in INTERRUPTS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.exchange.stops:
            self._agreed = True
            self.interrupted = self.interrupted or signal.SIGINT  # all processes end alike
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False  # a machine that is shut down leaves only seconds
        return control

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._agreed:  # the checkpoint of this cut epoch is written already
            control.should_evaluate = False
            control.should_save = False
        return control

    @property
    def stops(self) -> bool:
        """Whether all processes have agreed that a signal ends this training."""
        return self._agreed

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.restore_handlers()
        if not self._agreed:  # training ended before the other processes received the signal
            self.interrupted = None

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers. Further calls have no effect."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set outside Python

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return self._on_signal_in_worker(number)
        if self.interrupted is not None:
            self.restore_handlers()
            raise KeyboardInterrupt(f"interrupted again by {signal.Signals(number).name}")
        self.interrupted = signal.Signals(number)
        self.exchange.request_stop()
        logger.warning(
            "%s: training stops with a checkpoint after this step. A second signal stops it at once, without one.",
            self.interrupted.name,
        )

    def _on_signal_in_worker(self, number: int) -> None:
        """Handle a signal in a forked data loader worker, which inherits the handler. Ctrl-C is ignored because the
        step needs the worker's batch. SIGTERM ends the worker, because the loader stops workers by it."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def was_interrupted(callbacks: Iterable[TrainerCallback]) -> bool:
    """Return whether a [`CheckpointOnInterrupt`] among the callbacks ends the training. All processes get the same
    answer."""
    return any(isinstance(callback, CheckpointOnInterrupt) and callback.stops for callback in callbacks)


def step_exchange(callbacks: Iterable[TrainerCallback]) -> StepExchange:
    """Return the [`StepExchange`] of the [`CheckpointOnInterrupt`] among the callbacks, or a new one if there is none.

    The training step sends its flags, and the callback stops all processes after the same step.
    """
    exchanges = [callback.exchange for callback in callbacks if isinstance(callback, CheckpointOnInterrupt)]
    return exchanges[-1] if exchanges else StepExchange()  # the last callback receives the signals


@contextlib.contextmanager
def stopping_on_interrupt(
    args: TrainingArguments, callbacks: CallbackHandler, global_step: Callable[[], int]
) -> Iterator[None]:
    """End the training with a checkpoint at the first Ctrl-C or SIGTERM within the context. Then raise
    `KeyboardInterrupt` in all processes, because the code after `train()` in a script expects a finished run.

    Nothing happens if a [`CheckpointOnInterrupt`] among the callbacks or transformers' `enable_jit_checkpoint` handles
    signals already.
    """
    handled = any(isinstance(callback, CheckpointOnInterrupt) for callback in callbacks.callbacks)
    if handled or args.enable_jit_checkpoint:
        yield
        return
    interrupt = CheckpointOnInterrupt()
    callbacks.add_callback(interrupt)
    try:
        yield
    finally:
        interrupt.restore_handlers()
        callbacks.remove_callback(interrupt)
    if interrupt.interrupted is not None:
        PartialState().wait_for_everyone()  # a launcher kills the other processes when the first one exits
        hint = resume_hint(args, global_step(), "Pass `resume_from_checkpoint=True` to continue.")
        raise KeyboardInterrupt(f"{interrupt.interrupted.name}: training stopped after step {global_step()}; {hint}")


def resume_hint(args: TrainingArguments, step: int, how: str) -> str:
    """Return a sentence on where an interrupted run's checkpoint is, and how to resume from it if that is possible."""
    folder = output_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if args.save_only_model:
        return (
            f"its weights are in {folder}. It cannot be resumed, because `save_only_model=True` saves no state of the "
            "optimizer."
        )
    return f"its checkpoint is {folder}. {how}"
