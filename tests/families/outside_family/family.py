"""The family of `OutsidePipeline`, of names that `trl_diffusion_sdpo.families` exports."""

from collections.abc import Mapping
from typing import Any

import torch

from trl_diffusion_sdpo.families import DDPM_DEFAULTS, DDPMProcess, Family, check_text_to_image_unet

from .pipeline import OutsidePipeline


class OutsideFamily(Family):
    name = "Outside"
    pipeline_classes = ("OutsidePipeline", "StableDiffusionPipeline")
    pipeline_class = OutsidePipeline
    denoiser_name = "unet"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    learning_rate_full = 2e-6
    learning_rate_lora = 1e-4
    defaults = DDPM_DEFAULTS
    noise_process_class = DDPMProcess

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_text_to_image_unet(self.pipeline)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.call_encode_prompt(prompts, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        text = conditioning["prompt_embeds"].to(latents.dtype)
        return {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text}


class NotAFamily:
    """Has no hook."""
