"""Trainers of `benchmarks/front.py`: the public one with its inputs encoded once, and with rules that were tried on the
front and not taken into the package."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.data import pixels_as_floats
from trl_diffusion_sdpo.losses import winner_error_gradient
from trl_diffusion_sdpo.step.branch_gradients import ANCHOR

RATE_CUT = 0.7  # of the trust region


class EncodedTrainer(DiffusionSDPOTrainer):
    """Encodes each image and prompt once: the pictures are never cropped or flipped here, and the VAE's most likely
    latent stands for its sample."""

    def __init__(self, *parts, **options):
        self._latents: dict[int, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}
        super().__init__(*parts, **options)

    def _encode(self, inputs):
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


class TriedTrainer(EncodedTrainer):
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
        trust_region (`float`, *optional*): Largest rise of a probe's winners at any noise level, as a share, under the
            averaged weights; whenever it is exceeded, the learning rate is cut for good, from the step after the next.
            Needs `winner_budget`, whose probe it takes.
    """

    def __init__(
        self,
        *parts: Any,
        winner_error: float = 0.0,
        reference_pull: float = 0.0,
        pull_below: float = 1.0,
        relative: bool = False,
        loser_share: float = 1.0,
        fresh_anchor: bool = False,
        trust_region: float | None = None,
        **options: Any,
    ):
        super().__init__(*parts, **options)
        assert not fresh_anchor or self.args.gradient_accumulation_steps == 1
        self.winner_error, self.reference_pull, self.pull_below = winner_error, reference_pull, pull_below
        self.relative, self.loser_share = relative, loser_share
        self.fresh_anchor, self.trust_region = fresh_anchor, trust_region
        self._ref_error: torch.Tensor | None = None  # of the winners whose loss is being taken
        self._met, self._before = None, None  # winners of this batch and of the one before

    def _loss_of(self, model_pred, batch, ref_pred, scores, safeguard=None):
        if self.relative:
            self._ref_error = _mean_square((ref_pred.float() - batch.target.float()).chunk(2)[0])
        outputs = super()._loss_of(model_pred, batch, ref_pred, scores, safeguard)
        if not model_pred.requires_grad or not (self.winner_error or self.reference_pull):
            return outputs
        pred, ref, target = (part.float().chunk(2)[0] for part in (model_pred, ref_pred, batch.target))
        ref_error = _mean_square(ref - target)
        below = batch.levels.chunk(2)[0] <= self.pull_below
        more = self.winner_error * _mean_square(pred - target) + self.reference_pull * below * _mean_square(pred - ref)
        return replace(outputs, loss=outputs.loss + (more / ref_error).mean())

    def _timestep_weights(self, batch):
        if not self.relative:
            return super()._timestep_weights(batch)
        weights = 1 / self._ref_error
        return weights / weights.mean()

    def _loser_weights(self, levels):
        found = super()._loser_weights(levels)
        if self.loser_share != 1:
            within = torch.ones_like(levels) if found["loser_weights"] is None else found["loser_weights"]
            found["loser_weights"] = self.loser_share * within
        return found

    def _noisy_batch(self, inputs):
        batch = super()._noisy_batch(inputs)
        if self.fresh_anchor and self.model.training:
            self._before, self._met = self._met, batch.halves()[0]
        return batch

    def _backward_by_branch(self, model, inputs, probing):
        if not self.fresh_anchor:
            return super()._backward_by_branch(model, inputs, probing)
        branches = self._branches
        with _own_anchor_off(branches):
            outputs = super()._backward_by_branch(model, inputs, probing)
        winners = self._met if self._before is None else self._before
        prediction = self._predict(model, winners)
        push = winner_error_gradient(prediction - winners.target.float())
        branches.backward(ANCHOR, (prediction * push).sum())
        return outputs

    def steer_by_probe(self) -> None:
        if self.trust_region is None:
            return super().steer_by_probe()
        before = self._budget.before  # NaN at levels that are not visited
        change = (self._probe_errors() / before - 1).nan_to_num(nan=torch.inf)
        if torch.where(before > 0, change, 0).max() > self.trust_region:
            self.lr_scheduler.base_lrs = [RATE_CUT * rate for rate in self.lr_scheduler.base_lrs]
        return None


@contextmanager
def _own_anchor_off(branches):
    """The anchor 'error' without its own backward pass: the caller makes one."""
    before, branches.anchor = branches.anchor, "branch"
    try:
        yield
    finally:
        branches.anchor = before


def _mean_square(residual: torch.Tensor) -> torch.Tensor:
    return residual.square().flatten(1).mean(1)
