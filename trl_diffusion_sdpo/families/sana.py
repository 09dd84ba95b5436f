"""Sana: a linear-attention transformer on the strongly compressed latents of a deep autoencoder, conditioned on a
Gemma 2 encoder, over flow matching."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .base import FLOW_DEFAULTS, Family, no_autocast
from .noise import FlowMatchingProcess


class SanaFamily(Family):
    """`SanaPipeline`: Sana and Sana 1.5. Sana-Sprint, distilled to draw in a few steps with another objective, is
    refused.

    Prompts get the pipeline's own instruction in front, the default of its call, as they do when it draws. The
    autoencoder's latent is deterministic: no generator changes it.

    Sources: https://huggingface.co/papers/2410.10629 for the model; LoRA targets and rate as diffusers' own script.
    """

    name = "Sana"
    pipeline_classes = ("SanaPipeline",)
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v")  # as diffusers' own LoRA script for Sana
    # Our choice, since none is published: between those of Stable Diffusion (2e-6) and of SDXL (2e-7).
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # as diffusers' script
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    patch_size = 1  # the autoencoder alone compresses

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """The scale, and images of the size that is asked for, not of the nearest in the pipeline's list."""
        return {**super().generation_kwargs(scale), "use_resolution_binning": False}

    def check_pipeline(self) -> None:
        super().check_pipeline()
        if self.denoiser.config.guidance_embeds:
            raise ValueError(
                "A Sana transformer takes noisy latents, a time and a prompt, and this one also takes the guidance "
                "scale (`guidance_embeds`): it is Sana-Sprint's, distilled with another objective. Use the Sana "
                "checkpoint it was distilled from."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with no_autocast(device):
            prompt_embeds, mask, _, _ = self.pipeline.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                num_images_per_prompt=1,
                device=device,
                complex_human_instruction=self._instruction(),
            )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask.bool()}  # (N, tokens, width) and (N, tokens)

    def vae_latents(self, pixel_values: torch.Tensor, generator: list[torch.Generator] | None) -> torch.Tensor:
        """The one latent there is, whether or not generators come."""
        return self.pipeline.vae.encode(pixel_values).latent

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        config, dtype = self.denoiser.config, self.dtype
        prediction = denoiser(
            noisy_latents.to(dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            timestep=timesteps * config.timestep_scale,
            encoder_attention_mask=conditioning["prompt_mask"],
            return_dict=False,
        )[0]
        return prediction[:, : config.in_channels]  # without a learned variance, if it answers with one

    def _instruction(self) -> list[str]:
        """What the pipeline's call puts before prompts: `encode_prompt` alone puts nothing there."""
        return inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
