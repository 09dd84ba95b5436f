"""The overrides of transformers' Trainer that concern an evaluation, and the verdict that comes of them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..data.pairs import PreferenceIterableDataset
from ..engines.engine import Engine
from ..models.ema import EMA_FOLDER, EMAWeights
from ..models.reference import Reference
from ..step.noisy_batch import seeds_of_draws
from ..step.pair_evaluation import PairEvaluation, draws_of_noise, real_pairs
from ..step.pair_forward import PairForward

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
            seeds = seeds_of_draws(inputs["seeds"], self._evaluation.draws)
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


def _tells_what_counts(dataset: Any) -> bool:
    """Whether batches tell which of their pairs fill them up, so that accelerate cannot know it."""
    return isinstance(dataset, PreferenceIterableDataset) or getattr(dataset, "sizes", None) is not None
