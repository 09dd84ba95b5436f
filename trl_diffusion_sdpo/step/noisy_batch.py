"""A batch of noisy latents: the inputs of a denoiser and its target."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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


def repeat_pairs(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Rows `(2B, ...)`, winners first, with all pairs repeated in their order: `(2 times B, ...)`, winners first."""
    winners, losers = tensor.chunk(2)
    return torch.cat([*[winners] * times, *[losers] * times])


def take_rows(conditioning: dict[str, torch.Tensor], index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """Rows of a conditioning; some of its tensors are on the CPU, others on the device of the index."""
    if isinstance(index, slice):
        return {name: value[index] for name, value in conditioning.items()}
    return {name: value[index.to(value.device)] for name, value in conditioning.items()}
