"""Callbacks that report on a run: plots of metrics, the verdict, and the files at the end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..engines.processes import in_any_process
from ..saving.model_card import forget_recommended_scales
from ..saving.setup import output_folder
from ..utils.files import VERDICT_FILE
from .console import say
from .history import is_evaluation
from .interrupts import CheckpointOnInterrupt, resume_hint
from .plots import CURVES_FILE, changes_by_noise_bin, has_curves, noise_bin_file, plot_curves, plot_noise_bins
from .sample_images import SampleImagesCallback, final_step
from .tracked_images import TrackedImages
from .verdict import (
    ADVICE,
    RISES,
    RunFacts,
    rise_at,
    ruined_in_training,
    verdict_of,
    words_of_rise,
    write_verdict,
)

logger = logging.getLogger(__name__)

LOGS_TO_WARN = 3  # no warning from training logs before there are this many


class NoiseBinPlotCallback(TrainerCallback):
    """After every evaluation, plots how the errors in each noise bin differ from the reference's, and writes the plot
    into the output folder: `noise_bins.png` for metrics with the prefix `eval`, `noise_bins_ema.png` for `eval_ema`."""

    def __init__(self, images: TrackedImages):
        self._images = images

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not state.is_world_process_zero:
            return
        for prefix, record in changes_by_noise_bin(state.log_history).items():
            file = output_folder(args) / noise_bin_file(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            plot_noise_bins(record, file)
            if f"{prefix}_errors/winner" in kwargs["metrics"]:
                self._images.add(f"{prefix}/noise_bins", file, state.global_step)


class VerdictCallback(TrainerCallback):
    """Warns or stops training when the error on the preferred images rises, and at the end logs the verdict and writes
    it into the output folder.

    Args:
        run ([`RunFacts`]): Facts of the run that the verdict needs.
        evaluate (`Callable`): Evaluates the current weights, called in all processes.
        interrupt ([`CheckpointOnInterrupt`]): Says whether a signal has ended the training.
        samples ([`SampleImagesCallback`], *optional*): Callback that generates sample images before and after training.
        on_rise (`str`): The setting `on_winner_rise`: `"ignore"`, `"warn"` or `"stop"`.
    """

    def __init__(
        self,
        run: RunFacts,
        evaluate: Callable[[], Any],
        interrupt: CheckpointOnInterrupt,
        samples: SampleImagesCallback | None,
        on_rise: str = "warn",
    ):
        self._run = run
        self._evaluate = evaluate
        self._interrupt = interrupt
        self._samples = samples
        self._on_rise = on_rise
        self._training = False
        self._stops = False
        self._rise = 0  # last evaluation: 0 for no rise, 1 for "worse", 2 for "ruined"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._training = True
        self._stops = False
        self._rise = 0
        if state.is_world_process_zero:  # the verdict on earlier weights must not be published with the new weights
            (output_folder(args) / VERDICT_FILE).unlink(missing_ok=True)
            forget_recommended_scales(output_folder(args))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if args.eval_strategy != "no" or self._on_rise == "ignore" or self._rise or not state.is_world_process_zero:
            return
        sentence = ruined_in_training(state.log_history, self._run, LOGS_TO_WARN)
        if sentence:
            self._rise = 1  # warn once
            logger.warning("The model is being ruined. %s %s", sentence, ADVICE["ruined"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._on_rise == "ignore" or not self._training or state.global_step >= state.max_steps:
            return  # after the last step, the verdict reports a rise
        rise = rise_at(state.log_history, self._run, state.global_step)
        stops = self._on_rise == "stop" and in_any_process(rise is not None, args.device)
        if stops:  # all processes stop
            self._stops = True
            control.should_save = True
            control.should_training_stop = True
        before = self._rise
        self._rise = 0 if rise is None else 1 + RISES.index(rise.winners)
        if rise is not None and (self._rise > before or stops) and state.is_world_process_zero:
            hint = resume_hint(args, state.global_step, "Pass `resume_from_checkpoint=True` to continue.")
            logger.warning("%s%s", words_of_rise(rise, self._run), f" Training stops. {hint}" if stops else "")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._stops = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._stops:  # `save_strategy="best"` has cancelled the checkpoint
            control.should_save = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._training = False
        step = final_step(args, state)
        if args.eval_strategy != "no":
            unmeasured = step is None and self._is_unmeasured(args, state)
            if in_any_process(unmeasured, args.device):
                self._evaluate()
        if not state.is_world_process_zero:
            return
        scores = None if self._samples is None else self._samples.scores
        sentence = "" if scores is None else scores.sentence(step or state.global_step)
        verdict = verdict_of(state.log_history, self._run, step, sentence)
        with warning_of_unwritten_files():
            folder = output_folder(args)
            images = [] if self._samples is None else self._samples.comparison(folder, step or state.global_step)
            facts = {} if scores is None else scores.facts(step or state.global_step)
            write_verdict(folder, verdict, images, facts)
        if not args.disable_tqdm:
            say(str(verdict))
        else:
            is_bad = verdict.word in RISES or verdict.training
            logger.log(logging.WARNING if is_bad else logging.INFO, "%s", verdict)

    def _is_unmeasured(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Return whether to evaluate at the end of training: the weights have changed since the last evaluation, and no
        signal has stopped it early."""
        asked = self._interrupt.stops or args.enable_jit_checkpoint
        if asked and state.global_step < state.max_steps:
            return False
        evaluated = (entry["step"] for entry in reversed(state.log_history) if is_evaluation(entry))
        return next(evaluated, None) != state.global_step


@contextlib.contextmanager
def warning_of_unwritten_files() -> Iterator[None]:
    """Log an error within the context as a warning: a run goes on if a report cannot be written. The code within must
    not wait for other processes."""
    try:
        yield
    except Exception as error:
        logger.warning("A report on the run could not be written: %s", error, exc_info=not isinstance(error, OSError))


class RunReportCallback(TrainerCallback):
    """Writes the trainer's state and a plot of the curves into the output folder at every save and at the end of
    training, and calls the function `end` at the end of training. If a file cannot be written, a warning is logged."""

    def __init__(self, end: Callable[[], None]):
        self._end = end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            with warning_of_unwritten_files():
                self._write(output_folder(args), state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            with warning_of_unwritten_files():
                self._write(output_folder(args), state)
                self._end()

    def _write(self, folder: Path, state: TrainerState) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if has_curves(state.log_history):
            plot_curves(state.log_history, folder / CURVES_FILE)


def plots_of(state: TrainerState) -> list[tuple[str, str]]:
    """Return the file names and titles of the plots that a run may have written into its output folder."""
    prefixes = changes_by_noise_bin(state.log_history)
    by_noise = [(noise_bin_file(prefix), f"Change of the errors by noise level, {prefix}") for prefix in prefixes]
    curves = [(CURVES_FILE, "Curves of the training")] if has_curves(state.log_history) else []
    return [*curves, *by_noise]


def run_lines(folder: Path, state: TrainerState, loading_code: str | None) -> list[str]:
    """Return the lines to print at the end of training: the folder of the files, and code that loads the weights.

    Args:
        loading_code (`str`, *optional*): Code that loads the weights from the output folder, or `None` if no weights
            are saved there.
    """
    lines = [f"Training ended at step {state.global_step} of {state.max_steps}.", f"  Files:   {folder}"]
    return lines if loading_code is None else [*lines, f"  To load the saved weights: {loading_code}"]
