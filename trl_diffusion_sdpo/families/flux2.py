"""FLUX.2: a transformer over text and image tokens. Its latents are squares of two by two of the VAE's, normalised by
the statistics of a batch norm in the VAE. The dev model takes guidance as an input, klein does not."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from .base import Family, check_in_channels
from .loss_defaults import FLOW_DEFAULTS
from .noise import FlowMatchingProcess

# As diffusers' LoRA script for klein; that for dev omits the single-stream blocks, 48 of its 56. Their `to_out` is a
# layer, and in the other blocks a list of layers, so that it must be named block by block.
LORA_TARGETS = (
    *("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"),
    *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(48)),
)


class Flux2Process(FlowMatchingProcess):
    """Flow matching under FLUX.2's shift, which depends on the image's tokens and on the number of sampling steps: 50,
    the default of both pipelines. At 1024 pixels `mu` is 2.3 for 10 steps, 2.0 for 50 and 1.7 for 100."""

    def shift_of(self, image_seq_len: int) -> float:
        return compute_empirical_mu(image_seq_len, num_steps=50)


class Flux2Hooks(Family):
    """Settings and hooks that the families of dev and klein share."""

    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = LORA_TARGETS
    learning_rate_full = 1e-6  # our choice, as for FLUX.1: nothing is published
    learning_rate_lora = 1e-4  # as diffusers' script
    defaults = FLOW_DEFAULTS
    noise_process_class = Flux2Process
    conditional_rows = "all"

    @property
    def vae_scale_factor(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, 4 * self.pipeline.vae.config.latent_channels)  # two by two latents per token

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """States of three layers of the text encoder, concatenated; prompts are padded to one length."""
        prompt_embeds, _ = self.call_encode_prompt(prompts, num_images_per_prompt=1)
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width of three layers)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)` to `(N, 4C, H/2, W/2)`, normalised by the running statistics of the VAE's batch norm."""
        statistics = self.latent_statistics()
        mean, variance = (statistics[name].to(latents.device).view(1, -1, 1, 1) for name in ("mean", "variance"))
        squares = torch.nn.functional.pixel_unshuffle(latents, 2)
        return (squares - mean) / (variance + self.pipeline.vae.config.batch_norm_eps).sqrt()

    def latent_statistics(self) -> dict[str, torch.Tensor]:
        """The running statistics, `(4C,)` each in float32."""
        norm = self.pipeline.vae.bn
        found = {"mean": norm.running_mean.float(), "variance": norm.running_var.float()}
        return self._kept_statistics or found

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        inputs = token_inputs(latents, timesteps, conditioning["prompt_embeds"].to(latents.dtype))
        if self.guidance_scale is not None:
            inputs["guidance"] = torch.full_like(timesteps, self.guidance_scale, dtype=torch.float32)  # (N,)
        return inputs

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return output.transpose(1, 2).unflatten(2, latents.shape[2:])

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 * inputs["timestep"]


class Flux2Family(Flux2Hooks):
    """`Flux2Pipeline`: FLUX.2 [dev], prompted through Mistral Small and distilled to take the guidance scale as an
    input. Training fixes it at `guidance_scale`; images can be generated at any scale afterwards."""

    name = "FLUX.2"
    pipeline_classes = ("Flux2Pipeline",)
    # As in the README of diffusers' script: at 1 the distilled model predicts as without guidance, and the targets are
    # made without guidance.
    guidance_scale = 1.0


class Flux2KleinFamily(Flux2Hooks):
    """`Flux2KleinPipeline` and folders of its inpainting class: FLUX.2 [klein], prompted through Qwen3.

    Training on flow matching unlearns the few steps of a distilled checkpoint (`is_distilled`): tune the base model of
    the same size, whose LoRA fits both, or restrict the timesteps to those of the few steps.
    """

    name = "FLUX.2 klein"
    pipeline_classes = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")

    @property
    def has_few_steps(self) -> bool:
        return self.pipeline.config.is_distilled


def token_inputs(noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> dict[str, Any]:
    """Inputs of the transformer: latents `(N, 4C, H, W)` as tokens, and every token's image, row, column and word."""
    ranges = [torch.arange(length, device=timesteps.device) for length in (1, *noisy_latents.shape[2:])]
    words = torch.arange(prompt_embeds.shape[1], device=timesteps.device)
    return {
        "hidden_states": noisy_latents.flatten(2).transpose(1, 2),
        "encoder_hidden_states": prompt_embeds,
        "timestep": timesteps / 1000,
        "img_ids": torch.cartesian_prod(*ranges, ranges[0]),
        "txt_ids": torch.cartesian_prod(*ranges[:1] * 3, words),
    }
