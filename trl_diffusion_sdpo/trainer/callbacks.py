"""Callbacks that the settings need. (Those that report on a run are in `reporting/run_callbacks.py`.)"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..data.pairs import Pairs
from ..engines.engine_settings import by_engine
from ..engines.processes import peers
from ..models.frozen_components import FrozenComponents
from ..models.generation import call_options
from ..reporting.console import ShortLogCallback
from ..reporting.interrupts import CheckpointOnInterrupt
from ..reporting.run_callbacks import NoiseBinPlotCallback, RunReportCallback, VerdictCallback
from ..reporting.sample_images import INFERENCE_STEPS, SampleImagesCallback
from ..reporting.sample_scores import SampleScores
from ..reporting.tracked_images import TrackedImages
from ..reporting.verdict import RunFacts
from .config.checks import best_sample_metric
from .config.complete import image_size, sample_sources
from .config.diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)


def add_callbacks(
    handler: CallbackHandler,
    args: DiffusionSDPOConfig,
    train_dataset: Pairs | None,
    *,
    run_facts: RunFacts,
    interrupt: CheckpointOnInterrupt,
    images: TrackedImages,
    samples: SampleImagesCallback | None,
    begin: Callable[[], None],
    after_step: Callable[[int], None],
    evaluate: Callable[[], Any],
    end: Callable[[], None],
) -> None:
    """Add the callbacks that the settings need to `handler`, in the order in which they are called.

    They come before those of trackers (such as TensorBoard), because a tracker accepts no image after its own
    `on_train_end`. A shorter progress bar replaces transformers'.

    Args:
        interrupt ([`CheckpointOnInterrupt`]): Says whether a signal has ended the training.
        images ([`TrackedImages`]): Sends plots to trackers.
        samples ([`SampleImagesCallback`], *optional*): Generates sample images.
        begin (`Callable`): Called before the first optimizer step.
        after_step (`Callable`): Called after every optimizer step, with its number (the first is 1).
        evaluate (`Callable`): Evaluates the current weights.
        end (`Callable`): Prints at the end of training which files the run wrote, in the first process only.
    """
    callbacks: list[TrainerCallback] = [StepCallback(begin, after_step)]
    if train_dataset is not None:
        callbacks.append(DataReportCallback(train_dataset))
    if samples is not None:
        callbacks.append(samples)
    if args.eval_strategy != "no":
        callbacks.append(NoiseBinPlotCallback(images))
    callbacks.append(VerdictCallback(run_facts, evaluate, interrupt, samples, args.on_winner_rise))
    callbacks.append(RunReportCallback(end))
    handler.callbacks[1:1] = callbacks  # the first callback decides when to log, evaluate and save
    # By name, because transformers' class for notebooks can only be imported where IPython is installed.
    if type(handler.callbacks[-1]).__name__ in ("ProgressCallback", "NotebookProgressCallback"):
        handler.callbacks[-1] = ShortLogCallback()


def load_sample_scores(args: DiffusionSDPOConfig) -> SampleScores | None:
    """Load the scorers in `sample_scorers`, or return `None` without sample images to score. Call it in all
    processes."""
    if not args.sample_scorers or not args.sample_prompts:
        return None
    return SampleScores(args.sample_scorers, args.sample_prompts, args.device, peers(args))


def make_sample_images(
    args: DiffusionSDPOConfig,
    frozen: FrozenComponents,
    images: TrackedImages,
    scores: SampleScores | None,
    log: Callable[[dict[str, float]], None],
) -> SampleImagesCallback | None:
    """Return the callback that generates sample images, or `None` without `sample_prompts`."""
    if not args.sample_prompts:
        return None
    family = frozen.family
    return SampleImagesCallback(
        family.pipeline,
        args.sample_prompts,
        every_n_steps=args.sample_steps,
        sources=sample_sources(args, family),
        call_options={
            "num_inference_steps": INFERENCE_STEPS,
            **call_options(family, args.sample_kwargs),
            **family.size_kwargs(*image_size(args)),
        },
        seed=args.seed,
        denoiser_name=family.denoiser_name,
        every_process=by_engine(args),
        frozen=frozen,
        images=images,
        scores=scores,
        log=log,
        at_evaluations=best_sample_metric(args) is not None,
    )


class StepCallback(TrainerCallback):
    """Calls one function before the first optimizer step, and another after every step, with its number (the first is
    1)."""

    def __init__(self, begin: Callable[[], None], after_step: Callable[[int], None]):
        self._begin = begin
        self._after_step = after_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._after_step(state.global_step)


class DataReportCallback(TrainerCallback):
    """Logs the data report again at the end if training skipped pairs with unreadable images."""

    def __init__(self, pairs: Pairs):
        self._pairs = pairs
        self._dropped = pairs.report.dropped

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._pairs.gather_undecodable(peers(args))
        report = self._pairs.report
        if report.dropped > self._dropped and state.is_world_process_zero:
            logger.warning("Training skipped pairs with unreadable images. %s", report)
