"""A batch of noisy latents, the inputs of a denoiser and its target, what is predicted of it, and how its noise and
timesteps are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..families.inversion import InversionSettings


@dataclass(frozen=True)
class NoiseSettings:
    """How noise and timesteps are drawn.

    Args:
        timesteps (`dict[str, Any]`): Keyword arguments of [`~trl_diffusion_sdpo.families.NoiseProcess.timesteps`].
        noise_offset (`float`): Scale of the per-channel constant noise.
        input_perturbation (`float`): Scale of extra noise in the input, but not in the target.
        timesteps_per_pair (`int`): Draws of timestep and noise of each encoded pair, in training.
        inversion ([`~trl_diffusion_sdpo.families.inversion.InversionSettings`], *optional*): Each image gets the noise
            that its own inversion finds, in place of drawn noise.
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
        target (`torch.Tensor` of shape `(2B, ...)`): What is to be predicted.
        timesteps (`torch.Tensor` of shape `(2B,)`): Equal for the two images of a pair.
        conditioning (`dict[str, torch.Tensor]`): Each of shape `(2B, ...)`; some may be on the CPU.
        noise_levels (`torch.Tensor` of shape `(2B,)`): Of the timesteps, in `[0, 1]`.
    """

    noisy: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    noise_levels: torch.Tensor

    def take(self, index: torch.Tensor | slice) -> NoisyBatch:
        """The rows of `index`, in its order."""
        noisy, target, timesteps = self.noisy[index], self.target[index], self.timesteps[index]
        return NoisyBatch(noisy, target, timesteps, take_rows(self.conditioning, index), self.noise_levels[index])

    def halves(self) -> tuple[NoisyBatch, NoisyBatch]:
        """Winners and losers."""
        pairs = len(self.noisy) // 2
        return self.take(slice(None, pairs)), self.take(slice(pairs, None))


@dataclass(frozen=True)
class PairPredictions:
    """What policy and reference predict of B pairs, winners first.

    Args:
        batch ([`NoisyBatch`]): Their inputs.
        policy (`torch.Tensor` of shape `(2B, ...)`): float32.
        reference (`torch.Tensor` of shape `(2B, ...)`, *optional*): float32, without a graph.
        scores (`torch.Tensor` of shape `(2B,)`, *optional*): Reward scores.
        reference_errors (`torch.Tensor` of shape `(2B,)`, *optional*): Of a reference whose errors were computed
            beforehand, in place of its predictions.
        pair_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factors of the pairs' losses.
        beta (`torch.Tensor` of shape `()`, *optional*): In place of that of the settings.
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
        """Whether anything is known of a reference."""
        return self.reference is not None or self.reference_errors is not None

    def take(self, rows: torch.Tensor) -> PairPredictions:
        """Some of the rows, in the order of `rows`, winners first."""
        optional = (self.reference, self.scores, self.reference_errors)
        reference, scores, errors = (None if tensor is None else tensor[rows] for tensor in optional)
        pairs = rows.chunk(2)[0] % (len(self.policy) // 2)
        factors = None if self.pair_weights is None else self.pair_weights[pairs]
        batch = self.batch.take(rows)
        return PairPredictions(batch, self.policy[rows], reference, scores, errors, factors, self.beta)


def of_both_halves(conditioning: torch.Tensor, rows: int) -> torch.Tensor:
    """The conditioning of each of `rows` images: of half as many prompts `(B, ...)` that of each for both images of its
    pair, and of as many as it is.

    Raises:
        ValueError: On any other number of prompts.
    """
    prompts = len(conditioning)
    if prompts not in (rows // 2, rows):
        raise ValueError(
            f"A batch has a prompt for each pair or for each image, {rows // 2} or {rows}; got {prompts}."
        )
    return torch.cat([conditioning] * (rows // prompts))


def repeat_pairs(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Rows `(2B, ...)`, winners first, with all pairs repeated in their order: `(2 times B, ...)`, winners first."""
    winners, losers = tensor.chunk(2)
    return torch.cat([*[winners] * times, *[losers] * times])


def seeds_of_draws(seeds: Sequence[int], draws: int) -> list[int]:
    """Seeds of the first draw of each pair, which are the pairs' own, then of the second draws, and so on."""
    later = [
        int(np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)[0] >> 1)
        for draw in range(1, draws)
        for seed in seeds
    ]
    return [*seeds, *later]


def take_rows(conditioning: dict[str, torch.Tensor], index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """Rows of a conditioning; some of its tensors are on the CPU, others on the device of the index."""
    if isinstance(index, slice):
        return {name: value[index] for name, value in conditioning.items()}
    return {name: value[index.to(value.device)] for name, value in conditioning.items()}
