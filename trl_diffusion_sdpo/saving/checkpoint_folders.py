"""The checkpoint folders of a run: begun, completed, found, checked and rotated by all processes together."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .manifest import NOT_WEIGHTS, OPTIMIZER_STATES, Manifest, damage, files_of, measure, written_by
from .unpickling import foreign_code

logger = logging.getLogger(__name__)

LATEST = "latest"  # as in diffusers' scripts
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_REPLACED = ".replaced"
_WORDS: dict[str, str | bool | None] = {"true": True, "false": None, "none": None, LATEST: LATEST}


def meaning(value: str | os.PathLike | bool | None) -> str | bool | None:
    """The value of `resume_from_checkpoint`, also from the words of a command line: `True` for the newest checkpoint,
    `"latest"` for the newest if there is one, `None` for a new start, or a folder."""
    if value is None or isinstance(value, bool):
        return value or None
    return _WORDS.get(str(value).lower(), str(value))


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; `None` for other names."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> dict[Path, int]:
    """The checkpoints in a folder, intact or not, with their steps, in the order of steps; also those that were about
    to be replaced when a run was killed."""
    found = {path: step_of(path.with_name(path.name.removesuffix(_REPLACED))) for path in folder.glob("*")}
    steps = {path: step for path, step in found.items() if step is not None}
    return dict(sorted(steps.items(), key=lambda item: (item[1], item[0])))


class CheckpointFolders:
    """The checkpoints in a run's output folder. All processes must call every method.

    Attributes:
        last_bytes (`int`): Of the checkpoint that was completed last; 0 before the first, and in processes that do not
            write manifests.
    """

    def __init__(self, args: TrainingArguments):
        self._args, self._processes = args, PartialState()
        self._begun: Path | None = None
        self.last_bytes = 0

    # ---- Writing --------------------------------------------------------------------------------------------------

    def begin(self, folder: Path) -> None:
        """Make the folder of a checkpoint, incomplete until [`CheckpointFolders.complete`]. Until then, an earlier
        checkpoint of the same step has another name."""
        if self._args.should_save:
            sequence = 1 + max((order[0] for order, _ in _in_order(folder.parent)), default=0)
            _rename_replaced(folder)
            folder.mkdir(parents=True)
            Manifest(sequence).write(folder)
        self._begun = folder
        self._processes.wait_for_everyone()

    def is_begun(self, folder: Path) -> bool:
        """Whether a folder is the checkpoint that is being written."""
        return folder == self._begun

    def complete(self, folder: Path) -> None:
        """Mark a checkpoint as complete: every process measures its files, and the manifest lists all of them."""
        self._begun = None
        self._processes.wait_for_everyone()
        if self._args.save_on_each_node:  # each machine has its own folder with its own files
            files = measure(folder, files_of(folder) if self._args.should_save else [])
        else:
            files = self._measured_by_all(folder)
        if not self._args.should_save:
            return
        Manifest(Manifest.read(folder).sequence, True, files).write(folder)
        self.last_bytes = sum(size for size, _ in files.values())
        _delete_if_possible(_replaced(folder))

    def _measured_by_all(self, folder: Path) -> dict[str, list[Any]]:
        """Sizes and checksums of all processes' files, for the manifest in the first one's folder. Without a folder
        that machines share, the other machines' files are missing there, and are not listed."""
        names = written_by(files_of(folder), self._processes.process_index, self._processes.num_processes)
        reports = gather_object([measure(folder, names)])
        files = {name: record for report in reports for name, record in report.items()}
        if not self._args.should_save:
            return files
        elsewhere = sorted(name for name in files if not (folder / name).is_file())
        if elsewhere:
            logger.warning(
                "%s lies in another folder on each machine: %s are on other machines only, and are not checked. To "
                "resume on all of them, name an `output_dir` that all share, or set `save_on_each_node=True`.",
                *(folder, ", ".join(elsewhere)),
            )
        return {name: record for name, record in files.items() if name not in elsewhere}

    def rotate(self, output_dir: str | os.PathLike, best: str | None) -> None:
        """Delete checkpoints beyond `save_total_limit` in the order in which they were written; damaged ones first,
        never the best one or the newest complete one."""
        limit = self._args.save_total_limit
        if limit is None or limit <= 0 or not self._args.should_save:
            return
        folders = [folder for _, folder in _in_order(Path(output_dir))]
        complete = [folder for folder in folders if not damage(folder, checksums=False)]
        if not complete:
            return
        best_folder = None if best is None else Path(best).resolve()
        others = [folder for folder in complete if folder.resolve() != best_folder]
        count = max(limit - (len(complete) - len(others)), 1 if complete[-1] in others else 0)
        newest = others[max(len(others) - count, 0) :]
        for folder in folders:
            if folder not in newest and folder.resolve() != best_folder:
                logger.info("Deleting %s, as `save_total_limit` is %s.", folder, limit)
                _delete_if_possible(folder)

    # ---- Reading --------------------------------------------------------------------------------------------------

    def resume_point(self, value: str | os.PathLike | bool | None, output_dir: str) -> str | None:
        """The checkpoint to resume from, after its checksums were compared; `None` for a new start. `value` is as of
        [`meaning`]. `ValueError` where `output_dir` has no complete one, or the named one is damaged."""
        point = meaning(value)
        if point is None:
            return None
        if isinstance(point, str) and point != LATEST:
            self._check_named(Path(point))
            return point
        found = self.newest(output_dir)
        if found is None and point is True:
            raise ValueError(
                f"To resume, `output_dir` must hold a complete checkpoint; {output_dir} has none. Start without "
                f"`resume_from_checkpoint`, or with {LATEST!r}, which begins anew where there is none."
            )
        if found is None:
            self._log(logging.INFO, "%s holds no complete checkpoint: the run starts anew.", output_dir)
        return None if found is None else str(found)

    def newest(self, output_dir: str | os.PathLike) -> Path | None:
        """The undamaged checkpoint that was written last; `None` if there is none."""
        if self._args.should_save:
            _restore_replaced(Path(output_dir))
        self._processes.wait_for_everyone()
        named = gather_object([(order, str(folder)) for order, folder in _in_order(Path(output_dir))])
        passed_over = False
        for _, name in sorted(set(named), reverse=True):
            found = self.damage(Path(name))
            if not found:
                if passed_over:
                    self._log(logging.WARNING, "Resuming from %s, the newest undamaged checkpoint.", name)
                return Path(name)
            passed_over = True
            self._log(logging.WARNING, "Skipping %s: %s.", name, "; ".join(found))
        return None

    def damage(self, folder: Path, *, without: Sequence[str] = ()) -> list[str]:
        """See [`~.manifest.damage`]; each process reads a share of the files, and all return the findings of all."""
        part, parts = self._share()
        found = sorted(set(gather_object(damage(folder, part=part, parts=parts, without=without))))
        if not found and Manifest.read(folder) is None:
            self._log(logging.WARNING, "%s has no checksums: its files cannot be checked.", folder)
        return found

    def check_best(self, folder: Path) -> None:
        """Raise `ValueError` where the weights of the best checkpoint are damaged."""
        found = self.damage(folder, without=NOT_WEIGHTS)
        if found:
            raise ValueError(
                f"`load_best_model_at_end` needs the best checkpoint as it was written; {folder} is not: "
                f"{'; '.join(found)}. Resume from the newest checkpoint with `load_best_model_at_end=False` to have "
                "the last weights."
            )

    def refuse_code(self, folder: Path, known: Sequence[type]) -> None:
        """Raise `ValueError` where a checkpoint's pickled files could run code; the classes `known`, the engine's, are
        allowed."""
        part, parts = self._share()
        found = sorted(set(gather_object(foreign_code(folder, known, part=part, parts=parts))))
        if found:
            raise ValueError(
                f"A checkpoint to resume from must hold tensors, numbers and settings only; in {folder} "
                f"{'; '.join(found)}. This can run code when it is read: if you know who wrote it, set "
                "`trust_checkpoint=True`."
            )

    def _share(self) -> tuple[int, int]:
        """This process's index and number of shares of a checkpoint's files; all files where machines share none."""
        if self._args.save_on_each_node:
            return 0, 1
        return self._processes.process_index, self._processes.num_processes

    def _check_named(self, folder: Path) -> None:
        found = self.damage(folder)
        if found:
            raise ValueError(
                f"A checkpoint to resume from must have been written to its end and be as it was written; {folder} is "
                f"not: {'; '.join(found)}. Pass another one, or True for the newest undamaged one."
            )

    def _log(self, level: int, message: str, *values: object) -> None:
        if self._processes.is_main_process:
            logger.log(level, message, *values)


def holds_optimizer(folder: Path) -> bool:
    """Whether a checkpoint has the optimizer's state."""
    return any(True for pattern in OPTIMIZER_STATES for _ in folder.glob(pattern))


def _in_order(output_dir: Path) -> list[tuple[tuple[int, int], Path]]:
    """Checkpoints by the order in which they were begun, then by step. Times of files change when they are copied, and
    a run that resumed from an earlier checkpoint repeats steps."""
    found = []
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = step_of(folder)
        if step is not None and folder.is_dir():
            manifest = Manifest.read(folder)
            found.append(((0 if manifest is None else manifest.sequence, step), folder))
    return sorted(found)


def _replaced(folder: Path) -> Path:
    return folder.with_name(folder.name + _REPLACED)


def _rename_replaced(folder: Path) -> None:
    """Rename a checkpoint of the same step; a complete one is deleted only when the new one is complete."""
    if not folder.exists():
        return
    if damage(folder, checksums=False):
        _delete(folder)
        return
    _delete(_replaced(folder))
    os.rename(folder, _replaced(folder))


def _restore_replaced(output_dir: Path) -> None:
    """Undo [`_rename_replaced`] where the new checkpoint was not completed."""
    for replaced in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*{_REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if not folder.exists() or damage(folder, checksums=False):
            _delete(folder)
            os.rename(replaced, folder)
        else:
            _delete_if_possible(replaced)


def _delete(folder: Path) -> None:
    """Delete a checkpoint if it exists, and first the file without which it is not recognised as one."""
    if folder.exists():
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _delete_if_possible(folder: Path) -> None:
    """Delete a checkpoint that is no longer needed; a failure is logged, not raised."""
    try:
        _delete(folder)
    except OSError as error:
        logger.warning("Could not delete %s, which is no longer needed: %s. Delete it by hand.", folder, error)
