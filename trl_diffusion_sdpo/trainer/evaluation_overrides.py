"""The overrides of transformers' Trainer that concern an evaluation, and the verdict that comes of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..data.pairs import PreferenceIterableDataset
from ..engines.engine import Engine
from ..engines.processes import in_any_process
from ..models.ema import EMA_FOLDER, EMAWeights
from ..models.reference import Reference
from ..reporting.tracked_images import TrackedImages
from ..reporting.verdict import RunFacts, is_evaluation, rise_in_training, rise_of, verdict_of, words_of_rise
from ..reporting.verdict_report import SamplePair, write_verdict
from ..saving.interrupts import resume_hint, was_interrupted
from ..saving.run_card import is_note
from ..saving.setup import forget_recommended_scales
from ..step.noisy_batch import seeds_of_levels
from ..step.pair_evaluation import PairEvaluation, draws_of_noise, real_pairs
from ..step.pair_forward import PairForward
from ..utils.files import VERDICT_FILE, VERDICT_PLOT
from .diffusion_sdpo_config import DiffusionSDPOConfig
from .sample_images import SampleImagesCallback, final_step

logger = logging.getLogger(__name__)


class EvaluationOverrides(Trainer):
    """Overrides of [`~transformers.Trainer`] that concern an evaluation."""

    engine: Engine
    average: EMAWeights | None
    reference: Reference
    pair_forward: PairForward
    _evaluation: PairEvaluation
    _evaluated_weights: EMAWeights | None
    _counted: torch.Tensor
    gather_function: Any
    _engine_ready: bool

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            pairs = len(inputs["seeds"])
            seeds = seeds_of_levels(inputs["seeds"], self._evaluation.draws)
            draws = [
                self.pair_forward.predict_pairs(
                    model, {**inputs, "seeds": seeds[start : start + pairs]}, self._evaluated_weights
                )
                for start in range(0, len(seeds), pairs)
            ]
            real = inputs.get("counted", real_pairs(self.accelerator.gradient_state, pairs, self.args.process_index))
            outputs = self._evaluation.add(draws, real)
        loss = torch.stack([output.loss.detach() for output in outputs]).mean()
        self._counted = torch.arange(pairs, device=loss.device) < real
        if prediction_loss_only:
            return loss, None, None
        rewards = torch.stack([output.pair_rewards for output in outputs]).mean(0)
        return loss, rewards, torch.zeros(len(rewards), device=rewards.device)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.engine.holds_shards and not self._engine_ready:
            raise ValueError(
                "Under DeepSpeed and FSDP, evaluation runs in the engine that training sets up. Set "
                "`eval_on_start=True`, call it after `train()`, or evaluate in a trainer without them."
            )
        settings = (description, prediction_loss_only, ignore_keys)
        output = self._measured_loop(dataloader, *settings, metric_key_prefix)
        if self.average is not None:
            self._evaluated_weights = self.average
            try:
                averaged = self._measured_loop(dataloader, *settings, f"{metric_key_prefix}_{EMA_FOLDER}")
            finally:
                self._evaluated_weights = None
            output.metrics.update(averaged.metrics)
        return output

    def _measured_loop(self, dataloader: DataLoader, *settings: Any) -> EvalLoopOutput:
        """One pass over the data, with the metrics of its pairs."""
        self._evaluation.drain(self.accelerator)
        draws = 1 if self.reference.is_precomputed else draws_of_noise(dataloader.dataset)
        self._evaluation.begin(
            dataloader.dataset, settings[-1], before_training=self.state.global_step == 0, draws=draws
        )
        if _tells_what_counts(dataloader.dataset):
            self.gather_function = self._gather_counted  # transformers resets it after the pass
        output = super().evaluation_loop(dataloader, *settings)
        measured = self._evaluation.drain(self.accelerator)
        output.metrics.update({f"{settings[-1]}_{name}": value for name, value in measured.items()})
        return output

    def _gather_counted(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the pairs of all processes' batches, without those that fill up the last batch of a size or of a
        stream, which accelerate takes for further pairs of the data."""
        gathered, counted = self.accelerator.gather(values), self.accelerator.gather(self._counted.float())
        return gathered[counted > 0] if len(gathered) == len(counted) else gathered


class VerdictCallback(TrainerCallback):
    """Warns, or stops, when the preferred images get worse while training; at the end it logs the verdict and writes it
    into the output folder.

    Args:
        run ([`RunFacts`]): Facts of the run.
        evaluate (`Callable`): Evaluates the current weights; called by all processes.
        callbacks (`Callable`): Returns the trainer's callbacks, which tell whether a signal has ended the training.
        samples ([`SampleImagesCallback`], *optional*): Generates the images of before and after.
        images ([`TrackedImages`]): Receives the picture.
    """

    def __init__(
        self,
        run: RunFacts,
        evaluate: Callable[[], Any],
        callbacks: Callable[[], Sequence[TrainerCallback]],
        samples: SampleImagesCallback | None,
        images: TrackedImages,
    ):
        self._run, self._evaluate, self._samples, self._tracked = run, evaluate, samples, images
        self._callbacks = callbacks
        self._training = self._stops = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._training, self._stops = True, False
        if state.is_world_process_zero:  # of an earlier end: later weights would be published with it
            for name in (VERDICT_FILE, VERDICT_PLOT):
                (Path(args.output_dir) / name).unlink(missing_ok=True)
            forget_recommended_scales(Path(args.output_dir))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if args.eval_strategy != "no" or _on_winner_rise(args) == "ignore" or not state.is_world_process_zero:
            return
        measured = rise_in_training(state.log_history, self._run)
        if measured is not None:
            logger.warning("%s", words_of_rise(measured, self._run))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        action = _on_winner_rise(args)
        if action == "ignore" or not self._training or state.global_step >= state.max_steps:
            return  # at the end, the verdict says it
        rise = rise_of(state.log_history, self._run)
        stops = action == "stop" and in_any_process(rise is not None, args.device)
        if stops:  # every process
            self._stops = control.should_save = control.should_training_stop = True
        if rise is not None and (rise[1] or stops) and state.is_world_process_zero:
            hint = resume_hint(args, state.global_step, "Pass `resume_from_checkpoint=True` to go on.")
            end = f" Training stops; {hint}" if stops else ""
            logger.warning("%s%s", words_of_rise(rise[0], self._run), end)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._stops = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._stops:  # `save_strategy="best"` has taken the save back
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
        verdict = verdict_of(state.log_history, self._run, step)
        with warning_of_unwritten_files():
            images = self._images(args, step or state.global_step)
            picture = write_verdict(Path(args.output_dir), verdict, self._run, images)
            if picture is not None:
                self._tracked.add("verdict", picture, state.global_step)
        if verdict is not None:
            logger.log(logging.INFO if verdict.label in ("better", "unchanged") else logging.WARNING, "%s", verdict)

    def _is_unmeasured(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether the weights have changed since the last evaluation, and no signal asks for an early end."""
        asked = was_interrupted(self._callbacks()) or args.enable_jit_checkpoint
        if asked and state.global_step < state.max_steps:
            return False
        evaluated = (entry["step"] for entry in reversed(state.log_history) if is_evaluation(entry))
        return next(evaluated, None) != state.global_step

    def _images(self, args: TrainingArguments, step: int) -> list[SamplePair]:
        """The images of before training and of a step, where both are there."""
        if self._samples is None or step == 0:
            return []
        galleries = zip(self._samples.gallery(0), self._samples.gallery(step), strict=True)
        pairs = [
            SamplePair(prompt, self._samples.seed + i, before, after)
            for i, ((before, prompt), (after, _)) in enumerate(galleries)
        ]
        folder = Path(args.output_dir)
        return [
            pair
            for pair in pairs
            if all(is_note(folder / path, pair.prompt, pair.seed) for path in (pair.before, pair.after))
        ]


@contextlib.contextmanager
def warning_of_unwritten_files() -> Iterator[None]:
    """Turn an error of writing a report within the context into a warning, since the weights matter more. No process
    may wait for another one within."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError)
        logger.warning("The report of the run could not be written: %s", error, exc_info=not known)


def _tells_what_counts(dataset: Any) -> bool:
    """Whether batches tell which of their pairs fill them up, so that accelerate cannot know it."""
    return isinstance(dataset, PreferenceIterableDataset) or getattr(dataset, "sizes", None) is not None


def _on_winner_rise(args: TrainingArguments) -> str:
    return cast(DiffusionSDPOConfig, args).on_winner_rise
