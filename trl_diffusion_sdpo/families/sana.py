"""Sana: a linear-attention transformer over strongly compressed latents, trained by flow matching.

Prompts are encoded by Gemma 2.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..utils.errors import UserError
from .base import Family


class SanaFamily(Family):
    """Trains `SanaPipeline`: Sana and Sana 1.5.

    Refuses Sana-Sprint, which was distilled to few steps with another objective. The pipeline's default instruction
    precedes each prompt. The autoencoder draws no random numbers, so latents do not depend on a seed.

    Source: https://huggingface.co/papers/2410.10629.
    """

    name = "Sana"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v")  # from diffusers' LoRA script for Sana
    learning_rate_full = 1e-6  # our choice, between the rates of Stable Diffusion (2e-6) and SDXL (2e-7)
    learning_rate_lora = 1e-4  # from diffusers' script

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return arguments that also stop the pipeline from rounding image sizes to a fixed list."""
        return {**super().generation_kwargs(scale), "use_resolution_binning": False}

    def check_pipeline(self) -> None:
        super().check_pipeline()
        if self.denoiser.config.guidance_embeds:
            raise UserError(
                "A Sana transformer must have `guidance_embeds=False`, and this one has True: it belongs to "
                "Sana-Sprint, which was distilled with another objective. Use the Sana checkpoint from which it was "
                "distilled."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, mask, _, _ = self.call_encode_prompt(
            prompts, do_classifier_free_guidance=False, complex_human_instruction=self._instruction()
        )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask.bool()}  # (N, tokens, width) and (N, tokens)

    def vae_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return latents: this autoencoder is deterministic and has no posterior."""
        return self.pipeline.vae.encode(pixel_values).latent

    def sample_moments(self, moments: torch.Tensor, generator: list[torch.Generator] | None) -> torch.Tensor:
        return moments

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "timestep": timesteps * self.denoiser.config.timestep_scale,
            "encoder_attention_mask": conditioning["prompt_mask"],
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return output[:, : self.denoiser.config.in_channels]  # drop the learned variance, if there is one

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return inputs["timestep"] / self.denoiser.config.timestep_scale

    def _instruction(self) -> list[str]:
        """Return the instruction that the pipeline's call puts before prompts; `encode_prompt` has no such default."""
        return inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
