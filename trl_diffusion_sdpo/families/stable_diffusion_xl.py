"""Stable Diffusion XL: a UNet with two CLIP text encoders, trained by DDPM.

It is also conditioned on the pooled text embedding and on image sizes.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..utils.errors import UserError
from .base import Family, channel_statistics
from .loss_defaults import STABLE_DIFFUSION_XL_DEFAULTS
from .noise import DDPMProcess, constant
from .unet_checks import check_text_to_image_unet

N_TIME_IDS = 6  # original height and width, crop top and left, target height and width


class StableDiffusionXLFamily(Family):
    """Trains `StableDiffusionXLPipeline` with a base UNet. Refuses refiner UNets, which need an aesthetic score.

    An empty prompt is encoded like any other, as in diffusers' training scripts. The pipeline's
    `force_zeros_for_empty_prompt` only affects negative prompts under classifier-free guidance.

    Source of the size conditioning: https://huggingface.co/papers/2307.01952, section 2.2.
    """

    name = "Stable Diffusion XL"
    denoiser_name = "unet"
    frozen_components = ("vae", "text_encoder", "text_encoder_2")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # from diffusers' DPO script
    # Published: 2.05e-6 for Adafactor at 2048 pairs per step. We assume about 20 pairs, and scale with the square root
    # of their number.
    learning_rate_full = 2e-7
    learning_rate_lora = 1e-4  # diffusers' DPO script uses 1e-5
    defaults = STABLE_DIFFUSION_XL_DEFAULTS
    noise_process_class = DDPMProcess

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_text_to_image_unet(self.pipeline)
        unet = self.pipeline.unet.config
        if unet.addition_embed_type != "text_time" or unet.projection_class_embeddings_input_dim is None:
            raise UserError(
                f"An SDXL UNet must have `addition_embed_type='text_time'`, got {unet.addition_embed_type!r}. Use a "
                "pipeline with an SDXL UNet."
            )
        if self.pipeline.text_encoder_2 is None:  # the pipeline generates from embeddings
            return
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        expected = N_TIME_IDS * unet.addition_time_embed_dim + pooled
        if unet.projection_class_embeddings_input_dim != expected:
            raise UserError(
                f"An SDXL base UNet must have `projection_class_embeddings_input_dim` {expected}, for {N_TIME_IDS} "
                f"sizes and {pooled} numbers of pooled text; got {unet.projection_class_embeddings_input_dim}. The "
                "refiner's UNet has a smaller number, because it takes an aesthetic score. Use the base model."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.call_encode_prompt(
            prompts, text_encoder="text_encoder_2", do_classifier_free_guidance=False
        )
        # (N, tokens, width of both encoders) and (N, projection width)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Multiply latents by the scaling factor, and normalise each channel if the VAE's configuration has
        `latents_mean` and `latents_std`."""
        config = self.pipeline.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return latents * config.scaling_factor
        mean, std = channel_statistics(self.pipeline.vae, latents)
        return (latents - mean) * config.scaling_factor / std

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Return `time_ids` `(N, 6)`: original size, crop and target size, as in the pipeline. In float32, because half
        precision would round them."""
        target = constant(tuple(target_size), original_sizes.dtype, original_sizes.device)
        target_sizes = target.expand(len(original_sizes), 2)
        time_ids = torch.cat([original_sizes, crop_top_lefts.to(original_sizes), target_sizes], dim=1)
        return {"time_ids": time_ids.float()}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        pooled, text = (conditioning[name].to(latents.dtype) for name in ("pooled_prompt_embeds", "prompt_embeds"))
        added = {"text_embeds": pooled, "time_ids": conditioning["time_ids"]}
        return {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text, "added_cond_kwargs": added}
