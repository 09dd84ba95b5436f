"""Evaluation on pairs at fixed noise and timesteps: the metrics of training, and rewards for `compute_metrics`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..losses import PreferenceLossOutput
from ..models.ema import EMA_FOLDER
from ..step.noisy_batch import NoisyBatch


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
            batch, model_pred, ref_pred = self._predict_pairs(model, inputs)
            outputs = self._loss_of(model_pred, batch, ref_pred, inputs.get("scores"))
            measured = outputs
            if 0 < real < pairs:
                first = torch.arange(real, device=model_pred.device)
                measured = self._loss_of_rows(torch.cat([first, first + pairs]), batch, model_pred, ref_pred, inputs)
        # Also where no pair of this process is real: the processes' sums are added up, and all must have the names.
        self._meter["eval"].add({**self._shown(measured.metrics), "loss": measured.loss}, real)
        if ref_pred is not None:
            levels = batch.levels[: len(measured.pair_errors)]
            self._noise_bin_meter.add(levels, measured.pair_errors, counts=real > 0)
        loss = outputs.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        rewards = outputs.pair_rewards
        return loss, rewards, torch.zeros(len(rewards), device=rewards.device)

    def _loss_of_rows(
        self,
        rows: torch.Tensor,
        batch: NoisyBatch,
        model_pred: torch.Tensor,
        ref_pred: torch.Tensor | None,
        inputs: dict[str, Any],
    ) -> PreferenceLossOutput:
        """The loss of some of a batch's pairs, from predictions that are there: a forward pass would take all
        processes."""
        scores = inputs.get("scores")
        ref_pred, scores = (None if tensor is None else tensor[rows] for tensor in (ref_pred, scores))
        return self._loss_of(model_pred[rows], batch.take(rows), ref_pred, scores)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self._holds_parts() and not self._engine_ready:
            raise ValueError(
                "Under DeepSpeed and FSDP, evaluation runs in the engine that training sets up. Set "
                "`eval_on_start=True`, call it after `train()`, or evaluate in a trainer without them."
            )
        settings = (description, prediction_loss_only, ignore_keys)
        output = self._measured_loop(dataloader, *settings, metric_key_prefix)
        if self.average is not None:
            self._acting = self.average.active
            try:
                averaged = self._measured_loop(dataloader, *settings, f"{metric_key_prefix}_{EMA_FOLDER}")
            finally:
                self._acting = contextlib.nullcontext
            output.metrics.update(averaged.metrics)
        return output

    def _measured_loop(self, dataloader: DataLoader, *settings: Any) -> EvalLoopOutput:
        """One pass over the data, with what the meters have seen in it."""
        for meter in (self._meter["eval"], self._noise_bin_meter):
            meter.drain(self.accelerator)
        output = super().evaluation_loop(dataloader, *settings)
        measured = {**self._meter["eval"].drain(self.accelerator), **self._noise_bin_meter.drain(self.accelerator)}
        output.metrics.update({f"{settings[-1]}_{name}": value for name, value in measured.items()})
        return output

    def _real_pairs(self, pairs: int) -> int:
        """How many of a batch's pairs are not repetitions that fill up the last batch of several processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return pairs
        return max(0, min(pairs, state.remainder - self.args.process_index * pairs))
