"""How a run ends: at an interrupt with a checkpoint, or at once where a checkpoint leaves nothing to train."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .interrupts import CheckpointOnInterrupt

if TYPE_CHECKING:
    from .diffusion_sdpo_trainer import DiffusionSDPOTrainer

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stopping_on_interrupt(trainer: DiffusionSDPOTrainer) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM meanwhile end the training with a checkpoint, and then raise `KeyboardInterrupt`
    in all processes: what follows `train()` in a script is meant for a finished run.

    Somebody else's handling goes first: a [`CheckpointOnInterrupt`] among the callbacks, after which `train()` returns,
    and transformers' own of `enable_jit_checkpoint`.
    """
    given = [call for call in trainer.callback_handler.callbacks if isinstance(call, CheckpointOnInterrupt)]
    if given or trainer.args.enable_jit_checkpoint or not trainer.args.checkpoint_on_interrupt:
        yield
        return
    interrupt = CheckpointOnInterrupt()
    trainer.add_callback(interrupt)
    try:
        yield
    finally:
        interrupt.restore_handlers()
        trainer.remove_callback(interrupt)
    if interrupt.interrupted is not None:
        trainer.accelerator.wait_for_everyone()  # a launcher ends the others when the first is gone
        left = what_is_left(trainer, "Pass `resume_from_checkpoint=True` to go on.")
        raise KeyboardInterrupt(
            f"{interrupt.interrupted.name}: training stopped after step {trainer.state.global_step}; {left}"
        )


def what_is_left(trainer: DiffusionSDPOTrainer, how_to_go_on: str) -> str:
    """Where an interrupted run's checkpoint is, and how to go on from it if it holds more than weights."""
    folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    if trainer.args.save_only_model:
        return (
            f"its weights are in {folder}. It cannot be resumed, as `save_only_model=True` keeps no state of the "
            "optimizer."
        )
    return f"all that it needs to go on is in {folder}. {how_to_go_on}"


class SayNothingIsLeft(TrainerCallback):
    """Says that a resumed run has taken all its steps already; nothing is trained then."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if 0 < state.max_steps <= state.global_step and state.is_world_process_zero:
            logger.warning(
                "Nothing is left to train: the checkpoint is of step %s, and the run ends at %s. The weights are those "
                "of the checkpoint. More `max_steps` or `num_train_epochs` train on.",
                state.global_step,
                state.max_steps,
            )


@contextlib.contextmanager
def borrowed(args: TrainingArguments, **settings: Any) -> Iterator[None]:
    """Have other settings for a moment, where the Trainer reads them and should not act on them."""
    before = {name: getattr(args, name) for name in settings}
    for name, value in settings.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
