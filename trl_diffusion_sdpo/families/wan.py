"""Wan 2.1 and 2.2, text to video: a transformer with a UMT5 text encoder, trained by flow matching.

Latents of clips have the shape `(N, C, frames, H, W)`. A still image is a clip of one frame.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..utils.errors import UserError
from .base import Family, channel_statistics, check_in_channels

MAX_SEQUENCE_LENGTH = 512  # tokens to which every prompt is padded, the pipeline's default


class WanFamily(Family):
    """Trains `WanPipeline` with one text-to-video transformer: Wan 2.1 (1.3B and 14B) and Wan 2.2 TI2V-5B.

    Wan 2.2 A14B has two transformers, one for each of two timestep ranges, and a pipeline with both is refused. Train
    them separately: load a pipeline with only one, and set `timestep_range` to its range. Image-to-video transformers
    are refused too.
    """

    name = "Wan"
    frozen_components = ("vae", "text_encoder")
    # Self-attention and cross-attention, as in finetrainers' examples for Wan. Diffusers has no LoRA script for Wan.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    # Our choice: half of Stable Diffusion's rate, as larger models need smaller steps.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # our choice, as in diffusers' scripts for other transformers
    patch_size = 2
    # Default (height, width) of the pipeline's call, which every checkpoint supports.
    default_resolution = (480, 832)
    conditional_rows = "all"
    generated_image = "frames[0][0]"

    @property
    def vae_scale_factor(self) -> int:
        return self.pipeline.vae_scale_factor_spatial

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return arguments for a video of one frame, which is an image."""
        return {**super().generation_kwargs(scale), "num_frames": 1, "output_type": "pil"}

    def check_pipeline(self) -> None:
        if self.pipeline.transformer_2 is not None or self.pipeline.config.boundary_ratio is not None:
            raise UserError(
                "A Wan pipeline must have only one transformer for training. This pipeline has two, for two timestep "
                f"ranges (`boundary_ratio` is {self.pipeline.config.boundary_ratio}). Train one after the other: load "
                "the pipeline with `transformer_2=None, boundary_ratio=None`, and set `timestep_range` to the range of "
                "the transformer. The first has the timesteps above `1000 * boundary_ratio`. To train the second, pass "
                "it as `transformer`."
            )
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.z_dim)
        if self.denoiser.config.image_dim is not None:
            raise UserError(
                "A text-to-video transformer must have `image_dim` None, got "
                f"{self.denoiser.config.image_dim}. This transformer animates images. Use a text-to-video "
                "checkpoint."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.call_encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width), zeros after the end of the prompt

    def vae_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the output of the VAE's encoder for images `(N, 3, H, W)` or clips `(N, 3, frames, H, W)`.

        With the VAE of Wan 2.1, the result is `(N, 2C, 1 + (frames - 1) / 4, H / 8, W / 8)`. Raise `ValueError` if the
        number of frames does not fit the VAE, which would silently ignore the last ones.
        """
        clips = pixel_values.unsqueeze(2) if pixel_values.ndim == 4 else pixel_values
        frames = clips.shape[2]
        factor = self.pipeline.vae_scale_factor_temporal
        if frames % factor != 1:
            raise UserError(
                f"The number of frames in a clip must be 1 plus a multiple of {factor}, got {frames}. Cut the clip to "
                f"{1 + (frames - 1) // factor * factor} frames."
            )
        return super().vae_moments(clips)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = channel_statistics(self.pipeline.vae, latents)
        return (latents - mean) / std

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Return the denoiser's inputs, with one timestep per row. A pipeline with `expand_timesteps` repeats it for
        every token, with the same result."""
        text = conditioning["prompt_embeds"].to(latents.dtype)
        return {"hidden_states": latents, "timestep": timesteps, "encoder_hidden_states": text}
