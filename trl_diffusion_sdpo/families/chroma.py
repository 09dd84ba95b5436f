"""Chroma: FLUX.1's transformer conditioned on T5 tokens, without pooled text and guidance, trained by flow matching."""

from collections.abc import Mapping
from typing import Any

import torch

from .packing import PackedLatentsFamily, pack_patches, patch_positions


class ChromaFamily(PackedLatentsFamily):
    """Trains `ChromaPipeline`.

    Pipelines saved as the image-to-image or inpainting class can be trained too: their transformer is the same.

    Prompts are padded to 512 tokens. As in the pipeline, the mask (1 for tokens, 0 for padding) is added to the
    attention logits, so padding is not fully masked.
    """

    name = "Chroma"
    frozen_components = ("vae", "text_encoder")

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _, mask, *_ = self.call_encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask}  # (N, tokens, width) and (N, tokens)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        prompt_embeds = conditioning["prompt_embeds"].to(latents.dtype)
        tokens = pack_patches(latents)  # (N, H/2 * W/2, 4C)
        mask = conditioning["prompt_mask"].to(latents.dtype)
        return {
            "hidden_states": tokens,
            "timestep": timesteps / 1000,
            "encoder_hidden_states": prompt_embeds,
            "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=latents.device),
            "img_ids": patch_positions(latents.shape[-2], latents.shape[-1], latents.device),
            "attention_mask": torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
        }
