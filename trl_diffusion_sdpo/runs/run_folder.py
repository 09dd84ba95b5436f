"""A run's output folder: one run at a time, one run in it, and what an earlier one left moved aside, never lost."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..artifacts.weights import PEFT_FILE, SETUP_FILE
from ..engines.processes import gather_objects
from ..models.ema import EMA_FOLDER
from ..trainer.sample_images import SAMPLES_FOLDER
from .checkpoint_folders import REPLACED
from .manifest import damage, write_whole
from .run_lock import RunLock

logger = logging.getLogger(__name__)

RUN_FILE = "_run.json"  # with an underscore: not published
PREVIOUS_RUN = "previous-run"
# What `save_model` writes, beside folders of the pipeline's parts, and what is drawn on the way; no wider patterns, as
# users keep files of their own there.
WEIGHTS = ("pytorch_lora_weights*.safetensors", PEFT_FILE, "adapter_config.json", "model_index.json", EMA_FOLDER)
RESULTS = (*WEIGHTS, SETUP_FILE, "training_args.json", "README.md")
PICTURES = (SAMPLES_FOLDER, "noise_bins*.png")


class RunFolder:
    """The folder of one trainer's run.

    Args:
        args (`TrainingArguments`): Name the folder.
        accelerator (`Accelerator`): Of all processes of the run; the first one looks after the folder.
        parts (`list[str]`): Names of the pipeline's components, which become folders.

    Attributes:
        run_id (`str` or `None`): The run's mark, in the folder and in each of its checkpoints; `None` before it begins.
    """

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, parts: list[str]):
        self.args, self.accelerator, self.parts = args, accelerator, parts
        self.run_id: str | None = None
        self._holds = 0
        self._lock: RunLock | None = None

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)

    @contextlib.contextmanager
    def held(self, *, together: bool = False) -> Iterator[None]:
        """Keep other runs out of the folder; may be entered again within.

        Args:
            together (`bool`, *optional*, defaults to `False`): Whether all processes enter, so that all can be told.

        Raises:
            `ValueError`: If another run that lives writes into the folder.
        """
        if self._holds == 0:
            if together:
                self._in_first_process(self._acquire)
            elif self.accelerator.is_main_process:
                self._acquire()
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if self._holds == 0 and self._lock is not None:
                self._lock.release()
                self._lock = None

    def begin(self, checkpoint: str | Path | None, *, overwrite: bool) -> None:
        """Make the folder that of one run: the one that starts, or the one that goes on from a checkpoint. All
        processes enter.

        Args:
            checkpoint (`str` or `Path`, *optional*): What the run goes on from, in this folder or elsewhere.
            overwrite (`bool`): Whether another run's files may be moved aside.

        Raises:
            `ValueError`: If the folder holds another run and `overwrite` is not set, or the checkpoint is of another
                run than the folder's.
        """
        folder = None if checkpoint is None else Path(checkpoint)
        self.run_id = self._in_first_process(lambda: self._begin(folder, overwrite))

    def _acquire(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(self.folder)
        lock.acquire()
        self._lock = lock

    def _begin(self, checkpoint: Path | None, overwrite: bool) -> str:
        if checkpoint is None or checkpoint.resolve().parent != self.folder.resolve():
            self._make_room(overwrite)
            run_id = None if checkpoint is None else _run_of(checkpoint / SETUP_FILE)
        else:
            run_id = self._same_run(checkpoint)
            self._leave_later_ones(checkpoint)
        run_id = run_id or secrets.token_hex(6)
        write_whole(self.folder / RUN_FILE, json.dumps({"run_id": run_id}) + "\n")
        return run_id

    def _make_room(self, overwrite: bool) -> None:
        """For a run that has nothing in this folder yet."""
        checkpoints = [
            *checkpoints_in(self.folder),
            *replaced_in(self.folder),
        ]  # these may be all that a kill has left
        whole = [path.name for path in checkpoints if not damage(path, checksums=False)]
        has_weights = self.run_id is None and (self.folder / SETUP_FILE).is_file()  # not this trainer's own
        found = [*whole[:3], *([f"{len(whole) - 3} more checkpoints"] if len(whole) > 3 else [])]
        found += ["tuned weights"] if has_weights else []
        if found and not overwrite:
            raise ValueError(
                f"A run starts in a folder without another run, and `output_dir` {self.folder} holds one "
                f"({', '.join(found)}): their checkpoints would be taken for one another's. Go on with "
                "`resume_from_checkpoint=True`, name another folder, or set `overwrite_output_dir=True`, which moves "
                f"what is there into {PREVIOUS_RUN}-{self._next_number()}. If it was to resume and all were passed "
                "over as damaged, only their sizes are right: delete them, or do one of the latter two."
            )
        if found:  # what a kill has cut off is no run: the next checkpoints take its place
            others = self._matching((*PICTURES, RUN_FILE))
            self._set_aside([*checkpoints, *self._results(), *others], "another run")

    def _same_run(self, checkpoint: Path) -> str | None:
        here, there = _run_of(self.folder / RUN_FILE), _run_of(checkpoint / SETUP_FILE)
        if here is not None and there is not None and here != there:
            raise ValueError(
                f"A run goes on from its own checkpoints; {checkpoint} is of the run {there}, and {self.folder} is "
                f"that of the run {here}. Delete or move the checkpoints of the other run, or name another "
                "`output_dir` to go on from this one there."
            )
        return there or here

    def _leave_later_ones(self, checkpoint: Path) -> None:
        """Where a run goes on from an earlier checkpoint, later ones are not of what it becomes."""
        step = step_of(checkpoint)
        found = [*checkpoints_in(self.folder), *replaced_in(self.folder)]
        later = [path for path in found if step is not None and step_of(path.with_suffix("")) > step]
        later = [path for path in later if not damage(path, checksums=False)]
        if later:
            self._set_aside([*later, *self._results()], f"after {checkpoint.name}")

    def _results(self) -> list[Path]:
        if not (self.folder / SETUP_FILE).is_file():
            return []
        return self._matching((*RESULTS, *self.parts))

    def _matching(self, patterns: tuple[str, ...]) -> list[Path]:
        return sorted({path for pattern in patterns for path in self.folder.glob(pattern)})

    def _set_aside(self, paths: list[Path], what: str) -> None:
        aside = self.folder / f"{PREVIOUS_RUN}-{self._next_number()}"
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)
        logger.warning("Moved to %s, as of %s: %s.", aside, what, ", ".join(path.name for path in paths))

    def _next_number(self) -> int:
        numbers = [path.name.rpartition("-")[2] for path in self.folder.glob(f"{PREVIOUS_RUN}-*")]
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)

    def _in_first_process(self, action: Callable[[], Any]) -> Any:
        """What it returns or, as a `ValueError`, raises, in all processes."""
        self.accelerator.wait_for_everyone()
        result, error = None, None
        if self.accelerator.is_main_process:
            try:
                result = action()
            except (ValueError, OSError) as raised:  # the others would wait for it
                error = raised
        result, message = gather_objects((result, None if error is None else str(error)))[0]
        if message is not None:
            raise error or ValueError(message)
        return result


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, by step."""
    named = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) is not None)
    return sorted(named, key=step_of)


def replaced_in(folder: Path) -> list[Path]:
    """Checkpoints that were to be replaced by others of their steps, which a kill has cut off."""
    found = (path for path in folder.glob(f"*{REPLACED}") if step_of(path.with_suffix("")) is not None)
    return sorted(found)


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's name says; `None` of other names."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def _run_of(file: Path) -> str | None:
    """The run that a file of a folder or of a checkpoint names; `None` where there is none or it cannot be read."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("run_id")
    except (OSError, ValueError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): taken as of an unknown run.", file, error)
        return None
