"""Training with the parameter-space safeguard: a step in which winners and losers are back-propagated apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..engines.adamw_preconditioner import AdamWPreconditioner, plain_optimizer
from ..engines.gradient_backends import gradient_backend
from ..engines.gradients import Gradient, inner_products
from ..engines.sharding import local, whole
from ..losses import PreferenceLossOutput, order_by_scores, winner_error_gradient
from ..trainer.config_checks import refuse_dropout
from .branch_gradients import ANCHOR, LOSER, WINNER, BranchBackward
from .noisy_batch import NoisyBatch

# Measured on the joint prediction; with the parameter-space safeguard these names mean its own lambda.
OUTPUT_SPACE = ("safeguard/scale", "safeguard/active", "safeguard/cosine")


@dataclass
class StepDiagnostics:
    """What a diagnostic step remembers until the weights have moved.

    Args:
        winners (`list[NoisyBatch]`): Those of each micro-batch.
        errors (`list[torch.Tensor]`): Their mean errors before the step, `()` each.
        weights (`list[torch.Tensor]`): The trained weights, or this process's shards, before the step.
        gradient (`list[torch.Tensor]`): The mean winner error's, over the whole batch of the step.
        finite (`torch.Tensor` of shape `()`): Whether the step's gradients were; a step that was left out says nothing.
        loss_scale (`float`): By which `gradient` is multiplied.
    """

    winners: list[NoisyBatch] = field(default_factory=list)
    errors: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    gradient: Gradient = field(default_factory=list)
    finite: torch.Tensor | None = None
    loss_scale: float = 1.0


class BranchTrainingMixin:
    """The overrides of [`~transformers.Trainer`] with which a step has two branches."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self._branches is not None:
            return self._branch_step(model, inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite.verify(self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        norm = whole(super()._get_grad_norm(model, grad_norm))
        # With fp16 an overflow is usual, and the scaler skips that step by itself.
        if norm is not None and not self.args.fp16:
            self._finite.watch_gradient(torch.as_tensor(norm), self.state.global_step + 1)
        return norm

    def _set_up_branches(self, model: nn.Module) -> None:
        """Once the engine has taken the model."""
        self._branches, self._probe = None, None
        if self.args.safeguard != "parameter":
            return
        engine = gradient_backend(model, self.accelerator)
        anchor = self.args.safeguard_anchor or self.loss_spec.anchor
        if anchor == "error" and not engine.retains_graph:
            refuse_dropout(self.denoiser, "The anchor 'error' under ZeRO-3")
        adamw = None
        if self.args.safeguard_preconditioner == "adamw":
            adamw = AdamWPreconditioner(plain_optimizer(self.optimizer), self.args.max_grad_norm)
        self._branches = BranchBackward(engine, mu=self.args.safeguard_mu, anchor=anchor, adamw=adamw)

    def _shown(self, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch's metrics without names that are another safeguard's."""
        if self.args.safeguard != "parameter":
            return metrics
        return {name: value for name, value in metrics.items() if name not in OUTPUT_SPACE}

    def _branch_step(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """One micro-batch; after the last of an optimizer step, the safeguard hook."""
        model.train()
        self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        probing = self._probes(self.state.global_step + 1)
        if probing and self._probe is None:
            self._probe = StepDiagnostics()
        with self.compute_loss_context_manager(), self._branches.engine.accumulating():
            outputs = self._backward_by_branch(model, inputs, probing)
        self._meter["train"].add(self._shown(outputs.metrics), len(inputs["seeds"]))
        self._finite.verify(self.state.global_step + 1)
        if self.accelerator.sync_gradients:
            self._combine_branches()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return outputs.loss.detach() / self.current_gradient_accumulation_steps

    def _combine_branches(self) -> None:
        engine = self._branches.engine
        metrics, finite, anchor = self._branches.combine()
        self._meter["train"].add(metrics, finite)
        self._meter["train"].add({"safeguard/skipped": 1 - finite.float()}, 1)
        if self._probe is not None:
            self._probe.gradient, self._probe.finite = anchor, finite
            self._probe.loss_scale = engine.loss_scale  # the scaler's next step may change it
            self._probe.weights = [weight.clone() for weight in engine.weights()]
        engine.step()

    def _backward_by_branch(self, model: nn.Module, inputs: dict[str, Any], probing: bool) -> PreferenceLossOutput:
        """A backward pass for each branch, from the gradients of the loss at the two predictions."""
        batch, scores = self._noisy_batch(inputs), inputs.get("scores")
        if self.loss_spec.needs_scores:
            order = order_by_scores(scores)
            batch, scores = batch.take(order), scores[order]
        winners, losers = batch.halves()
        with torch.no_grad(), self.reference.active(model) as reference:
            ref_pred = [self._predict(reference, half) for half in (winners, losers)]
        low_memory = self.args.safeguard_low_memory
        with torch.set_grad_enabled(not low_memory):
            loser_pred = self._predict(model, losers)
        winner_pred = self._predict(model, winners)
        # The graph is cut here: what follows is a tiny one, from the predictions to the loss.
        prediction = torch.cat([winner_pred.detach(), loser_pred.detach()]).requires_grad_()
        ref_pred = None if ref_pred[0] is None else torch.cat(ref_pred)
        outputs = self._loss_of(prediction, batch, ref_pred, scores, safeguard="none")
        # On its way while the backward passes are queued.
        self._finite.watch(outputs.pair_losses, inputs["rows"], last=self.accelerator.sync_gradients)
        grad_winner, grad_loser = torch.autograd.grad(outputs.loss, prediction)[0].chunk(2)
        if probing:
            self._remember(prediction.detach(), batch, winners, ref_pred, scores)
        branches, share = self._branches, 1 / self.current_gradient_accumulation_steps
        # In this order the winners' graph is gone before the losers' is walked, or even made.
        anchored = branches.anchor == "error" or probing
        retained = anchored and branches.engine.retains_graph
        branches.backward(WINNER, share * (winner_pred * grad_winner).sum(), retain_graph=retained)
        if anchored:
            winner_pred = winner_pred if retained else self._predict(model, winners)
            grad_anchor = winner_error_gradient(winner_pred - winners.target.float())
            branches.backward(ANCHOR, share * (winner_pred * grad_anchor).sum())
        del winner_pred
        if low_memory:
            loser_pred = self._predict(model, losers)
        branches.backward(LOSER, -share * (loser_pred * grad_loser).sum())
        return outputs

    # ---- Diagnostics ----------------------------------------------------------------------------------------------

    def _probes(self, step: int) -> bool:
        every = self.args.safeguard_diagnostics_steps
        return every is not None and step % every == 0

    def _remember(
        self,
        prediction: torch.Tensor,
        batch: NoisyBatch,
        winners: NoisyBatch,
        ref_pred: torch.Tensor | None,
        scores: torch.Tensor | None,
    ) -> None:
        """A micro-batch's winners and their error, and what output space would have made of it."""
        self._probe.winners.append(winners)
        self._probe.errors.append(_mean_error(prediction.chunk(2)[0], winners))
        output = self._loss_of(prediction, batch, ref_pred, scores, safeguard="output").metrics
        shown = {
            "safeguard/output_scale": output["safeguard/scale"],
            "safeguard/output_cosine": output["safeguard/cosine"],
        }
        self._meter["train"].add(shown, len(winners.noisy))

    @torch.no_grad()
    def measure_step(self) -> None:
        """After the weights have moved in a diagnostic step: what that did to the winners' error, and what the error's
        gradient made of the same move."""
        probe, self._probe = self._probe, None
        if probe is None:
            return
        engine = self._branches.engine
        model = self.model_wrapped
        for winners, before in zip(probe.winners, probe.errors, strict=True):
            realised = _mean_error(self._predict(model, winners), winners) - before
            weight = len(winners.noisy) * probe.finite
            self._meter["train"].add({"safeguard/realised_winner_change": realised}, weight)
        moves = [now - before for now, before in zip(engine.weights(), probe.weights, strict=True)]
        taken = [None if part is None else local(part) for part in probe.gradient]
        predicted = engine.total(inner_products([_fitting(taken, moves), moves]))[0, 1] / probe.loss_scale
        predicted = torch.where(probe.finite, predicted, 0)
        self._meter["train"].add({"safeguard/predicted_winner_change": predicted}, probe.finite)


class MeasureStepCallback(TrainerCallback):
    """Has diagnostic steps measured once the optimizer has moved the weights, whoever called it.

    Args:
        trainer ([`BranchTrainingMixin`]): Its `measure_step` is called.
    """

    def __init__(self, trainer: BranchTrainingMixin):
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._trainer.measure_step()


def _mean_error(prediction: torch.Tensor, winners: NoisyBatch) -> torch.Tensor:
    return (prediction - winners.target.float()).square().mean()


def _fitting(gradient: Gradient, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """A gradient in float32 and in the shapes of the weights; zeros for weights that took no part."""
    return [
        torch.zeros_like(move) if part is None else part.float().reshape(move.shape)
        for part, move in zip(gradient, like, strict=True)
    ]
