"""Adds the callbacks that the settings need. (Callbacks that report on a run are in `reporting/run_callbacks.py`.)"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ProgressCallback

from ..data.dataset import PreferenceDataset
from ..data.streaming import PreferenceIterableDataset
from ..engines.engine_settings import by_engine
from ..engines.processes import peers
from ..models.frozen_components import FrozenComponents
from ..reporting.console import ShortLogCallback
from ..reporting.run_callbacks import NoiseBinPlotCallback, RunReportCallback, VerdictCallback
from ..reporting.sample_images import INFERENCE_STEPS, SampleImagesCallback, call_options
from ..reporting.sample_scores import SampleScores
from ..reporting.tracked_images import TrackedImages
from ..reporting.verdict import RunFacts
from .config.checks import best_sample_metric
from .config.complete import image_size, sample_sources
from .config.diffusion_sdpo_config import DiffusionSDPOConfig
from .data_preparation import PREPARED

logger = logging.getLogger(__name__)


def add_callbacks(
    handler: CallbackHandler,
    args: DiffusionSDPOConfig,
    frozen: FrozenComponents,
    train_dataset: Dataset | IterableDataset | None,
    *,
    run_facts: RunFacts,
    sample_scores: SampleScores | None,
    begin: Callable[[], None],
    after_step: Callable[[int], None],
    evaluate: Callable[[], Any],
    log: Callable[[dict[str, float]], None],
    end: Callable[[], None],
) -> None:
    """Add the callbacks that the settings need to `handler`, in the order in which they are called.

    The callbacks are inserted before those of trackers (such as TensorBoard), because a tracker accepts no image after
    its own `on_train_end`. The progress bar of transformers is replaced by a shorter one.

    Args:
        begin (`Callable`): Function to call before the first optimizer step.
        after_step (`Callable`): Function to call after every optimizer step, with the step's number (the first step is
            1).
        end (`Callable`): Function that prints at the end of training, in the first process only, which files the run
            wrote.
    """
    images = TrackedImages(handler.callbacks)
    callbacks: list[TrainerCallback] = [StepCallback(begin, after_step)]
    if isinstance(train_dataset, PREPARED):
        callbacks.append(DataReportCallback(train_dataset))
    samples = _sample_images(args, frozen, images, sample_scores, log) if args.sample_prompts else None
    if samples is not None:
        callbacks.append(samples)
    if args.eval_strategy != "no":
        callbacks.append(NoiseBinPlotCallback(images))
    callbacks.append(VerdictCallback(run_facts, evaluate, handler.callbacks, samples, args.on_winner_rise))
    callbacks.append(RunReportCallback(end))
    handler.callbacks[1:1] = callbacks  # the first callback decides when to log, evaluate and save
    if type(handler.callbacks[-1]) is ProgressCallback:
        handler.callbacks[-1] = ShortLogCallback()


def load_sample_scores(args: DiffusionSDPOConfig) -> SampleScores | None:
    """Load the scorers in `sample_scorers`. Return `None` if there are no sample images to score. All processes must
    call this function."""
    if not args.sample_scorers or not args.sample_prompts:
        return None
    return SampleScores(args.sample_scorers, args.sample_prompts, args.device, peers(args))


def _sample_images(
    args: DiffusionSDPOConfig,
    frozen: FrozenComponents,
    images: TrackedImages,
    scores: SampleScores | None,
    log: Callable[[dict[str, float]], None],
) -> SampleImagesCallback:
    family = frozen.family
    return SampleImagesCallback(
        family.pipeline,
        args.sample_prompts or [],
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
    """Calls one function before the first optimizer step, and another function after every optimizer step, with the
    step's number (the first step is 1)."""

    def __init__(self, begin: Callable[[], None], after_step: Callable[[int], None]):
        self._begin = begin
        self._after_step = after_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._after_step(state.global_step)


class DataReportCallback(TrainerCallback):
    """Logs the data report again at the end of training if training skipped pairs with unreadable images."""

    def __init__(self, dataset: PreferenceDataset | PreferenceIterableDataset):
        self._dataset = dataset
        self._before = int(dataset.undecodable.sum()) if isinstance(dataset, PreferenceDataset) else 0

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if isinstance(self._dataset, PreferenceDataset):
            bad = self._dataset.undecodable
            for rows in peers(args).gather(torch.nonzero(bad).flatten().tolist()):
                bad[rows] = 1
            self._dataset.mark_undecodable(bad)
            late = int(bad.sum()) - self._before
        else:
            late = self._dataset.report.dropped
        if late and state.is_world_process_zero:
            logger.warning("Training skipped pairs with unreadable images. %s", self._dataset.report)
