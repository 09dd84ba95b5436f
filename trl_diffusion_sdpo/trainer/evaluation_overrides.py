"""The overrides of transformers' Trainer that concern an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..data.pairs import PreferenceDataset
from ..engines.engine import Engine
from ..models.ema import EMA_FOLDER, EMAWeights
from ..step.pair_evaluation import PairEvaluation, real_pairs
from ..step.pair_forward import PairForward


class EvaluationOverrides(Trainer):
    """Overrides of [`~transformers.Trainer`] that concern an evaluation."""

    engine: Engine
    average: EMAWeights | None
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
            predictions = self.pair_forward.predict_pairs(model, inputs, self._evaluated_weights)
            state, pairs = self.accelerator.gradient_state, len(inputs["seeds"])
            real = inputs.get("counted", real_pairs(state, pairs, self.args.process_index))
            outputs = self._evaluation.add(predictions, real)
        loss = outputs.loss.detach()
        self._counted = torch.arange(pairs, device=loss.device) < real
        if prediction_loss_only:
            return loss, None, None
        rewards = outputs.pair_rewards
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
        if isinstance(dataloader.dataset, PreferenceDataset) and dataloader.dataset.sizes is not None:
            self.gather_function = self._gather_counted  # transformers resets it after the pass
        output = super().evaluation_loop(dataloader, *settings)
        measured = self._evaluation.drain(self.accelerator)
        output.metrics.update({f"{settings[-1]}_{name}": value for name, value in measured.items()})
        return output

    def _gather_counted(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the pairs of all processes' batches, without those that fill up the last batch of a size, which
        accelerate takes for further pairs of the data."""
        gathered, counted = self.accelerator.gather(values), self.accelerator.gather(self._counted.float())
        return gathered[counted > 0] if len(gathered) == len(counted) else gathered
