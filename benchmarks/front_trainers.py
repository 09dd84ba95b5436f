"""Trainers of `benchmarks/front.py`: the public one with its inputs encoded once, and with rules that were tried on the
front and not taken into the package."""

from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.data import pixels_as_floats
from trl_diffusion_sdpo.losses import mean_error, winner_error_gradient
from trl_diffusion_sdpo.step.branch_gradients import ANCHOR
from trl_diffusion_sdpo.step.pair_forward import PairForward
from trl_diffusion_sdpo.step.parameter_safeguard import ParameterSafeguard

RATE_CUT = 0.7  # of the trust region


class EncodedForward(PairForward):
    """Encodes each image and prompt once: the images are never cropped or flipped here, and the mode of the VAE's
    posterior stands for its sample."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._latents: dict[int, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}

    def encode(self, inputs):
        winners, losers = inputs["pixel_values"].chunk(2)
        keys = [hash(pair.numpy().tobytes()) for pair in torch.stack([winners, losers], 1)]
        new = [row for row, key in enumerate(keys) if key not in self._latents]
        if new:
            pixels = pixels_as_floats(torch.cat([winners[new], losers[new]]))
            encoded = self.family.encode_images(pixels).chunk(2)
            self._latents |= dict(zip((keys[row] for row in new), torch.stack(encoded, 1), strict=True))
        unknown = sorted(set(inputs["prompts"]) - self._texts.keys())
        if unknown:
            self._texts |= dict(zip(unknown, self.family.encode_prompts(unknown)["prompt_embeds"], strict=True))
        latents = torch.cat(torch.stack([self._latents[key] for key in keys]).unbind(1)).contiguous()
        text = torch.stack([self._texts[prompt] for prompt in inputs["prompts"]])
        return latents, {"prompt_embeds": torch.cat([text, text])}


class EncodedTrainer(DiffusionSDPOTrainer):
    """The public trainer with [`EncodedForward`]."""

    pair_forward_class = EncodedForward


@dataclass
class Rules:
    """Rules that were tried and not taken up.

    Args:
        winner_error (`float`): Weight of one more term: each winner's error as a share of the reference's on the same
            input. It goes on where the preference is settled.
        reference_pull (`float`): Weight of one more term: the squared distance of a winner's prediction from the
            reference's, as a share of the reference's error on the same input.
        pull_below (`float`): Noise level up to which alone the pull acts.
        relative (`bool`): Whether the loss weighs each pair's errors by one over the reference's error on its winner,
            in units of the batch's mean weight: an equal share then weighs as much at every noise level.
        loser_share (`float`): A constant factor of the losers' gradients, besides lambda.
        fresh_anchor (`bool`): Whether parameter space protects the winners of the batch before, which are not in the
            step's own gradient. With one micro-batch a step.
        trust_region (`float`, *optional*): Largest rise of a probe's winners at any noise bin, as a share, under the
            averaged weights; whenever it is exceeded, the learning rate is cut for good, from the step after the next.
            Needs `winner_budget`, whose probe it takes.
    """

    winner_error: float = 0.0
    reference_pull: float = 0.0
    pull_below: float = 1.0
    relative: bool = False
    loser_share: float = 1.0
    fresh_anchor: bool = False
    trust_region: float | None = None


class TriedForward(EncodedForward):
    """The forward passes under [`Rules`]."""

    rules = Rules()
    _ref_error: torch.Tensor | None = None  # of the winners whose loss is being taken

    def loss(self, predictions, safeguard=None):
        batch, rules = predictions.batch, self.rules
        if rules.relative:
            self._ref_error = mean_error((predictions.reference.float() - batch.target.float()).chunk(2)[0])
        outputs = super().loss(predictions, safeguard)
        if not predictions.policy.requires_grad or not (rules.winner_error or rules.reference_pull):
            return outputs
        given = (predictions.policy, predictions.reference, batch.target)
        pred, ref, target = (part.float().chunk(2)[0] for part in given)
        ref_error = mean_error(ref - target)
        below = batch.noise_levels.chunk(2)[0] <= rules.pull_below
        more = rules.winner_error * mean_error(pred - target) + rules.reference_pull * below * mean_error(pred - ref)
        return replace(outputs, loss=outputs.loss + (more / ref_error).mean())

    def timestep_weights(self, batch):
        if not self.rules.relative:
            return super().timestep_weights(batch)
        weights = 1 / self._ref_error
        return weights / weights.mean()

    def loser_weights(self, noise_levels):
        weights = super().loser_weights(noise_levels)
        if self.rules.loser_share == 1:
            return weights
        return self.rules.loser_share * (torch.ones_like(noise_levels) if weights is None else weights)


class FreshAnchor(ParameterSafeguard):
    """Protects the winners of the batch before."""

    enabled = False
    met = before = None  # winners of this batch and of the one before

    def predict_pairs(self, model, inputs):
        predictions = super().predict_pairs(model, inputs)
        self.before, self.met = self.met, predictions.batch.halves()[0]
        self.model = model
        return predictions

    def backward_branches(self, loss, *, step, share):
        if not self.enabled:
            return super().backward_branches(loss, step=step, share=share)
        gradients = self.gradients
        with _own_anchor_off(gradients):
            super().backward_branches(loss, step=step, share=share)
        winners = self.met if self.before is None else self.before
        prediction = self._forward.predict(self.model, winners)
        grad_anchor = winner_error_gradient(prediction - winners.target.float())
        gradients.backward(ANCHOR, (prediction * grad_anchor).sum())
        return None


class TriedTrainer(EncodedTrainer):
    """A trainer under [`Rules`], which are given by name."""

    pair_forward_class = TriedForward
    parameter_safeguard_class = FreshAnchor

    def __init__(self, *given: Any, **named: Any):
        self.rules = Rules(**{field.name: named.pop(field.name) for field in fields(Rules) if field.name in named})
        super().__init__(*given, **named)
        assert not self.rules.fresh_anchor or self.args.gradient_accumulation_steps == 1
        self.pair_forward.rules = self.rules
        if self.rules.trust_region is not None:
            self.winner_budget.update = self._keep_within_trust_region

    def set_up_safeguard(self):
        super().set_up_safeguard()
        if self.parameter_safeguard is not None:
            self.parameter_safeguard.enabled = self.rules.fresh_anchor

    def _keep_within_trust_region(self) -> None:
        before = self.winner_budget.controller.initial_errors  # NaN at noise bins that are not visited
        change = (self.winner_budget.measure() / before - 1).nan_to_num(nan=torch.inf)
        if torch.where(before > 0, change, 0).max() > self.rules.trust_region:
            self.lr_scheduler.base_lrs = [RATE_CUT * rate for rate in self.lr_scheduler.base_lrs]


@contextmanager
def _own_anchor_off(gradients):
    """The anchor 'error' without its own backward pass: the caller makes one."""
    before, gradients.anchor = gradients.anchor, "branch"
    try:
        yield
    finally:
        gradients.anchor = before
