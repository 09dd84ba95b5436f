"""A run's output folder: used by one run at a time; files of other runs are moved to a subfolder, never deleted."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import TrainingArguments

from ..engines.processes import failing_together, gather_objects
from ..models.ema import EMA_FOLDER
from ..utils.files import write_atomically
from .checkpoints import checkpoints_in, restore_replaced, step_of
from .setup import ARGS_FILE, SETUP_FILE
from .weights import PEFT_CONFIG_FILE, PEFT_FILE

logger = logging.getLogger(__name__)

RUN_FILE, LOCK_FILE = "_run.json", "_run.lock"  # files with an underscore are not published
LOCK_SECONDS = 10.0  # waited for workers of a killed run, which hold its lock until they notice
PREVIOUS_RUN = "previous-run"
# What `save_model` writes, besides folders of the pipeline's components. No wider patterns: users have files there.
WEIGHTS = ("pytorch_lora_weights*.safetensors", PEFT_FILE, PEFT_CONFIG_FILE, "model_index.json", EMA_FOLDER)
RESULTS = (*WEIGHTS, SETUP_FILE, ARGS_FILE, "README.md")


class RunFolder:
    """The output folder of one trainer's run.

    Args:
        components (`Sequence[str]`): Names of the pipeline's components, which are saved in folders of these names.
        plots (`Sequence[str]`): Patterns of images that are written during training.

    Attributes:
        run_id (`str` or `None`): Identifies the run in its folder and checkpoints; `None` before it begins.
    """

    def __init__(self, args: TrainingArguments, components: Sequence[str], plots: Sequence[str]):
        self._args, self._components, self._plots = args, components, plots
        self._processes = PartialState()
        self._lock = FileLock(self.path / LOCK_FILE, timeout=LOCK_SECONDS)
        self.run_id: str | None = None

    @property
    def path(self) -> Path:
        """The output folder."""
        return Path(self._args.output_dir)

    @contextlib.contextmanager
    def locked(self, *, all_processes: bool = False) -> Iterator[None]:
        """Lock the folder against other runs; may be nested. The first process holds the lock.

        Args:
            all_processes (`bool`): Whether all processes enter. They all raise if the folder is in use.

        Raises:
            `ValueError`: If another running process has locked the folder.
        """
        if all_processes:
            self._in_first_process(self._acquire)
        elif self._processes.is_main_process:
            self._acquire()
        try:
            yield
        finally:
            if self._processes.is_main_process:
                self._lock.release()

    def begin(self, checkpoint: str | Path | None, *, overwrite: bool) -> None:
        """Prepare the folder for a run that starts, or resumes from a checkpoint. All processes must call it.

        Args:
            checkpoint (`str` or `Path`, *optional*): What the run resumes from, in this folder or elsewhere.
            overwrite (`bool`): Whether another run's files may be moved into [`PREVIOUS_RUN`].

        Raises:
            `ValueError`: If the folder holds another run and `overwrite` is not set, or the checkpoint is of another
                run than the folder's.
        """
        folder = None if checkpoint is None else Path(checkpoint)
        self.run_id = self._in_first_process(lambda: self._begin(folder, overwrite))

    def _acquire(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"A folder takes one run at a time, and another process writes into {self.path}. Name another "
                "`output_dir`, or wait until that run has ended."
            ) from error

    def _begin(self, checkpoint: Path | None, overwrite: bool) -> str:
        if checkpoint is None or checkpoint.resolve().parent != self.path.resolve():
            self._move_other_run(overwrite)
            run_id = None if checkpoint is None else _run_id_in(checkpoint / SETUP_FILE)
        else:
            run_id = self._common_run_id(checkpoint)
            self._move_later_checkpoints(checkpoint)
        run_id = run_id or secrets.token_hex(6)
        write_atomically(self.path / RUN_FILE, json.dumps({"run_id": run_id}).encode() + b"\n")
        return run_id

    def _move_other_run(self, overwrite: bool) -> None:
        """For a run that does not resume from a checkpoint in this folder."""
        restore_replaced(self.path)
        checkpoints = list(checkpoints_in(self.path))
        has_weights = self.run_id is None and (self.path / SETUP_FILE).is_file()  # not written by this trainer
        found = [f"{len(checkpoints)} checkpoints up to {checkpoints[-1].name}"] if checkpoints else []
        found += ["tuned weights"] if has_weights else []
        if found and not overwrite:
            raise ValueError(
                f"A run starts in a folder without another run, and `output_dir` {self.path} holds one "
                f"({', '.join(found)}): their checkpoints would be taken for one another's. Go on with "
                "`resume_from_checkpoint=True`, name another folder, or set `overwrite_output_dir=True`, which moves "
                f"its files into {PREVIOUS_RUN}-{self._next_number()}."
            )
        if found:
            others = self._matching((*self._plots, RUN_FILE))
            self._move_aside([*checkpoints, *self._results(), *others], "another run")

    def _common_run_id(self, checkpoint: Path) -> str | None:
        here, there = _run_id_in(self.path / RUN_FILE), _run_id_in(checkpoint / SETUP_FILE)
        if here is not None and there is not None and here != there:
            raise ValueError(
                f"A run resumes from its own checkpoints; {checkpoint} is of the run {there}, and {self.path} is "
                f"that of the run {here}. Delete or move the checkpoints of the other run, or name another "
                "`output_dir` to resume from this one there."
            )
        return there or here

    def _move_later_checkpoints(self, checkpoint: Path) -> None:
        """Move the checkpoints and results that were written after the one that is resumed from."""
        step = step_of(checkpoint)
        later = [path for path, other in checkpoints_in(self.path).items() if step is not None and other > step]
        if later:
            self._move_aside([*later, *self._results()], f"after {checkpoint.name}")

    def _results(self) -> list[Path]:
        if not (self.path / SETUP_FILE).is_file():
            return []
        return self._matching((*RESULTS, *self._components))

    def _matching(self, patterns: Sequence[str]) -> list[Path]:
        return sorted({path for pattern in patterns for path in self.path.glob(pattern)})

    def _move_aside(self, paths: list[Path], origin: str) -> None:
        folder = self.path / f"{PREVIOUS_RUN}-{self._next_number()}"
        folder.mkdir()
        for path in paths:
            path.rename(folder / path.name)
        logger.warning("Moved to %s, as of %s: %s.", folder, origin, ", ".join(path.name for path in paths))

    def _next_number(self) -> int:
        numbers = [path.name.rpartition("-")[2] for path in self.path.glob(f"{PREVIOUS_RUN}-*")]
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)

    def _in_first_process(self, action: Callable[[], Any]) -> Any:
        """Call it in the first process; all processes get its result, or its error as a `ValueError`."""
        result = None
        with failing_together(ValueError):
            if self._processes.is_main_process:
                result = action()
        return gather_objects(result)[0]


def refuse_own_start(output_dir: str, names: Iterable[Any]) -> None:
    """Raise `ValueError` where what a run starts from is its output folder, or a checkpoint or weights in it: saving
    would overwrite them, or `overwrite_output_dir` move them.

    Args:
        names (`Iterable`): Folders, files or Hub ids of model, LoRA and reference; objects and `None` pass.
    """
    folder = Path(output_dir).resolve()
    for name in names:
        place = Path(name).resolve() if isinstance(name, (str, Path)) else None
        if place is None or folder not in (place, *place.parents):
            continue
        first = Path(*place.relative_to(folder).parts[:1])
        if place == folder or step_of(first) is not None or any(first.match(pattern) for pattern in WEIGHTS):
            raise ValueError(
                "`output_dir` must be another folder than the model's, the LoRA's and the reference's: saving would "
                f"overwrite or move what the run starts from; got {output_dir!r}, and {str(name)!r} is in it. To go on "
                "with an interrupted run, use `resume_from_checkpoint`."
            )


def _run_id_in(file: Path) -> str | None:
    """The run id in a folder's or a checkpoint's file; `None` if there is none or the file cannot be read."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("run_id")
    except (OSError, ValueError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): its run is unknown.", file, error)
        return None
