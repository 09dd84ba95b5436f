"""Chroma: FLUX.1's transformer without inputs for pooled text and guidance, conditioned on T5 tokens and trained by
flow matching."""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Family, check_in_channels
from .packing import TWO_STREAM_TARGETS, pack_patches, patch_positions, unpack_patches


class ChromaFamily(Family):
    """Trains `ChromaPipeline`.

    Model folders that were saved as the image-to-image or inpainting pipeline can be trained too, because their
    transformer is the same.

    Prompts are padded to 512 tokens. The pipeline adds the mask (1 for tokens, 0 for padding) to the attention logits,
    so padding is not fully masked. Training adds the mask in the same way.
    """

    name = "Chroma"
    pipeline_classes = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
    frozen_components = ("vae", "text_encoder")
    # Our choice, because diffusers has no LoRA script for Chroma: the targets of its script for FLUX.1, whose blocks
    # are the same.
    lora_target_modules = TWO_STREAM_TARGETS
    # Our choice: half of Stable Diffusion's rate, because larger models need smaller steps.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # from diffusers' script for FLUX.1
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

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return unpack_patches(output, *latents.shape[-2:])

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 * inputs["timestep"]
