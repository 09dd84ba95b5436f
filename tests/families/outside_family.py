"""A module that is no part of this project: a pipeline with its own class of denoiser, and the family that trains it.
Tests put its folder on `sys.path` instead of installing it."""

from collections.abc import Mapping
from typing import Any

import torch

# diffusers loads a component's class from a module outside diffusers only if `ModelMixin` is a name of that module.
from diffusers import ModelMixin, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

from trl_diffusion_sdpo.families import DDPM_DEFAULTS, DDPMProcess, Family


class OutsideUNet(UNet2DConditionModel):
    """The UNet under another name."""


class OutsidePipeline(StableDiffusionPipeline):
    """The pipeline under another name."""


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
