"""Adds the callbacks that the settings need, and defines the callbacks that act on training: they update the reference,
beta, the averaged weights and the winner budget. (Callbacks that report on a run are in `reporting/run_callbacks.py`.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ProgressCallback

from ..data.dataset import PreferenceDataset
from ..data.streaming import PreferenceIterableDataset
from ..engines.engine_settings import by_engine
from ..engines.processes import peers
from ..models.frozen_components import FrozenComponents
from ..models.reference import Reference
from ..reporting.console import ShortLogCallback
from ..reporting.run_callbacks import NoiseBinPlotCallback, RunReportCallback, VerdictCallback
from ..reporting.sample_images import INFERENCE_STEPS, SampleImagesCallback, call_options
from ..reporting.sample_scores import SampleScores
from ..reporting.tracked_images import TrackedImages
from ..reporting.verdict import RunFacts
from ..step.winner_budget import ProbeInputs, ProbeSettings, WinnerBudget
from .components import Components
from .config.checks import best_sample_metric
from .config.complete import image_size, sample_sources
from .data_preparation import PREPARED
from .diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)


def add_callbacks(
    handler: CallbackHandler,
    args: DiffusionSDPOConfig,
    components: Components,
    train_dataset: Dataset | IterableDataset | None,
    *,
    run_facts: RunFacts,
    sample_scores: SampleScores | None,
    load_probe: Callable[[], Sequence[ProbeInputs]],
    policy: Callable[[], nn.Module],
    evaluate: Callable[[], Any],
    log: Callable[[dict[str, float]], None],
    end: Callable[[], None],
) -> None:
    """Add the callbacks that the settings need to `handler`, in the order in which they are called.

    The callbacks are inserted before those of trackers (such as TensorBoard), because a tracker accepts no image after
    its own `on_train_end`. The progress bar of transformers is replaced by a shorter one.

    Args:
        sample_scores ([`SampleScores`], *optional*): Object that scores the sample images.
        load_probe (`Callable`): Function that returns this process's share of the pairs on which the winner budget
            measures errors (the probe).
        policy (`Callable`): Function that returns the policy as the engine (DDP, FSDP2, DeepSpeed) wrapped it.
        evaluate (`Callable`): Function that evaluates the current weights.
        log (`Callable`): Function that logs metrics.
        end (`Callable`): Function that prints at the end of training, in the first process only, which files the run
            wrote.
    """
    images = TrackedImages(handler.callbacks)
    callbacks: list[TrainerCallback] = [NothingToTrainCallback()]
    if isinstance(train_dataset, PreferenceDataset):
        callbacks.append(EpochCallback(train_dataset))
    if isinstance(train_dataset, PREPARED):
        callbacks.append(DataReportCallback(train_dataset))
    if components.average is not None:
        callbacks.append(AfterStepCallback(components.average.after_step))
    if components.winner_budget is not None:
        probe = ProbeSettings(**args.winner_budget_kwargs)
        callbacks.append(WinnerBudgetCallback(components.winner_budget, probe.steps, load_probe, policy))
    if components.auto_beta is not None:
        callbacks.append(AfterStepCallback(components.auto_beta.after_step))
    if args.sync_ref_model:
        callbacks.append(
            SyncReferenceCallback(components.reference, args.ref_model_mixup_alpha, args.ref_model_sync_steps)
        )
    samples = _sample_images(args, components.frozen, images, sample_scores, log) if args.sample_prompts else None
    if samples is not None:
        callbacks.append(samples)
    if args.eval_strategy != "no":
        callbacks.append(NoiseBinPlotCallback(images, args.num_noise_bins))
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


class EpochCallback(TrainerCallback):
    """Calls `set_epoch` of a data set at the beginning of each epoch, counted from 0.

    In a resumed run, the first epoch number is that of the checkpoint. The callback counts the following epochs itself,
    because `state.epoch` of the Trainer is too low for data without a length.
    """

    def __init__(self, dataset: PreferenceDataset):
        self.dataset = dataset
        self._next: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._next = None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        epoch = int(state.epoch or 0) if self._next is None else self._next
        self.dataset.set_epoch(epoch)
        self._next = epoch + 1


class SyncReferenceCallback(TrainerCallback):
    """Updates the reference every `steps` optimizer steps: `ref = alpha * policy + (1 - alpha) * ref`.

    Source: the soft update of TR-DPO, https://huggingface.co/papers/2404.09656.
    """

    def __init__(self, reference: Reference, alpha: float, steps: int):
        self.reference, self.alpha, self.steps = reference, alpha, steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step % self.steps == 0:
            self.reference.update(self.alpha)


class AfterStepCallback(TrainerCallback):
    """Calls a function with the step's number, counted from 1, after every optimizer step."""

    def __init__(self, function: Callable[[int], None]):
        self._function = function

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._function(state.global_step)


class WinnerBudgetCallback(TrainerCallback):
    """Measures the winners' errors for `winner_budget` before the first step and then after every `every` steps, and
    adapts the losers' gradients.

    Args:
        every (`int`): Optimizer steps between two measurements.
        load_pairs (`Callable`): Function that returns this process's share of the pairs on which errors are measured
            (the probe).
        policy (`Callable`): Function that returns the policy as the engine (DDP, FSDP2, DeepSpeed) wrapped it.
    """

    def __init__(
        self,
        budget: WinnerBudget,
        every: int,
        load_pairs: Callable[[], Sequence[ProbeInputs]],
        policy: Callable[[], nn.Module],
    ):
        self._budget = budget
        self._every = every
        self._load_pairs = load_pairs
        self._policy = policy

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._every > state.max_steps:
            logger.warning(
                "`winner_budget` measures every %s steps, but the run has only %s steps. Nothing will be measured. "
                "Lower `steps` of `winner_budget_kwargs`.",
                self._every,
                state.max_steps,
            )
        self._budget.begin(self._policy(), self._load_pairs())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._budget.end()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step % self._every == 0:
            self._budget.update(self._policy())


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


class NothingToTrainCallback(TrainerCallback):
    """Warns at the start of a resumed run if the checkpoint is already at or after the run's last step."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if 0 < state.max_steps <= state.global_step and state.is_world_process_zero:
            logger.warning(
                "Training is complete. The checkpoint is from step %s, and the run ends at step %s. Increase "
                "`max_steps` or `num_train_epochs` to continue.",
                *(state.global_step, state.max_steps),
            )
