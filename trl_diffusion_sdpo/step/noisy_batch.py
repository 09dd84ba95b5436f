"""Batches of noisy latents, the predictions for them, and the settings of their noise and timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..families.inversion import InversionSettings


@dataclass(frozen=True)
class NoiseSettings:
    """Settings of noise and timesteps.

    Args:
        timesteps (`dict[str, Any]`): Keyword arguments of [`~trl_diffusion_sdpo.families.NoiseProcess.timesteps`].
        noise_offset (`float`): Scale of the per-channel constant noise.
        input_perturbation (`float`): Scale of extra noise in the input, but not in the target.
        timesteps_per_pair (`int`): Draws of timestep and noise for each encoded pair in training.
        inversion ([`~trl_diffusion_sdpo.families.inversion.InversionSettings`], *optional*): Settings of the inversion
            that gives each image its noise. If `None`, noise is drawn.
    """

    timesteps: dict[str, Any] = field(default_factory=dict)
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    timesteps_per_pair: int = 1
    inversion: InversionSettings | None = None


@dataclass(frozen=True)
class NoisyBatch:
    """B pairs at their timesteps, the winners first.

    Args:
        noisy (`torch.Tensor` of shape `(2B, ...)`): Noisy latents.
        target (`torch.Tensor` of shape `(2B, ...)`): Target of the prediction.
        timesteps (`torch.Tensor` of shape `(2B,)`): Timesteps, equal for the two images of a pair.
        conditioning (`dict[str, torch.Tensor]`): Tensors of shape `(2B, ...)`. Some may be on the CPU.
        noise_levels (`torch.Tensor` of shape `(2B,)`): Noise levels of the timesteps, in `[0, 1]`.
    """

    noisy: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    noise_levels: torch.Tensor

    def take(self, index: torch.Tensor | slice) -> NoisyBatch:
        """Return the rows of `index` in its order."""
        noisy, target, timesteps = self.noisy[index], self.target[index], self.timesteps[index]
        return NoisyBatch(noisy, target, timesteps, take_rows(self.conditioning, index), self.noise_levels[index])

    def halves(self) -> tuple[NoisyBatch, NoisyBatch]:
        """Return the winners and the losers."""
        pairs = len(self.noisy) // 2
        return self.take(slice(None, pairs)), self.take(slice(pairs, None))


@dataclass(frozen=True)
class PairPredictions:
    """Predictions of policy and reference for B pairs, winners first.

    Args:
        batch ([`NoisyBatch`]): Inputs and targets.
        policy (`torch.Tensor` of shape `(2B, ...)`): Predictions of the policy in float32.
        reference (`torch.Tensor` of shape `(2B, ...)`, *optional*): Predictions of the reference in float32, without a
            graph.
        scores (`torch.Tensor` of shape `(2B,)`, *optional*): Reward scores.
        reference_errors (`torch.Tensor` of shape `(2B,)`, *optional*): Errors of the reference that were computed
            before training. They replace its predictions.
        pair_weights (`torch.Tensor` of shape `(B,)`, *optional*): Weights of the pairs' losses.
        beta (`torch.Tensor` of shape `()`, *optional*): Beta that replaces the one of the settings.
    """

    batch: NoisyBatch
    policy: torch.Tensor
    reference: torch.Tensor | None
    scores: torch.Tensor | None
    reference_errors: torch.Tensor | None = None
    pair_weights: torch.Tensor | None = None
    beta: torch.Tensor | None = None

    @property
    def has_reference(self) -> bool:
        """Whether there are predictions or errors of a reference."""
        return self.reference is not None or self.reference_errors is not None

    def take(self, rows: torch.Tensor) -> PairPredictions:
        """Return the given rows in the order of `rows`, winners first."""
        optional = (self.reference, self.scores, self.reference_errors)
        reference, scores, errors = (None if tensor is None else tensor[rows] for tensor in optional)
        pairs = rows.chunk(2)[0] % (len(self.policy) // 2)
        factors = None if self.pair_weights is None else self.pair_weights[pairs]
        batch = self.batch.take(rows)
        return PairPredictions(batch, self.policy[rows], reference, scores, errors, factors, self.beta)


def of_both_halves(conditioning: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the conditioning of each of `rows` images, winners first. If `conditioning` has one row per pair, both
    images of the pair get this row. If it has one row per image, it is returned as it is.

    Raises:
        `ValueError`: If it has another number of rows.
    """
    prompts = len(conditioning)
    if prompts not in (rows // 2, rows):
        raise ValueError(
            f"A batch must have one prompt per pair or per image, which is {rows // 2} or {rows}. Got {prompts}. "
            "Change the `data_collator`."
        )
    return torch.cat([conditioning] * (rows // prompts))


def repeat_pairs(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat all pairs of `(2B, ...)`, winners first, in their order. The result is `(2 * times * B, ...)`, winners
    first."""
    winners, losers = tensor.chunk(2)
    return torch.cat([*[winners] * times, *[losers] * times])


def seeds_of_draws(seeds: Sequence[int], draws: int) -> list[int]:
    """Return the seeds of the first draws of all pairs, then of their second draws, and so on. The seed of a first draw
    is the pair's seed."""
    later = [
        int(np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)[0] >> 1)
        for draw in range(1, draws)
        for seed in seeds
    ]
    return [*seeds, *later]


def take_rows(conditioning: dict[str, torch.Tensor], index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """Return rows of a conditioning. Some of its tensors may be on the CPU, others on the device of the index."""
    if isinstance(index, slice):
        return {name: value[index] for name, value in conditioning.items()}
    return {name: value[index.to(value.device)] for name, value in conditioning.items()}
