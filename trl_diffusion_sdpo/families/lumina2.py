"""Lumina Image 2.0: a transformer with joint attention over image and prompt, trained by flow matching.

Prompts are encoded by Gemma 2.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Family, check_in_channels


class Lumina2Family(Family):
    """Trains `Lumina2Pipeline`, also under its older name `Lumina2Text2ImgPipeline`.

    The transformer's time runs from 0 (noise) to 1 (image), and it predicts image minus noise. We reverse both,
    so that the usual noise process applies. As in the pipeline's call, its system prompt precedes each prompt.

    Source: https://huggingface.co/papers/2503.21758.
    """

    name = "Lumina Image 2.0"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # from diffusers' LoRA script for Lumina 2
    learning_rate_full = 1e-6  # our choice, between the rates of Stable Diffusion (2e-6) and SDXL (2e-7)
    learning_rate_lora = 1e-4  # from diffusers' script
    patch_size = 2
    conditional_rows = "all"

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, mask, _, _ = self.call_encode_prompt(
            prompts, do_classifier_free_guidance=False, num_images_per_prompt=1
        )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask.bool()}  # (N, tokens, width) and (N, tokens)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": 1 - timesteps / self.noise_process.num_train_timesteps,  # 0 is noise, 1 the image
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "encoder_attention_mask": conditioning["prompt_mask"],
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return -output

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return (1 - inputs["timestep"]) * self.noise_process.num_train_timesteps
