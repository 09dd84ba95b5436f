"""Stable Diffusion 1.x and 2.x: a UNet with one CLIP text encoder, trained by DDPM to predict epsilon or v."""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Family
from .loss_defaults import STABLE_DIFFUSION_DEFAULTS
from .noise import DDPMProcess
from .unet_checks import check_text_to_image_unet


class StableDiffusionFamily(Family):
    """Trains `StableDiffusionPipeline`.

    Pipelines saved as the image-to-image or inpainting class can be trained too, if their UNet is a text-to-image one.
    """

    name = "Stable Diffusion"
    denoiser_name = "unet"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # from diffusers' DPO script
    # Published: 2.05e-5 for AdamW at 2048 pairs per step. We assume about 20 pairs, and scale with the square root of
    # their number.
    learning_rate_full = 2e-6
    learning_rate_lora = 1e-4  # diffusers' DPO script uses 1e-5, over 10000 steps
    defaults = STABLE_DIFFUSION_DEFAULTS
    noise_process_class = DDPMProcess

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_text_to_image_unet(self.pipeline)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.call_encode_prompt(prompts, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        text = conditioning["prompt_embeds"].to(latents.dtype)
        return {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text}
