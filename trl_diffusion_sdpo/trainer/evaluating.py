"""Evaluation on pairs at fixed noise and timesteps: the metrics of training, and rewards for `compute_metrics`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from .preparing import first_pairs


class EvaluationMixin:
    """Overrides of [`~transformers.Trainer`] that concern evaluation."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        pairs = len(inputs["seeds"])
        real = self._real_pairs(pairs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            measured = outputs
            if 0 < real < pairs:
                measured = self.compute_loss(model, first_pairs(inputs, real), return_outputs=True)[1]
        if real:
            self._meter["eval"].add({**self._shown(measured.metrics), "loss": measured.loss}, real)
        if prediction_loss_only:
            return loss.detach(), None, None
        rewards = outputs.pair_rewards
        return loss.detach(), rewards, torch.zeros(len(rewards), device=rewards.device)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._meter["eval"].drain(self.accelerator)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        measured = self._meter["eval"].drain(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def _real_pairs(self, pairs: int) -> int:
        """How many of a batch's pairs are not repetitions that fill up the last batch of several processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return pairs
        return max(0, min(pairs, state.remainder - self.args.process_index * pairs))
