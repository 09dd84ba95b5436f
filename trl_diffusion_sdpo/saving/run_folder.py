"""Protects the output folder of a run: one run at a time, and a new run overwrites no other."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import Timeout
from transformers import TrainingArguments

from ..engines.processes import failing_together
from ..models.ema import EMA_FOLDER
from ..utils.errors import UserError
from ..utils.locks import FolderLock
from .checkpoints import checkpoints_in, restore_replaced, step_of
from .setup import ARGS_FILE, SETUP_FILE, output_folder
from .weights import PEFT_CONFIG_FILE, PEFT_FILE

LOCK_FILE = "_run.lock"  # the underscore excludes it from uploads
LOCK_SECONDS = 10.0  # seconds to wait: data loader workers of a killed run hold its lock for some
# What `save_model` writes, besides folders of the pipeline's components. The patterns are narrow, so that a user's own
# files in the folder are never deleted.
WEIGHTS = ("pytorch_lora_weights*.safetensors", PEFT_FILE, PEFT_CONFIG_FILE, "model_index.json", EMA_FOLDER)
RESULTS = (*WEIGHTS, SETUP_FILE, ARGS_FILE)


class RunFolder:
    """The output folder of a run, and its lock.

    Args:
        components (`Sequence[str]`): Names of the pipeline's components and their folders.
        reports (`Sequence[str]`): Patterns of what training writes besides checkpoints and weights.
    """

    def __init__(self, args: TrainingArguments, components: Sequence[str], reports: Sequence[str]):
        self._args = args
        self._components = components
        self._reports = reports
        self._processes = PartialState()
        self._lock = FolderLock(self.path / LOCK_FILE)
        self._has_begun = False  # whether weights in the folder are from this trainer

    @property
    def path(self) -> Path:
        """Path of the output folder."""
        return output_folder(self._args)

    @contextlib.contextmanager
    def locked(self, *, all_processes: bool = False) -> Iterator[None]:
        """Lock the folder against other runs within the context, which can be nested. The first process locks.

        Args:
            all_processes (`bool`): Whether all processes of the run enter the context together, and so all raise if
                another run has the lock.

        Raises:
            `ValueError`: If another run has locked the folder.
        """
        is_first = self._processes.is_main_process
        with failing_together(UserError) if all_processes else contextlib.nullcontext():
            if is_first:
                self._acquire()
        try:
            yield
        finally:
            if is_first:
                self._lock.release()

    def begin(self, checkpoint: str | Path | None, *, overwrite: bool) -> None:
        """Check that the folder has no checkpoints or weights of another run before a run starts, and no later
        checkpoints before it resumes. Call it in all processes.

        Args:
            checkpoint (`str` or `Path`, *optional*): Checkpoint to resume from, perhaps in another folder.
            overwrite (`bool`): Whether to delete them instead.

        Raises:
            `ValueError`: If there are such checkpoints or weights and `overwrite` is false.
        """
        with failing_together(UserError):
            if self._processes.is_main_process:
                self._clear(checkpoint, overwrite)
        self._has_begun = True

    def _clear(self, checkpoint: str | Path | None, overwrite: bool) -> None:
        restore_replaced(self.path)  # else an earlier run's checkpoint would come back into this run later
        resumes_here = checkpoint is not None and Path(checkpoint).resolve().parent == self.path.resolve()
        step = step_of(Path(checkpoint)) if checkpoint is not None and resumes_here else None
        others = [
            path
            for path, other in checkpoints_in(self.path).items()
            if not resumes_here or (step is not None and other > step)
        ]
        has_results = not resumes_here and (self.path / SETUP_FILE).is_file()  # only `save_model` writes this file
        has_weights = has_results and not self._has_begun
        if not others and not has_weights:
            return
        if not overwrite:
            names = [path.name for path in others] + ["tuned weights"] * has_weights
            raise UserError(
                f"A run needs an output folder without files of another run, and {self.path} contains "
                f"{', '.join(names)}. Continue the other run from its newest checkpoint with "
                "`resume_from_checkpoint=True`, choose another `output_dir`, or set `overwrite_output_dir=True` to "
                "delete these files."
            )
        patterns = [*RESULTS, *self._components, *self._reports] if has_results else []
        for path in {*others, *(path for pattern in patterns for path in self.path.glob(pattern))}:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _acquire(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(LOCK_SECONDS)
        except Timeout as error:
            raise UserError(
                f"Only one run can use an output folder at a time, and another run is using {self.path}. Choose "
                "another `output_dir`, or wait until that run has ended."
            ) from error


def refuse_own_start(output_dir: str, names: Iterable[Any]) -> None:
    """Raise `ValueError` if a run starts from its own output folder, or from a checkpoint or weights in it.

    Otherwise saving would overwrite what the run starts from, or `overwrite_output_dir` would delete it.

    Args:
        names (`Iterable`): Folders, files or Hub ids of the model, the LoRA and the reference. Other objects and `None`
            are ignored.
    """
    folder = Path(output_dir).resolve()
    for name in names:
        path = Path(name).resolve() if isinstance(name, (str, Path)) else None
        if path is None or folder not in (path, *path.parents):
            continue
        first = Path(*path.relative_to(folder).parts[:1])
        if path == folder or step_of(first) is not None or any(first.match(pattern) for pattern in WEIGHTS):
            raise UserError(
                "`output_dir` must not contain the model, the LoRA or the reference from which the run starts, because "
                f"the run would overwrite or delete them. Got the folder {output_dir!r}, and {str(name)!r} is in this "
                "folder. Choose another `output_dir`, or use `resume_from_checkpoint` to continue an interrupted run."
            )
