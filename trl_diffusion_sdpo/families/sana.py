"""Sana: a linear-attention transformer on the strongly compressed latents of a deep autoencoder, conditioned on a
Gemma 2 encoder, over flow matching."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .base import Family
from .loss_defaults import FLOW_DEFAULTS
from .noise import FlowMatchingProcess


class SanaFamily(Family):
    """`SanaPipeline`: Sana and Sana 1.5. Sana-Sprint, distilled to few steps with another objective, is refused.

    Prompts are preceded by the pipeline's instruction, the default of its call. The autoencoder's latent is
    deterministic and does not depend on generators.

    Sources: https://huggingface.co/papers/2410.10629 for the model; LoRA targets and rate as diffusers' script.
    """

    name = "Sana"
    pipeline_classes = ("SanaPipeline",)
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v")  # as diffusers' LoRA script for Sana
    # Our choice, since none is published: between those of Stable Diffusion (2e-6) and of SDXL (2e-7).
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # as diffusers' script
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    patch_size = 1  # the autoencoder alone compresses

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """The scale, and images of the requested size instead of the nearest in the pipeline's list."""
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
        prompt_embeds, mask, _, _ = self.call_encode_prompt(
            prompts, do_classifier_free_guidance=False, complex_human_instruction=self._instruction()
        )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask.bool()}  # (N, tokens, width) and (N, tokens)

    def vae_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The latents: this VAE is deterministic."""
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
        return output[:, : self.denoiser.config.in_channels]  # without a learned variance, if there is one

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return inputs["timestep"] / self.denoiser.config.timestep_scale

    def _instruction(self) -> list[str]:
        """The instruction that the pipeline's call adds to prompts by default; `encode_prompt` does not."""
        return inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
