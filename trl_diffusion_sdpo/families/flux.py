"""FLUX.1: a transformer over packed latents, conditioned on T5 tokens, pooled CLIP text and, where it was distilled to
take one, a guidance scale; over flow matching."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .base import FLOW_DEFAULTS, Family, check_in_channels, no_autocast
from .noise import FlowMatchingProcess
from .packing import TWO_STREAM_TARGETS, pack_patches, patch_positions, unpack_patches


class FluxFamily(Family):
    """`FluxPipeline` with the transformer of FLUX.1 dev or schnell, and folders of its image-to-image and inpainting
    classes, which hold the same transformer. Those of Fill, Canny and Depth, which see further images, are refused.

    dev was distilled to take the guidance scale as an input. Training fixes it at `guidance_scale`; images are drawn
    at any scale afterwards, as one does with models of diffusers' own script. schnell has no such input. It was
    distilled to few steps besides, and nothing in flow matching keeps that: prefer dev where there is a choice.
    """

    name = "FLUX.1"
    pipeline_classes = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder", "text_encoder_2")
    # As diffusers' own LoRA script for FLUX: attention and feed-forward of the blocks with two streams, attention of
    # the others.
    lora_target_modules = TWO_STREAM_TARGETS
    # Our choice: half of Stable Diffusion's, because weights of a larger and distilled model bear smaller steps.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # as diffusers' script
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    patch_size = 2
    # As the README of diffusers' scripts trains dev: at 1 the distilled model predicts what it would without guidance,
    # and that is what the targets are made of.
    guidance_scale = 1.0

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        if not self.denoiser.config.guidance_embeds:
            self.guidance_scale = None

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    @property
    def max_sequence_length(self) -> int:
        """Tokens that a prompt is padded to, all of which the transformer sees: 512 for dev and 256 for schnell, as
        their model cards have it."""
        return 512 if self.denoiser.config.guidance_embeds else 256

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """The scale, and prompts of the length that training uses: the pipeline's call has dev's for schnell too."""
        return {**super().generation_kwargs(scale), "max_sequence_length": self.max_sequence_length}

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, 4 * self.pipeline.vae.config.latent_channels)  # two by two latents per token

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder_2.device
        with no_autocast(device):
            prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
                prompts, device=device, num_images_per_prompt=1, max_sequence_length=self.max_sequence_length
            )
        # (N, tokens, width of T5) and (N, width of CLIP)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        dtype, device = self.dtype, noisy_latents.device
        height, width = noisy_latents.shape[-2:]
        prompt_embeds = conditioning["prompt_embeds"].to(dtype)
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full(timesteps.shape, self.guidance_scale, device=device, dtype=torch.float32)
        tokens = denoiser(
            hidden_states=pack_patches(noisy_latents.to(dtype)),  # (N, H/2 * W/2, 4C)
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device),
            img_ids=patch_positions(height, width, device),
            return_dict=False,
        )[0]
        return unpack_patches(tokens, height, width)
