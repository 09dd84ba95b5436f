"""Ovis-Image: a transformer over packed latents, conditioned on a Qwen3 language model and trained by flow matching."""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Family, check_in_channels
from .packing import TWO_STREAM_TARGETS, pack_patches, patch_positions, unpack_patches


class OvisImageFamily(Family):
    """Trains `OvisImagePipeline`. Prompts are padded with zeros to a fixed length, and the padding is not
    masked."""

    name = "Ovis-Image"
    pipeline_classes = ("OvisImagePipeline",)
    frozen_components = ("vae", "text_encoder")
    # Our choice, because diffusers has no LoRA script for Ovis-Image: the targets of its script for FLUX.1, which has
    # the same blocks.
    lora_target_modules = TWO_STREAM_TARGETS
    # Our choice: half of Stable Diffusion's rate, because larger models need smaller steps.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # from diffusers' scripts for similar transformers
    patch_size = 2
    conditional_rows = "all"
    shared_inputs = ("txt_ids", "img_ids")

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, 4 * self.pipeline.vae.config.latent_channels)  # two by two latents per token

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, *_ = self.call_encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        prompt_embeds = conditioning["prompt_embeds"].to(latents.dtype)
        return {
            "hidden_states": pack_patches(latents),  # (N, H/2 * W/2, 4C)
            "timestep": timesteps / 1000,
            "encoder_hidden_states": prompt_embeds,
            "txt_ids": _text_positions(prompt_embeds.shape[1], latents.device),
            "img_ids": patch_positions(height, width, latents.device),
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return unpack_patches(output, *latents.shape[-2:])

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 * inputs["timestep"]


def _text_positions(length: int, device: torch.device) -> torch.Tensor:
    """Return the position ids of text tokens, `(length, 3)`, float32. The three numbers of a token are 0, its index and
    again its index."""
    numbers = torch.arange(length, device=device, dtype=torch.float32)
    return torch.stack([torch.zeros_like(numbers), numbers, numbers], dim=1)
