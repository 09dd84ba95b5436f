"""Ends a run after Ctrl-C or SIGTERM: saves a checkpoint, and raises a `KeyboardInterrupt` that says how to resume."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.worker_processes import INTERRUPTS
from ..saving.setup import output_folder
from ..step.finite_check import StepExchange
from ..utils.errors import UserError

logger = logging.getLogger(__name__)


class CheckpointOnInterrupt(TrainerCallback):
    """Saves a checkpoint and ends training after the current step at the first Ctrl-C (SIGINT) or SIGTERM. A second
    signal raises `KeyboardInterrupt` at once.

    It handles signals only during training, and only in the main thread, where Python allows handlers. If training
    raises an exception, call [`~CheckpointOnInterrupt.restore_handlers`]. Several processes stop after the same step:
    the one in which one of them got the signal, or the next.

    Attributes:
        interrupted (`signal.Signals` or `None`): The signal that ended the latest training, or `None` if no signal did.
        stops (`bool`): Whether a signal ends this training: the same value in all processes.
        step (`int`): The optimizer step after which the signal ended training.
        exchange ([`StepExchange`]): Tells all processes in each training step whether one of them got a signal.
    """

    def __init__(self):
        self.interrupted: signal.Signals | None = None
        self.stops = False
        self.step = 0
        self.exchange = StepExchange()
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def reset(self) -> None:
        """Forget the signal that ended an earlier training."""
        self.interrupted = None
        self.stops = False
        self.exchange.reset()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.reset()
        self.restore_handlers()
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in INTERRUPTS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.exchange.stops:
            self.stops = True
            self.step = state.global_step
            self.interrupted = self.interrupted or signal.SIGINT  # processes that got no signal set this too
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False  # a machine that shuts down gives processes only seconds
        return control

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.stops:  # `on_step_end` has already requested the checkpoint
            control.should_evaluate = False
            control.should_save = False
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.restore_handlers()
        if not self.stops:  # training was complete before the signal could stop it
            self.interrupted = None

    def restore_handlers(self) -> None:
        """Restore the signal handlers that were set before training. A second call has no effect."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # `None`: set outside Python

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return self._on_signal_in_worker(number)
        if self.interrupted is not None:
            self.restore_handlers()
            raise KeyboardInterrupt(f"interrupted again by {signal.Signals(number).name}")
        self.interrupted = signal.Signals(number)
        self.exchange.request_stop()
        logger.warning(
            "Got %s. Training saves a checkpoint and stops after this step. A second signal stops it at once, without "
            "a checkpoint.",
            self.interrupted.name,
        )

    def _on_signal_in_worker(self, number: int) -> None:
        """Handle a signal in a data loader worker. A forked worker inherits the handler of the training process.

        Ctrl-C is ignored: the current step may need the worker's next batch. SIGTERM ends it: the data loader stops its
        workers by it.
        """
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def is_due(args: TrainingArguments, state: TrainerState) -> TrainerControl:
    """Return whether transformers evaluates and saves after the current step, in a run that nothing interrupts."""
    control = DefaultFlowCallback().on_step_end(args, state, TrainerControl())
    if float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps:
        control = DefaultFlowCallback().on_epoch_end(args, state, control)
    return control


@contextlib.contextmanager
def stopping_on_interrupt(
    interrupt: CheckpointOnInterrupt, handler: CallbackHandler, args: TrainingArguments
) -> Iterator[None]:
    """Save a checkpoint and stop training at the first Ctrl-C or SIGTERM within the context. Then raise
    `KeyboardInterrupt` in all processes: the code after `train()` expects a finished run.

    It does nothing if signals are already handled, by `interrupt` as a callback of the trainer or by transformers'
    setting `enable_jit_checkpoint`.
    """
    if interrupt in handler.callbacks or args.enable_jit_checkpoint:
        yield
        return
    if any(isinstance(callback, CheckpointOnInterrupt) for callback in handler.callbacks):
        raise UserError(
            "A `CheckpointOnInterrupt` of your own must be among the `callbacks` that the trainer's constructor gets, "
            "because two of them would handle each signal. Got one that was added later."
        )
    handler.add_callback(interrupt)
    try:
        yield
    finally:
        interrupt.restore_handlers()
        handler.remove_callback(interrupt)
    if interrupt.interrupted is not None:
        PartialState().wait_for_everyone()  # a launcher kills the other processes when the first one exits
        hint = resume_hint(args, interrupt.step, "Pass `resume_from_checkpoint=True` to continue.")
        raise KeyboardInterrupt(f"{interrupt.interrupted.name}: training stopped after step {interrupt.step}. {hint}")


def resume_hint(args: TrainingArguments, step: int, how: str) -> str:
    """Return sentences that say where an interrupted run's checkpoint is and, with `how`, how to resume."""
    if args.save_only_model:
        how = "It has no optimizer state (`save_only_model=True`), so the run cannot be resumed."
    return f"Its checkpoint is {output_folder(args) / f'{PREFIX_CHECKPOINT_DIR}-{step}'}. {how}"
