"""Writes, finds and rotates the checkpoints in a run's output folder. A killed run leaves no incomplete one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from ..engines.processes import failing_together, gather_objects
from ..utils.disk import DiskFullError, check_room
from ..utils.errors import UserError
from ..utils.files import sync_files, sync_folder
from .setup import read_setup

logger = logging.getLogger(__name__)

LATEST = "latest"  # value of `resume_from_checkpoint` from diffusers' scripts
PARTIAL = "_partial"  # folder of unfinished checkpoints, whose underscore excludes it from uploads
REPLACED = ".replaced"  # end of the name of an earlier checkpoint of the same step, until the new one is in its place
# The optimizer's files: of one process or DDP, of FSDP2 (full and sharded), and of DeepSpeed.
OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_WORDS: dict[str, str | bool | None] = {"true": True, "false": None, "none": None, LATEST: LATEST}


def meaning(value: str | os.PathLike | bool | None) -> str | bool | None:
    """Parse a value of `resume_from_checkpoint`. On a command line, `True`, `False` and `None` are strings.

    Returns:
        `True`: resume from the newest checkpoint, which must exist. `"latest"`: the same, if there is one. `None`:
        start anew. Otherwise the folder of the checkpoint to resume from.
    """
    if value is None or isinstance(value, bool):
        return value or None
    return _WORDS.get(str(value).lower(), str(value))


def step_of(checkpoint: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder, or `None` if it is not `checkpoint-<step>`."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> dict[Path, int]:
    """Return the checkpoints in a folder with their steps, sorted by step."""
    steps = {path: step_of(path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    return dict(sorted(((path, step) for path, step in steps.items() if step is not None), key=lambda item: item[1]))


class Checkpoints:
    """The checkpoints in a run's output folder. Call each method in all processes together."""

    def __init__(self, args: TrainingArguments):
        self._args = args
        self._processes = PartialState()
        self._partial: Path | None = None  # temporary folder of the checkpoint being written
        self._last_bytes = 0  # size of the last checkpoint

    # ---- Writing --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, folder: Path, needed: int) -> Iterator[Path]:
        """Yield a temporary folder on the same disk, and rename it to `folder` when all processes have written their
        files. Even if the run is killed, `folder` is missing or complete.

        Args:
            folder (`Path`): Folder of the checkpoint. An earlier one of the same step is replaced.
            needed (`int`): Bytes that the checkpoint takes at least.

        Raises:
            `DiskFullError`: In all processes, before anything is written, if the disk has too little room.
        """
        partial = folder.parent / PARTIAL / folder.name
        with failing_together(DiskFullError):
            if self._args.should_save:
                check_room(folder, max(needed, self._last_bytes))
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        self._partial = partial
        try:
            yield partial
        finally:
            self._partial = None
        self._processes.wait_for_everyone()
        if self._args.should_save:
            self._last_bytes = _finish(partial, folder)
        self._processes.wait_for_everyone()
        if self._processes.is_local_main_process and not self._args.should_save and partial.is_dir():
            _finish(partial, folder)  # each machine has its own disk
            logger.warning(
                "%s is not on a shared disk, so each machine has only the files of its own processes. To resume on all "
                "machines, use an `output_dir` on a disk that the machines share, or set `save_on_each_node=True`.",
                folder,
            )

    def is_being_written(self, folder: Path) -> bool:
        """Return whether `folder` is the temporary folder that [`Checkpoints.writing`] has yielded."""
        return folder == self._partial

    def rotate(self, output_dir: str | os.PathLike, best: str | None) -> None:
        """Delete the oldest checkpoints beyond `save_total_limit`, but never the best or the newest."""
        if self._args.should_save:
            best = None if best is None else str(Path(output_dir) / Path(best).name)
            rotate_checkpoints(str(output_dir), self._args.save_total_limit, best)

    # ---- Reading --------------------------------------------------------------------------------------------------

    def resume_point(self, value: str | os.PathLike | bool | None, output_dir: str) -> str | None:
        """Return the folder of the checkpoint to resume from, or `None` to start anew.

        Args:
            value: Value of `resume_from_checkpoint`; see [`meaning`].
            output_dir (`str`): Folder in which to look for the newest checkpoint.

        Raises:
            `ValueError`: If `value` is `True` and `output_dir` has no checkpoint, or a file of the checkpoint is
                missing. With `"latest"`, the run starts anew if there is none.
        """
        point = meaning(value)
        if point is None:
            return None
        folder: str | None = point if isinstance(point, str) and point != LATEST else self.newest(output_dir)
        if folder is None and point is True:
            raise UserError(
                f"To resume, `output_dir` must contain a checkpoint, but {output_dir} contains none. Start without "
                f"`resume_from_checkpoint`, or use {LATEST!r}, which then starts anew."
            )
        if folder is None:
            if self._processes.is_main_process:
                logger.info("%s contains no checkpoint, so the run starts anew.", output_dir)
            return None
        missing = next((words for words in gather_objects(self._missing(Path(folder))) if words), None)
        if missing is not None:
            raise UserError(
                f"A checkpoint to resume from must be complete. In {folder}, {missing}. If this folder is a copy, copy "
                "it again. Otherwise set `resume_from_checkpoint` to the folder of another checkpoint."
            )
        return folder

    def newest(self, output_dir: str | os.PathLike) -> str | None:
        """Return the checkpoint with the highest step, or `None` if the folder has none."""
        newest = None
        if self._processes.is_main_process and os.path.isdir(output_dir):
            restore_replaced(Path(output_dir))
            newest = get_last_checkpoint(str(output_dir))
        return gather_objects(newest)[0]

    def _missing(self, folder: Path) -> str | None:
        """Return words for the first missing file that this process needs to resume, or `None`.

        transformers itself would resume without the files of the schedule and the random state.
        """
        if not folder.is_dir():
            return "there are no files, because the folder does not exist"
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"{TRAINER_STATE_NAME} is missing or cannot be read"
        needed = []
        if holds_optimizer(folder):
            needed.append(SCHEDULER_NAME)
            processes = self._processes.num_processes
            if read_setup(folder).get("processes") == processes:
                needed.append("rng_state.pth" if processes == 1 else f"rng_state_{self._processes.process_index}.pth")
        return next((f"{name} is missing" for name in needed if not (folder / name).is_file()), None)


def holds_optimizer(folder: Path) -> bool:
    """Return whether a checkpoint has the optimizer's state."""
    return any(True for pattern in OPTIMIZER_STATES for _ in folder.glob(pattern))


def restore_replaced(output_dir: Path) -> None:
    """Undo the first rename of [`_finish`] if the process was killed before the second."""
    for replaced in (output_dir / PARTIAL).glob(f"*{REPLACED}"):
        folder = output_dir / replaced.name.removesuffix(REPLACED)
        if not folder.exists():
            os.rename(replaced, folder)


def _finish(partial: Path, folder: Path) -> int:
    """Flush a checkpoint's files to the disk, rename its temporary folder to `folder`, and return its size in bytes."""
    sync_files(partial)
    if folder.exists():  # no rename replaces a folder with files, so move that one away
        os.rename(folder, partial.with_name(f"{folder.name}{REPLACED}"))
    os.rename(partial, folder)
    sync_folder(folder.parent)
    shutil.rmtree(partial.parent, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
