"""Ovis-Image: a transformer over packed latents, conditioned on a Qwen3 language model and trained by flow matching."""

from collections.abc import Mapping
from typing import Any

import torch

from .packing import PackedLatentsFamily, pack_patches, patch_positions


class OvisImageFamily(PackedLatentsFamily):
    """Trains `OvisImagePipeline`. Prompts are padded with zeros to a fixed length, without a mask."""

    name = "Ovis-Image"
    frozen_components = ("vae", "text_encoder")

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


def _text_positions(length: int, device: torch.device) -> torch.Tensor:
    """Return the position ids of text tokens, `(length, 3)`, float32: `(0, index, index)` for each token."""
    numbers = torch.arange(length, device=device, dtype=torch.float32)
    return torch.stack([torch.zeros_like(numbers), numbers, numbers], dim=1)
