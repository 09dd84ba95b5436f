"""Writes and reads a run's files: the set-up file, the weights of the policy, their average and the reference, and the
states of the optimizer and the winner budget."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from ..engines.engine import Engine
from ..engines.processes import gather_objects
from ..models.ema import EMA_FOLDER, EMAWeights
from ..models.weight_copies import WeightCopy
from ..step.winner_budget import WinnerBudget
from ..utils.errors import NotFiniteError, UserError
from ..utils.files import replacing
from .checkpoints import Checkpoints, holds_optimizer
from .resuming import check_resumable, keeping_optimizer_settings, stored_settings
from .setup import ARGS_FILE, SETUP_FILE, fingerprint, output_folder, read_setup, write_setup
from .unpickling import refuse_code_in_metadata, tensors_only
from .weights import WeightFiles

IDENTITY = (SETUP_FILE, "model_index.json")  # without them, nobody takes a folder for a run or a pipeline
WEIGHTS = "weights"  # entry of the set-up file: fingerprint of the weights beside it


class RunFiles:
    """Writes a run's results and checkpoints, and reads checkpoints. Call each method in all processes.

    Results are the weights, their average over training, the set-up file and the arguments, in the output folder. A
    checkpoint has the weights and every state that changes during training.

    Args:
        weights ([`WeightFiles`]): Files of the policy's weights.
        weight_copies (`Sequence[WeightCopy]`): The reference and, if the run has them, the averaged weights.
        average ([`EMAWeights`], *optional*): The averaged weights, if any.
        winner_budget ([`WinnerBudget`], *optional*): The winner budget, if any.
        full_pipeline (`bool`): For full tuning, whether to save the whole pipeline, not only the denoiser.
        unpublished (`dict[str, Any]`): Further entries for `training_args.json`, which is never uploaded.
    """

    def __init__(
        self,
        args: TrainingArguments,
        engine: Engine,
        weights: WeightFiles,
        *,
        weight_copies: Sequence[WeightCopy],
        average: EMAWeights | None,
        winner_budget: WinnerBudget | None,
        full_pipeline: bool,
        unpublished: dict[str, Any],
    ):
        self._args = args
        self._engine = engine
        self._weights = weights
        self._weight_copies = weight_copies
        self._average = average
        self._winner_budget = winner_budget
        self._full_pipeline = full_pipeline
        self._unpublished = unpublished
        self.checkpoints = Checkpoints(args)

    # ---- Writing --------------------------------------------------------------------------------------------------

    def save(self, folder: Path, setup: dict[str, Any]) -> None:
        """Write a checkpoint into `folder` if [`RunFiles.writing_checkpoint`] yielded it, otherwise the run's results.
        If that fails, earlier results stay whole.

        Args:
            setup (`dict[str, Any]`): Content of the set-up file.

        Raises:
            `FloatingPointError`: In all processes, before any file is written, if a weight is not finite.
        """
        writes = self._args.should_save
        is_checkpoint = self.checkpoints.is_being_written(folder)
        gathered = self._gather(keep=writes)
        average = None
        if self._average is not None and not is_checkpoint:
            average = self._average.gather(keep=writes)
        weights = self._weights.tensors() if gathered is None else gathered
        self._check_finite(weights, average, together=is_checkpoint or self._engine.holds_shards)
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            setup = {**setup, WEIGHTS: fingerprint(weights)}
        for weight_copy in self._weight_copies if is_checkpoint else ():
            weight_copy.save(folder, write=writes)
        if not writes:
            return
        if is_checkpoint:
            if self._winner_budget is not None:
                self._winner_budget.save(folder)
            self._weights.save(folder, gathered)
            write_setup(folder, setup)
            return
        with replacing(folder, last=IDENTITY) as new:
            self._weights.save(new, gathered, full_pipeline=self._full_pipeline)
            if average is not None:
                self._weights.save(new / EMA_FOLDER, average)
            write_setup(new, setup)
            self._write_args(new)

    def verify_weights(self) -> None:
        """Raise `FloatingPointError` in all processes if the policy's weights are not finite."""
        gathered = self._gather(keep=self._args.should_save)
        self._check_finite(self._weights.tensors() if gathered is None else gathered, None, together=True)

    def _check_finite(
        self, weights: Mapping[str, torch.Tensor], average: Mapping[str, torch.Tensor] | None, *, together: bool
    ) -> None:
        """Raise `FloatingPointError` if a weight is not finite. Only processes that write weights check them.

        Args:
            together (`bool`): Whether all processes call it, so that all raise if one does.
        """
        spoiled: list[str] = []
        if self._args.should_save:
            spoiled = [name for name, tensor in weights.items() if not _is_finite(tensor)]
            spoiled += [f"the average of {name}" for name, value in (average or {}).items() if not _is_finite(value)]
        if together:
            spoiled = next((names for names in gather_objects(spoiled) if names), [])
        if spoiled:
            raise NotFiniteError(
                f"Weights must be finite. {len(spoiled)} tensors are not finite, such as {', '.join(spoiled[:3])}. No "
                "file was written or changed. Resume from the last checkpoint with a lower `learning_rate`, or use "
                "bf16 instead of fp16."
            )

    def _gather(self, *, keep: bool) -> dict[str, torch.Tensor] | None:
        if not self._engine.holds_shards:
            return None
        self._engine.reshard()
        return self._engine.gather(self._weights.tensors(), keep=keep)

    def _write_args(self, folder: Path) -> None:
        """Write the arguments as JSON without access tokens, where transformers would write a pickle with tokens."""
        content = {**json.loads(self._args.to_json_string()), **self._unpublished}
        (folder / ARGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def writing_checkpoint(self, folder: Path) -> Iterator[Path]:
        """Yield a temporary folder for a checkpoint's files, which becomes `folder` at the end of the context; see
        [`Checkpoints.writing`]."""
        with self.checkpoints.writing(folder, self._weights.bytes_needed) as partial:
            yield partial
            if self._args.should_save:
                self._write_args(partial)

    def save_sharded_optimizer(
        self, folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
    ) -> None:
        """Write the states of an optimizer that is sharded over processes, and of the schedule."""
        self._engine.save_state(model, optimizer, folder)
        if self._args.should_save:
            torch.save(scheduler.state_dict(), os.path.join(folder, SCHEDULER_NAME))

    # ---- Reading --------------------------------------------------------------------------------------------------

    def resume_point(self, value: str | bool | None, setup: Callable[[], dict[str, Any]]) -> str | None:
        """Check the checkpoint to resume from, and return its folder. Return `None` to start anew.

        Args:
            value: `resume_from_checkpoint` of [`~transformers.Trainer.train`], or `"latest"`.
            setup (`Callable`): Returns the content of this run's set-up file.

        Raises:
            `ValueError`: If the checkpoint does not exist, is incomplete or damaged, does not fit this run, has no
                optimizer state, or has pickles that could run code.
        """
        point = self.checkpoints.resume_point(value, str(output_folder(self._args)))
        if point is None:
            return None
        folder = Path(point)
        check_resumable(folder, setup(), stored_settings(folder), self._args)
        if not holds_optimizer(folder):
            raise UserError(
                f"A checkpoint to resume from must contain the optimizer's state. {folder} was saved without it "
                "(`save_only_model=True`). Pass this folder as `model` to start anew from its weights."
            )
        refuse_code_in_metadata(folder)
        return point

    @contextlib.contextmanager
    def loading_optimizer(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[None]:
        """Return a context in which the caller loads a checkpoint's optimizer and schedule. It refuses pickles that
        could run code. At its end, this run's optimizer settings replace the checkpoint's."""
        with keeping_optimizer_settings(optimizer, scheduler), self.reading():
            yield

    def load(self, folder: Path, model: nn.Module) -> None:
        """Load all states that [`RunFiles.save`] wrote into a checkpoint."""
        with self.reading():
            self._load_weights(folder, model)
            for weight_copy in self._weight_copies:
                weight_copy.load(folder)
            if self._winner_budget is not None:
                self._winner_budget.load(folder)

    def load_best(self, folder: Path, model: nn.Module) -> None:
        """Load the weights and the averaged weights of the best checkpoint."""
        with self.reading():
            self._load_weights(folder, model)
            if self._average is not None:
                self._average.load(folder)

    def _load_weights(self, folder: Path, model: nn.Module) -> None:
        if self._engine.loads_weights_with_optimizer:
            self._engine.load_state(model, str(folder))
            return
        weights = self._weights.read(folder)
        if read_setup(folder).get(WEIGHTS) not in (None, fingerprint(weights)):
            raise UserError(
                f"A checkpoint must contain the weights with which it was written, and those in {folder} are others. "
                "Copy the checkpoint again, or resume from another checkpoint (with `load_best_model_at_end`, set it "
                "to False, and resume from the newest one)."
            )
        self._engine.reshard()
        self._engine.scatter(weights, self._weights.tensors())

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that refuses pickles that could run code; see [`~.unpickling.tensors_only`]."""
        return tensors_only(self._engine.pickled_types)


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
