"""Protects the output folder of a run: only one run uses a folder at a time, and files of earlier runs are moved into a
subfolder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import TrainingArguments

from ..engines.processes import failing_together
from ..models.ema import EMA_FOLDER
from .checkpoints import checkpoints_in, restore_replaced, step_of
from .setup import ARGS_FILE, SETUP_FILE, output_folder
from .weights import PEFT_CONFIG_FILE, PEFT_FILE

logger = logging.getLogger(__name__)

LOCK_FILE = "_run.lock"  # the underscore excludes the file from uploads
LOCK_SECONDS = 10.0  # time to wait for a lock, because data loader workers of a killed run hold it for some seconds
PREVIOUS_RUN = "previous-run"
# Patterns of the files that `save_model` writes, besides folders of the pipeline's components. The patterns are narrow,
# so that files of the user in the same folder are never moved.
WEIGHTS = ("pytorch_lora_weights*.safetensors", PEFT_FILE, PEFT_CONFIG_FILE, "model_index.json", EMA_FOLDER)
RESULTS = (*WEIGHTS, SETUP_FILE, ARGS_FILE, "README.md")


class RunFolder:
    """Lock of a run's output folder, which also moves the files of earlier runs away.

    Args:
        components (`Sequence[str]`): Names of the pipeline's components. The folders of saved components have these
            names.
        reports (`Sequence[str]`): Patterns of the files that training writes besides checkpoints and weights.
    """

    def __init__(self, args: TrainingArguments, components: Sequence[str], reports: Sequence[str]):
        self._args, self._components, self._reports = args, components, reports
        self._processes = PartialState()
        self._lock = FileLock(self.path / LOCK_FILE, timeout=LOCK_SECONDS)
        self._has_begun = False  # whether this trainer wrote the weights in the folder

    @property
    def path(self) -> Path:
        """Path of the output folder."""
        return output_folder(self._args)

    @contextlib.contextmanager
    def locked(self, *, all_processes: bool = False) -> Iterator[None]:
        """Lock the folder against other runs within the context. Contexts may be nested. The first process of the run
        holds the lock.

        Args:
            all_processes (`bool`): Whether all processes of the run enter the context together. If another run has
                locked the folder, all processes raise.

        Raises:
            `ValueError`: If another run has locked the folder.
        """
        is_first = self._processes.is_main_process
        with failing_together(ValueError) if all_processes else contextlib.nullcontext():
            if is_first:
                self._acquire()
        try:
            yield
        finally:
            if is_first:
                self._release()

    def begin(self, checkpoint: str | Path | None, *, overwrite: bool) -> None:
        """Move files of earlier runs away before a run starts or resumes. All processes must call this method.

        Args:
            checkpoint (`str` or `Path`, *optional*): Checkpoint to resume from. The checkpoint may be in another
                folder.
            overwrite (`bool`): Whether to move the files of another run into a subfolder, instead of raising an error.

        Raises:
            `ValueError`: If the folder contains files of another run and `overwrite` is not set.
        """
        with failing_together(ValueError):
            if self._processes.is_main_process:
                if checkpoint is None or Path(checkpoint).resolve().parent != self.path.resolve():
                    self._move_other_run(overwrite)
                else:
                    self._move_later_checkpoints(Path(checkpoint))
        self._has_begun = True

    def _acquire(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"Only one run can use an output folder at a time, and another run is using {self.path}. Choose "
                "another `output_dir`, or wait until that run has ended."
            ) from error

    def _release(self) -> None:
        if self._lock.lock_counter == 1:
            with contextlib.suppress(OSError):  # Windows does not remove open files
                Path(self._lock.lock_file).unlink()  # a process that waits for the lock then makes a new file
        self._lock.release()

    def _move_other_run(self, overwrite: bool) -> None:
        """Move files of another run into a subfolder. If there are such files, raise `ValueError` unless `overwrite` is
        set."""
        restore_replaced(self.path)
        checkpoints = list(checkpoints_in(self.path))
        has_weights = not self._has_begun and (self.path / SETUP_FILE).is_file()
        files = [f"{len(checkpoints)} checkpoints up to {checkpoints[-1].name}"] if checkpoints else []
        files += ["tuned weights"] if has_weights else []
        if files and not overwrite:
            raise ValueError(
                f"A new run needs an output folder without files of another run, and {self.path} contains "
                f"{' and '.join(files)}. Continue the other run with `resume_from_checkpoint=True`, choose another "
                "`output_dir`, or set `overwrite_output_dir=True` to move the other run's files into the subfolder "
                f"{self._previous_run().name}."
            )
        if files:
            self._move_away([*checkpoints, *self._results(), *self._matching(self._reports)], "files of another run")

    def _move_later_checkpoints(self, checkpoint: Path) -> None:
        """Move the checkpoints and results that were written after `checkpoint`, from which the run resumes."""
        step = step_of(checkpoint)
        later = [path for path, other in checkpoints_in(self.path).items() if step is not None and other > step]
        if later:
            self._move_away([*later, *self._results()], f"files written after {checkpoint.name}")

    def _results(self) -> list[Path]:
        if not (self.path / SETUP_FILE).is_file():
            return []
        return self._matching((*RESULTS, *self._components))

    def _matching(self, patterns: Sequence[str]) -> list[Path]:
        return sorted({path for pattern in patterns for path in self.path.glob(pattern)})

    def _move_away(self, paths: list[Path], what: str) -> None:
        folder = self._previous_run()
        folder.mkdir()
        for path in paths:
            path.rename(folder / path.name)
        logger.warning("Moved %s to %s: %s.", what, folder, ", ".join(path.name for path in paths))

    def _previous_run(self) -> Path:
        """Return the path of a new subfolder for the files of an earlier run."""
        numbers = [path.name.rpartition("-")[2] for path in self.path.glob(f"{PREVIOUS_RUN}-*")]
        number = 1 + max((int(number) for number in numbers if number.isdigit()), default=0)
        return self.path / f"{PREVIOUS_RUN}-{number}"


def refuse_own_start(output_dir: str, names: Iterable[Any]) -> None:
    """Raise `ValueError` if a run starts from its own output folder, or from a checkpoint or weights in that folder.

    Saving would overwrite these files, and `overwrite_output_dir` would move them.

    Args:
        names (`Iterable`): Folders, files or Hub ids of the model, the LoRA and the reference from which the run
            starts. Other objects and `None` are ignored.
    """
    folder = Path(output_dir).resolve()
    for name in names:
        path = Path(name).resolve() if isinstance(name, (str, Path)) else None
        if path is None or folder not in (path, *path.parents):
            continue
        first = Path(*path.relative_to(folder).parts[:1])
        if path == folder or step_of(first) is not None or any(first.match(pattern) for pattern in WEIGHTS):
            raise ValueError(
                "`output_dir` must not contain the model, the LoRA or the reference from which the run starts, because "
                f"the run would overwrite or move them. Got the folder {output_dir!r}, and {str(name)!r} is in this "
                "folder. Choose another `output_dir`, or use `resume_from_checkpoint` to continue an interrupted run."
            )
