"""The checkpoints of a run on the disk: begun, sealed, found again, checked and rotated, by all processes together."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .manifest import NOT_WEIGHTS, OPTIMIZER_STATES, Manifest, damage, files_of, measure, written_by
from .unpickling import foreign_code

if TYPE_CHECKING:
    from ..trainer.diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

LATEST = "latest"  # as diffusers' scripts call it
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
REPLACED = ".replaced"
_WORDS = {"true": True, "false": None, "none": None, LATEST: LATEST}


def meaning(value: str | os.PathLike | bool | None) -> str | bool | None:
    """`resume_from_checkpoint` in the form that the trainer takes, also from the words of a command line.

    Returns:
        `True` for the newest checkpoint, `"latest"` for the newest if there is one, `None` for a new start, or a
        folder.
    """
    if value is None or isinstance(value, bool):
        return value or None
    return _WORDS.get(str(value).lower(), str(value))


class CheckpointFolders:
    """What a trainer knows of the checkpoints in its output folder. Every method is called by all processes.

    Args:
        args ([`DiffusionSDPOConfig`]): Tells which of them write, how much is kept and whether files are trusted.
    """

    def __init__(self, args: DiffusionSDPOConfig):
        self._args, self._processes = args, PartialState()
        self._begun: Path | None = None

    # ---- Writing --------------------------------------------------------------------------------------------------

    def begin(self, folder: Path) -> None:
        """Make a folder for a checkpoint that is unfinished until it is sealed. An earlier one of the same step is set
        aside until then."""
        if self._args.should_save:
            sequence = 1 + max((order[0] for order, _ in _in_order(folder.parent)), default=0)
            _set_aside(folder)
            folder.mkdir(parents=True)
            Manifest(sequence).write(folder)
        self._begun = folder
        self._processes.wait_for_everyone()

    def is_begun(self, folder: Path) -> bool:
        """Whether a folder is the checkpoint that is being written."""
        return folder == self._begun

    def seal(self, folder: Path) -> None:
        """Say that a checkpoint is whole: every process measures what it has written, and the manifest names all."""
        self._begun = None
        self._processes.wait_for_everyone()
        if self._args.save_on_each_node:  # each machine has a folder of its own: other machines' files are other ones
            files = measure(folder, files_of(folder) if self._args.should_save else [])
        else:
            files = self._measured_by_all(folder)
        if not self._args.should_save:
            return
        Manifest(Manifest.read(folder).sequence, True, files).write(folder)
        _delete_if_possible(_aside(folder))

    def _measured_by_all(self, folder: Path) -> dict[str, list[Any]]:
        """Every process's files, for the manifest in the first one's folder. Without a folder that all machines share,
        the others' files are not in it, and a manifest that named them would call the checkpoint damaged for ever."""
        own = written_by(files_of(folder), self._processes.process_index, self._processes.num_processes)
        reports = gather_object([measure(folder, own)])
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
        """Delete what is more than `save_total_limit`, oldest first, in the order in which they were written; never the
        best one or the newest whole one, and broken ones before whole ones."""
        limit = self._args.save_total_limit
        if limit is None or limit <= 0 or not self._args.should_save:
            return
        folders = [folder for _, folder in _in_order(Path(output_dir))]
        whole = [folder for folder in folders if not damage(folder, checksums=False)]
        if not whole:
            return
        best_folder = None if best is None else Path(best).resolve()
        others = [folder for folder in whole if folder.resolve() != best_folder]
        room = max(limit - (len(whole) - len(others)), 1 if whole[-1] in others else 0)
        kept = {folder for folder in folders if folder.resolve() == best_folder} | {
            *others[max(len(others) - room, 0) :]
        }
        for folder in folders:
            if folder not in kept:
                logger.info("Deleting %s, as `save_total_limit` is %s.", folder, limit)
                _delete_if_possible(folder)

    # ---- Reading --------------------------------------------------------------------------------------------------

    def resume_point(self, value: str | os.PathLike | bool | None, output_dir: str) -> str | None:
        """The checkpoint to go on from, verified; `None` for a new start.

        Args:
            value (`str` or `bool`, *optional*): See [`meaning`].
            output_dir (`str`): Where `True` and `"latest"` look.

        Raises:
            `ValueError`: If there is no whole one, or the one that was named is not whole.
        """
        point = meaning(value)
        if point is None:
            return None
        if point is not True and point != LATEST:
            self._check_named(Path(point))
            return point
        found = self.newest(output_dir)
        if found is None and point is True:
            raise ValueError(
                f"To resume, `output_dir` must hold a complete checkpoint; {output_dir} has none. Start without "
                f"`resume_from_checkpoint`, or with {LATEST!r}, which begins anew where there is none."
            )
        if found is None:
            self._say(logging.INFO, "%s holds no complete checkpoint: the run starts anew.", output_dir)
        return None if found is None else str(found)

    def newest(self, output_dir: str | os.PathLike) -> Path | None:
        """The checkpoint that was written last of those that are whole; `None` if there is none."""
        if self._args.should_save:
            _bring_back(Path(output_dir))
        self._processes.wait_for_everyone()
        named = gather_object([(order, str(folder)) for order, folder in _in_order(Path(output_dir))])
        passed_over = False
        for _, name in sorted(set(named), reverse=True):
            found = self.damage(Path(name))
            if not found:
                if passed_over:
                    self._say(logging.WARNING, "Going on from %s, the newest checkpoint that is whole.", name)
                return Path(name)
            passed_over = True
            self._say(logging.WARNING, "Passing over %s: %s.", name, "; ".join(found))
        return None

    def damage(self, folder: Path, *, without: Sequence[str] = ()) -> list[str]:
        """What is wrong with a checkpoint: each process reads a share of its files, and all know what any found."""
        part, parts = self._share()
        found = sorted(set(gather_object(damage(folder, part=part, parts=parts, without=without))))
        if not found and Manifest.read(folder) is None:
            self._say(logging.WARNING, "%s has no checksums, as older versions wrote it: taken as it is.", folder)
        return found

    def check_best(self, folder: Path) -> None:
        """Raise `ValueError` where the weights of the best checkpoint, which training ends with, are damaged."""
        found = self.damage(folder, without=NOT_WEIGHTS)
        if found:
            raise ValueError(
                f"`load_best_model_at_end` needs the best checkpoint as it was written; {folder} is not: "
                f"{'; '.join(found)}. Resume from the newest checkpoint with `load_best_model_at_end=False` to have "
                "the last weights."
            )

    def refuse_code(self, folder: Path, known: Sequence[type]) -> None:
        """Raise `ValueError` where a checkpoint's pickled files could run code, unless `trust_checkpoint` is set.

        Args:
            folder (`Path`): The checkpoint.
            known (`Sequence[type]`): The engine's own classes in its files.
        """
        if self._args.trust_checkpoint:
            return
        part, parts = self._share()
        found = sorted(set(gather_object(foreign_code(folder, known, part=part, parts=parts))))
        if found:
            raise ValueError(
                f"A checkpoint to resume from must hold tensors, numbers and settings only; in {folder} "
                f"{'; '.join(found)}. This can run code when it is read: if you know who wrote it, set "
                "`trust_checkpoint=True`."
            )

    def _share(self) -> tuple[int, int]:
        """Which part of a checkpoint's files this process looks at: all, where each machine has files of its own."""
        if self._args.save_on_each_node:
            return 0, 1
        return self._processes.process_index, self._processes.num_processes

    def _check_named(self, folder: Path) -> None:
        found = self.damage(folder)
        if found:
            raise ValueError(
                f"A checkpoint to resume from must have been written to its end and be as it was written; {folder} is "
                f"not: {'; '.join(found)}. Pass another one, or True to have the newest whole one found."
            )

    def _say(self, level: int, message: str, *values: object) -> None:
        if self._processes.is_main_process:
            logger.log(level, message, *values)


def holds_optimizer(folder: Path) -> bool:
    """Whether a checkpoint has the optimizer's state."""
    return any(True for pattern in OPTIMIZER_STATES for _ in folder.glob(pattern))


def _in_order(output_dir: Path) -> list[tuple[tuple[int, int], Path]]:
    """Checkpoints, oldest first: in the order in which they were begun, then by step. Clocks tell nothing of copied
    files, and the step nothing of a run that went on from an earlier checkpoint."""
    found = []
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        name = _NAME.fullmatch(folder.name)
        if name is not None and folder.is_dir():
            manifest = Manifest.read(folder)
            found.append(((0 if manifest is None else manifest.sequence, int(name[1])), folder))
    return sorted(found)


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + REPLACED)


def _set_aside(folder: Path) -> None:
    """Make room for a checkpoint of the same step; one that is whole stays until the new one is."""
    if not folder.exists():
        return
    if damage(folder, checksums=False):
        _delete(folder)
        return
    _delete(_aside(folder))
    os.rename(folder, _aside(folder))


def _bring_back(output_dir: Path) -> None:
    """Undo what [`_set_aside`] did where the new checkpoint was cut off."""
    for aside in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*{REPLACED}"):
        folder = aside.with_name(aside.name.removesuffix(REPLACED))
        if not folder.exists() or damage(folder, checksums=False):
            _delete(folder)
            os.rename(aside, folder)
        else:
            _delete_if_possible(aside)


def _delete(folder: Path) -> None:
    """Delete a checkpoint if it is there. What is left by a kill meanwhile is no checkpoint for any version."""
    if folder.exists():
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _delete_if_possible(folder: Path) -> None:
    """Delete what is no longer needed; what cannot be deleted costs room on the disk, and is no reason to end a run."""
    try:
        _delete(folder)
    except OSError as error:
        logger.warning("Could not delete %s, which is no longer needed: %s. Delete it by hand.", folder, error)
