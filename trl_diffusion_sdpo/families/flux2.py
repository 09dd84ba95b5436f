"""FLUX.2: a transformer over text and image tokens, trained by flow matching.

Each token is a square of two by two VAE latents, normalised by statistics that the VAE stores in a batch norm. FLUX.2
dev takes the guidance scale as an input, FLUX.2 klein does not.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image

from ..utils._compat import resized_to_area
from .base import Family, check_in_channels
from .noise import FlowMatchingProcess

# The targets of diffusers' LoRA script for klein. (The one for dev leaves out the single-stream blocks, 48 of dev's
# 56.) Single-stream blocks are named one by one, because in other blocks `attn.to_out` is a list of layers.
LORA_TARGETS = (
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "to_qkv_mlp_proj",
    *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(48)),
)

MOST_SOURCE_PIXELS = 1024 * 1024  # larger sources are resized, as in the pipeline
SOURCE_POSITION = 10  # first number in position ids: 0 for noisy latents, 10 for the first source, 20 for the second


class Flux2Process(FlowMatchingProcess):
    """Flow matching with the shift of FLUX.2, which depends on the number of image tokens and of sampling steps.

    Training assumes 50 sampling steps, the default of both pipelines. At 1024 x 1024 pixels, `mu` is 2.3 for 10 steps,
    2.0 for 50 and 1.7 for 100.
    """

    def shift_of(self, image_seq_len: int) -> float:
        return compute_empirical_mu(image_seq_len, num_steps=50)


class Flux2LatentsFamily(Family):
    """Base class of families with the VAE of FLUX.2. Each token is a square of two by two latents."""

    frozen_components: tuple[str, ...] = ("vae", "text_encoder")
    learning_rate_full = 1e-6  # our choice, as for FLUX.1; no rate is published

    @property
    def vae_scale_factor(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    @property
    def batch_norm_eps(self) -> float:
        """Number that the pipeline adds to the variances of the VAE's batch norm."""
        return self.pipeline.vae.config.batch_norm_eps

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, 4 * self.pipeline.vae.config.latent_channels)  # two by two latents per token

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Reshape latents `(N, C, H, W)` to `(N, 4C, H/2, W/2)`, and normalise them as the VAE's batch norm does."""
        statistics = self.latent_statistics()
        mean, variance = (statistics[name].to(latents.device).view(1, -1, 1, 1) for name in ("mean", "variance"))
        return (self.as_squares(latents) - mean) / (variance + self.batch_norm_eps).sqrt()

    def as_squares(self, latents: torch.Tensor) -> torch.Tensor:
        """Reshape latents `(N, C, H, W)` to `(N, 4C, H/2, W/2)`."""
        return torch.nn.functional.pixel_unshuffle(latents, 2)

    def latent_statistics(self) -> dict[str, torch.Tensor]:
        """Return mean and variance of the VAE's batch norm, `(4C,)` each in float32."""
        norm = self.pipeline.vae.bn
        statistics = {"mean": norm.running_mean.float(), "variance": norm.running_var.float()}
        return self._kept_statistics or statistics


class Flux2Hooks(Flux2LatentsFamily):
    """Base class of the families of FLUX.2 dev and klein."""

    lora_target_modules = LORA_TARGETS
    learning_rate_lora = 1e-4  # from diffusers' script
    noise_process_class = Flux2Process
    conditional_rows = "all"
    may_take_source = True
    takes_several_sources = True

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return the hidden states of three layers of the text encoder, concatenated and padded to a fixed length."""
        prompt_embeds, _ = self.call_encode_prompt(prompts, num_images_per_prompt=1)
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width of three layers)

    def source_pixels(self, source: Image.Image) -> torch.Tensor:
        """Resize a larger source image to about 1 megapixel, and crop its sides to multiples of a token's."""
        processor = self.pipeline.image_processor
        if source.width * source.height > MOST_SOURCE_PIXELS:
            source = resized_to_area(processor, source, MOST_SOURCE_PIXELS)
        width, height = (side // self.vae_scale_factor * self.vae_scale_factor for side in source.size)
        return processor.preprocess(source, height=height, width=width, resize_mode="crop")

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        inputs = token_inputs(latents, timesteps, conditioning["prompt_embeds"].to(latents.dtype))
        if self.guidance_scale is not None:
            inputs["guidance"] = torch.full_like(timesteps, self.guidance_scale, dtype=torch.float32)  # (N,)
        for number, latents_of_source in enumerate(self.latents_of_sources(conditioning, latents.dtype), 1):
            source = token_inputs(latents_of_source, timesteps, inputs["encoder_hidden_states"])
            source["img_ids"][:, 0] = SOURCE_POSITION * number
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], source["hidden_states"]], dim=1)
            inputs["img_ids"] = torch.cat([inputs["img_ids"], source["img_ids"]])
        return inputs

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return the output for the noisy latents, without that for source images, which follows."""
        tokens = self.image_seq_len(latents)
        return output[:, :tokens].transpose(1, 2).unflatten(2, latents.shape[2:])

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 * inputs["timestep"]


class Flux2Family(Flux2Hooks):
    """Trains `Flux2Pipeline`, FLUX.2 [dev], whose prompts are encoded by Mistral Small.

    The model takes the guidance scale as an input. Training sets it to `guidance_scale`; the trained model can generate
    at any scale.
    """

    name = "FLUX.2"
    # 1 is no guidance, as in the README of diffusers' script: training targets have none.
    guidance_scale = 1.0


class Flux2KleinFamily(Flux2Hooks):
    """Trains `Flux2KleinPipeline`, FLUX.2 [klein], whose prompts are encoded by Qwen3.

    Pipelines saved as the inpainting class can be trained too. A distilled checkpoint (`is_distilled`) generates in few
    steps, and training gradually undoes that. Better train a LoRA of the base model of the same size and load it into
    the distilled model, or set `timesteps` to the few at which it generates.
    """

    name = "FLUX.2 klein"

    @property
    def has_few_steps(self) -> bool:
        return self.pipeline.config.is_distilled


def token_inputs(noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> dict[str, Any]:
    """Return the transformer's inputs for latents `(N, 4C, H, W)`: the latents as tokens, and the position ids of all
    tokens.

    A position id has four numbers: image, row, column and word.
    """
    ranges = [torch.arange(length, device=timesteps.device) for length in (1, *noisy_latents.shape[2:])]
    words = torch.arange(prompt_embeds.shape[1], device=timesteps.device)
    return {
        "hidden_states": noisy_latents.flatten(2).transpose(1, 2),
        "encoder_hidden_states": prompt_embeds,
        "timestep": timesteps / 1000,
        "img_ids": torch.cartesian_prod(*ranges, ranges[0]),
        "txt_ids": torch.cartesian_prod(*ranges[:1] * 3, words),
    }
