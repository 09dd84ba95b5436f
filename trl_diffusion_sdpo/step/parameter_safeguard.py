"""Training with `safeguard="parameter"`: separate gradients for winners and losers.

Where they can be split ([`SplitGradients`]), winners and losers share a forward and a backward pass. Elsewhere, they
have separate ones, in two half batches.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..losses import order_by_scores, output_scale, winner_error_gradient, within
from ..utils.errors import UserError
from .branch_gradients import ANCHOR, LOSER, OUTSIDE, WINNER, BranchGradients
from .meters import MetricMeter
from .pair_forward import NoisyBatch, PairForward, PairPredictions

logger = logging.getLogger(__name__)


@dataclass
class _Branch:
    """Half of a micro-batch: the winners or the losers."""

    batch: NoisyBatch
    prediction: torch.Tensor | None  # with its autograd graph; `None` if it must be predicted (again)


@dataclass(frozen=True)
class _Branches:
    """Inputs of the backward passes of a micro-batch. `predictions` has detached copies (leaves) of the predictions,
    from which the loss is computed. `whole` is the prediction for winners and losers together, if there is one."""

    model: nn.Module
    winners: _Branch
    losers: _Branch
    predictions: PairPredictions
    whole: torch.Tensor | None = None


class ParameterSafeguard:
    """Safeguard in parameter space: the separate gradients of winners and losers, which give one lambda (factor of the
    losers' gradient) per optimizer step.

    For each micro-batch, call [`~ParameterSafeguard.predict_pairs`], compute the loss of the predictions, and call
    [`~ParameterSafeguard.backward_branches`]. After the last micro-batch of an optimizer step, call
    [`~ParameterSafeguard.step`].

    Args:
        sorts_by_scores (`bool`): Whether the scores decide which image of a pair is the winner.
        low_memory (`bool`): Whether to hold the activations of winners and losers one after the other, for one more
            forward pass of the losers.
        verified (`bool`): Whether the gradients of a whole batch are known to be separable ([`SplitGradients.verify`]).
            Otherwise, the first micro-batch finds it out.
    """

    def __init__(
        self,
        forward: PairForward,
        gradients: BranchGradients,
        meter: MetricMeter,
        *,
        sorts_by_scores: bool,
        low_memory: bool,
        verified: bool = False,
    ):
        self.gradients = gradients
        self._split = None if forward.by_halves else gradients.split(forward.family.denoiser)
        forward.by_halves = self._split is None
        self._verified = verified
        self._forward = forward
        self._meter = meter
        self._sorts_by_scores = sorts_by_scores
        self._low_memory = low_memory
        self._predicted: list[_Branches] = []  # the predicted micro-batch; removed by its backward pass

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Run the forward and backward passes of a micro-batch within this context."""
        splitting = contextlib.nullcontext() if self._split is None else self._split.active()
        with self.gradients.backend.accumulating(), splitting:
            yield

    def predict_pairs(self, model: nn.Module, inputs: dict) -> PairPredictions:
        """Return the predictions for a batch, as [`PairForward.predict_pairs`] does. Their `policy` is a detached copy
        (a leaf), at which the autograd graph of the loss ends. With `mask_anchor`, `anchored` is a second leaf, for the
        graph of the anchor."""
        batch = self._forward.noisy_batch(inputs, model)
        facts = self._forward.facts_of_pairs(inputs)
        if self._sorts_by_scores:
            scores = facts["scores"]
            errors = facts["reference_errors"]
            assert scores is not None, "The trainer has checked that the data have scores."
            order = order_by_scores(scores)
            batch = batch.take(order)
            facts["scores"] = scores[order]
            facts["reference_errors"] = None if errors is None else errors[order]
        whole = self._predict_whole(model, batch, facts)
        return self._predict_halves(model, batch, facts) if whole is None else whole

    def _predict_whole(self, model: nn.Module, batch: NoisyBatch, facts: dict[str, Any]) -> PairPredictions | None:
        """Return the predictions for winners and losers together. If their gradients cannot be split, return `None`,
        and use half batches from now on."""
        split = self._split
        if split is None:
            return None
        rows = len(batch.noisy)
        predict = partial(self._forward.predict, model, batch)
        if not self._verified:
            split.verify(predict, rows)
            self._verified = True
        if split.trouble is None:
            references = self._forward.predict_reference(model, [batch])
            reference = None if references is None else references[0]
            prediction = split.predict(predict, rows)
        if split.trouble is not None:
            logger.info(
                'With `safeguard="parameter"`, winners and losers are predicted in two half batches, which takes '
                "longer than one batch: %s.",
                split.trouble,
            )
            self._forward.by_halves = True
            self._split = None
            return None
        leaf = prediction.detach().requires_grad_()
        predictions = PairPredictions(batch, leaf, reference, **facts)
        winners, losers = (_Branch(half, None) for half in batch.halves())
        self._predicted = [_Branches(model, winners, losers, predictions, prediction)]
        return predictions

    def _predict_halves(self, model: nn.Module, batch: NoisyBatch, facts: dict[str, Any]) -> PairPredictions:
        """Return the predictions for winners and for losers, one after the other."""
        winners, losers = batch.halves()
        references = self._forward.predict_reference(model, [winners, losers])
        with torch.set_grad_enabled(not self._low_memory):
            loser_pred = self._forward.predict(model, losers)
        winner_pred = self._forward.predict(model, winners)
        leaf = torch.cat([winner_pred.detach(), loser_pred.detach()]).requires_grad_()
        reference = None if references is None else torch.cat(references)
        anchored = leaf.detach().requires_grad_() if self._forward.loss_settings.mask_anchor else None
        predictions = PairPredictions(batch, leaf, reference, **facts, anchored=anchored)
        losing = _Branch(losers, None if self._low_memory else loser_pred)
        self._predicted = [_Branches(model, _Branch(winners, winner_pred), losing, predictions)]
        return predictions

    def backward_branches(self, loss: torch.Tensor, *, share: float) -> None:
        """Run the backward passes of winners and losers, from the gradient of the loss at the predictions. With
        `mask_anchor`, run another pass of each half from the anchor's gradient.

        Args:
            loss (`torch.Tensor` of shape `()`): Loss of the predictions that `predict_pairs` returned last.
            share (`float`): Weight of the micro-batch in the optimizer step: 1 divided by the number of micro-batches.

        Raises:
            `ValueError`: If the loss does not depend on the predictions, or also depends on other trained tensors.
        """
        _check_depends_on_predictions_only(loss, [branches.predictions for branches in self._predicted])
        branches = self._predicted.pop()
        leaf = branches.predictions.policy
        anchored = branches.predictions.anchored
        leaves = [leaf] if anchored is None else [leaf, anchored]
        at_leaf, *outside = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        scale = self._output_scale(branches.predictions, at_leaf)
        self._meter.add({"safeguard/scale_output": scale}, len(leaf) // 2)
        grad_winner, grad_loser = at_leaf.chunk(2)
        if branches.whole is not None:
            assert self._split is not None
            signed = torch.cat([grad_winner, -grad_loser])
            self.gradients.backward_split(share * (branches.whole * signed).sum(), self._split.leaves)
            return
        winner_grads = {WINNER: grad_winner}
        loser_grads = {LOSER: -grad_loser}
        if self.gradients.anchor == "error":
            winners = branches.winners.batch
            residual = winners.residual(leaf.detach().chunk(2)[0])
            winner_grads[ANCHOR] = within(winner_error_gradient(residual), winners.region)
        for at_anchored in outside:
            winner_grads[OUTSIDE], loser_grads[OUTSIDE] = at_anchored.chunk(2)
        # To save memory, free the winners' graph before the losers' next pass (backward, or forward with `low_memory`).
        self._backward(branches.model, branches.winners, winner_grads, share)
        self._backward(branches.model, branches.losers, loser_grads, share)

    def _output_scale(self, predictions: PairPredictions, at_leaf: torch.Tensor) -> torch.Tensor:
        """Return the lambda that `safeguard="output"` would compute for these predictions, a detached scalar. It is
        only logged. `at_leaf` `(2B, ...)` is the gradient of the loss at the predictions."""
        batch = predictions.batch
        policy = predictions.policy.detach()
        if self._forward.loss_settings.spec.uses_residuals("batch"):
            residuals = batch.residual(policy)
            gradients = None
        else:  # `at_leaf` has the factors of the masks already, so the residuals must not have them
            residuals = policy.float() - batch.target.float()
            grad_winner, grad_loser = at_leaf.chunk(2)
            gradients = (grad_winner, grad_loser)
        winners, losers = residuals.chunk(2)
        return output_scale(
            winners,
            losers,
            branch_gradients=gradients,
            mu=self.gradients.mu,
            loser_weights=self._forward.loser_weights(batch.noise_levels.chunk(2)[0]),
            pair_weights=predictions.pair_weights,
        )

    def _backward(self, model: nn.Module, branch: _Branch, grads: dict[str, torch.Tensor], share: float) -> None:
        """Run one backward pass from each gradient at the predictions of `branch`, and free their graph."""
        retains = self.gradients.backend.retains_graph
        for left, (name, grad) in zip(reversed(range(len(grads))), grads.items(), strict=True):
            prediction = branch.prediction
            if prediction is None:
                prediction = self._forward.predict(model, branch.batch)
            branch.prediction = prediction if left and retains else None
            self.gradients.backward(name, share * (prediction * grad).sum(), retain_graph=bool(left and retains))

    def step(self) -> None:
        """Combine the gradients of winners and losers after the last micro-batch of an optimizer step. Under DeepSpeed,
        also step the optimizer, which the Trainer does later under other engines."""
        metrics, finite = self.gradients.combine()
        self._meter.add(metrics, finite)
        self._meter.add({"safeguard/skipped": 1 - finite.float()}, 1)
        self.gradients.backend.step()


def _check_depends_on_predictions_only(loss: torch.Tensor, predictions: list[PairPredictions]) -> None:
    """Raise `ValueError` if the loss does not depend on the predictions, or directly on other trained tensors too.
    These would get no gradient: the backward passes start from the predictions."""
    nodes: list[Any] = [loss.grad_fn]
    for node in nodes:  # the list grows: it gets all nodes of the loss's autograd graph, which ends at the predictions
        if node is not None:
            nodes += [following for following, _ in node.next_functions if following not in nodes]
    leaves = {id(node.variable) for node in nodes if node is not None and node.name().endswith("AccumulateGrad")}
    allowed = {id(leaf) for pairs in predictions for leaf in (pairs.policy, pairs.anchored)}
    others = leaves - allowed
    if others or not any(id(pairs.policy) in leaves for pairs in predictions):
        raise UserError(
            "With `safeguard='parameter'`, the loss must depend on the model only through the outputs of "
            "`super().compute_loss(..., return_outputs=True)`. Got a loss that "
            + ("also depends on other trained tensors." if others else "does not depend on the predictions.")
            + " Change `compute_loss`, or use `safeguard='output'`."
        )
