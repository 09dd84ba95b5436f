"""Base class and helpers of families whose transformer is built like that of FLUX.1."""

from collections.abc import Mapping
from typing import Any

import torch

from .base import JOINT_ATTENTION_TARGETS, Family, check_in_channels

# Targets of diffusers' LoRA script for FLUX.1: attention and feed-forward layers of the double-stream blocks, and
# attention of the single-stream blocks.
TWO_STREAM_TARGETS = (
    *JOINT_ATTENTION_TARGETS,
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)


class PackedLatentsFamily(Family):
    """Base class of families with the transformer blocks of FLUX.1. Each token is a square of two by two latents."""

    lora_target_modules = TWO_STREAM_TARGETS
    # Our choice: half of Stable Diffusion's rate, as large and distilled models need smaller steps.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # from diffusers' LoRA script for FLUX.1; the other families have no such script
    patch_size = 2
    conditional_rows = "all"
    batch_dimensions = {"txt_ids": None, "img_ids": None}

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, 4 * self.pipeline.vae.config.latent_channels)  # two by two latents per token

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return unpack_patches(output, *latents.shape[-2:])

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 * inputs["timestep"]


def pack_patches(latents: torch.Tensor) -> torch.Tensor:
    """Return latents `(N, C, H, W)` as tokens `(N, H/2 * W/2, 4C)`, row by row. A token is a square of two by two
    latents, its 4C numbers ordered by channel. Height and width must be even."""
    n, channels, height, width = latents.shape
    squares = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // 4, 4 * channels)


def unpack_patches(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return tokens from `pack_patches` as latents `(N, C, height, width)`."""
    n, _, width_of_token = tokens.shape
    squares = tokens.reshape(n, height // 2, width // 2, width_of_token // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(n, width_of_token // 4, height, width)


def patch_positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the position ids of packed latents, `(H/2 * W/2, 3)`, in float32 as FLUX expects: 0, row and column of
    each token."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)
    return ids.reshape(-1, 3)
