"""A preference classifier on noisy images, for the study of step pairs: a small head on the frozen base's features.

Source: PC-Diffusion (https://huggingface.co/papers/2511.07806) for the loss and for guidance by its gradient. Its
network is not published; this one is ours.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import logsigmoid

TRAINING_STEPS = 500
BATCH = 32


class Classifier:
    """Says which of two noisy images of a prompt is preferred: a head on the mean of the frozen base's middle block."""

    def __init__(self, sampler: Any, pairs: Dataset, seed: int):
        self.sampler, self.unet = sampler, sampler.pipeline.unet.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Linear(self.unet.config.block_out_channels[-1], 64), nn.SiLU(), nn.Linear(64, 1)
            )
        optimizer = torch.optim.Adam(self.head.parameters(), 1e-3)
        latents, prompts = self.encoded(pairs)
        for _ in range(TRAINING_STEPS):
            rows = torch.randint(len(prompts), (BATCH,), generator=generator)
            level = int(torch.randint(len(self.sampler.timesteps), (), generator=generator))
            optimizer.zero_grad()
            (-logsigmoid(self.gaps(level, latents[:, rows], prompts[rows], generator)).mean()).backward()
            optimizer.step()

    @torch.no_grad()
    def encoded(self, pairs: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents `(2, N, ...)` of winners and losers, and the indices of their prompts `(N,)`."""
        vae = self.sampler.pipeline.vae
        columns = [
            self.sampler.pipeline.image_processor.preprocess(list(pairs[half])) for half in ("chosen", "rejected")
        ]
        halves = [vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor for pixels in columns]
        return torch.stack(halves), torch.tensor([self.sampler.prompts.index(prompt) for prompt in pairs["prompt"]])

    def judge(self, timestep: torch.Tensor, states: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Return the scores of noisy latents `(N,)`."""
        features: list[torch.Tensor] = []
        hook = self.unet.mid_block.register_forward_hook(lambda _, __, output: features.append(output.mean((2, 3))))
        with hook:
            self.unet(states, timestep, texts)
        return self.head(features[0]).squeeze(1)

    def scores(self, level: int, states: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return self.judge(self.sampler.timesteps[level], states, self.sampler.texts[prompts])

    def gaps(
        self, level: int, latents: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the winners' scores minus the losers', both with the same noise, `(N,)`."""
        signal = float(self.sampler.signal[level])
        noisy = signal**0.5 * latents + (1 - signal) ** 0.5 * torch.randn(latents.shape[1:], generator=generator)
        winner, loser = self.scores(level, noisy.flatten(0, 1), prompts.repeat(2)).chunk(2)
        return winner - loser

    @torch.no_grad()
    def agreement(self, pairs: Dataset) -> dict[str, float]:
        """Return the share of pairs whose order it knows, for each of the sampler's noise levels."""
        generator = torch.Generator().manual_seed(0)
        latents, prompts = self.encoded(pairs)
        gaps = [self.gaps(level, latents, prompts, generator) for level in range(len(self.sampler.timesteps))]
        return {str(level): float((gap > 0).float().mean()) for level, gap in enumerate(gaps)}

    @contextlib.contextmanager
    def guide(self, pipeline: Any, scale: float) -> Iterator[None]:
        """Add the gradient of the score to each step of a pipeline: `noise - scale sqrt(1 - signal) grad`."""
        original, kept = pipeline.unet.forward, pipeline.scheduler.alphas_cumprod

        def forward(
            states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **options: Any
        ) -> Any:
            noise = original(states, timestep, encoder_hidden_states, **options)[0]
            guided = slice(-len(states) // (1 + pipeline.do_classifier_free_guidance), None)
            with torch.enable_grad():
                leaf = states[guided].detach().requires_grad_()
                score = self.judge(timestep, leaf, encoder_hidden_states[guided]).sum()
            change = scale * (1 - kept[int(timestep)]) ** 0.5 * torch.autograd.grad(score, leaf)[0]
            return (noise - change.repeat(len(noise) // len(change), 1, 1, 1),)

        pipeline.unet.forward = forward
        try:
            yield
        finally:
            pipeline.unet.forward = original
