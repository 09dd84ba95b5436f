"""Wan 2.1 and 2.2, text to video: a transformer over latents of clips (five axes), conditioned on a UMT5 text encoder,
over flow matching. A still image is a clip of one frame."""

from collections.abc import Mapping
from typing import Any

import torch

from .base import Family, channel_statistics, check_in_channels
from .loss_defaults import FLOW_DEFAULTS
from .noise import FlowMatchingProcess

MAX_SEQUENCE_LENGTH = 512  # tokens that prompts are padded to, the default of the pipeline's call


class WanFamily(Family):
    """`WanPipeline` with one text-to-video transformer: Wan 2.1 (1.3B and 14B) and Wan 2.2 TI2V-5B.

    Wan 2.2 A14B has two transformers for two ranges of timesteps. They are refused together; each can be trained in a
    pipeline with one transformer, over its range. Image-to-video transformers are refused.
    """

    name = "Wan"
    pipeline_classes = ("WanPipeline",)
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    # Attention over the clip and over the text, as finetrainers' examples for Wan: diffusers has no script.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    # Our choice: half of Stable Diffusion's, because larger models need smaller steps.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # our choice, as diffusers' scripts for other transformers
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    patch_size = 2
    conditional_rows = "all"
    generated_image = "frames[0][0]"

    @property
    def vae_scale_factor(self) -> int:
        return self.pipeline.vae_scale_factor_spatial

    @property
    def default_resolution(self) -> tuple[int, int]:
        """The default of the pipeline's call, which fits every checkpoint; the larger ones also support 720 lines."""
        return 480, 832

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """The scale, and one frame: an image."""
        return {**super().generation_kwargs(scale), "num_frames": 1, "output_type": "pil"}

    def check_pipeline(self) -> None:
        if self.pipeline.transformer_2 is not None or self.pipeline.config.boundary_ratio is not None:
            raise ValueError(
                "A Wan pipeline must have one transformer for all timesteps, and this one has two for two ranges "
                f"(`boundary_ratio` is {self.pipeline.config.boundary_ratio}). Train them one by one: load the "
                "pipeline with `transformer_2=None, boundary_ratio=None`, for the second one also with it as "
                "`transformer`, and set `timestep_range` to its range: the first transformer has the timesteps above "
                "`1000 * boundary_ratio`."
            )
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.z_dim)
        if self.denoiser.config.image_dim is not None:
            raise ValueError(
                "A text-to-video transformer takes no image, and this one does (`image_dim` is "
                f"{self.denoiser.config.image_dim}): it was made to animate images. Use a text-to-video checkpoint."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.call_encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width), zero after the prompt's end

    def vae_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the VAE's output for images `(N, 3, H, W)` or clips `(N, 3, frames, H, W)`.

        With the VAE of Wan 2.1 its shape is `(N, 2C, 1 + (frames - 1) / 4, H / 8, W / 8)`.

        Raises:
            ValueError: If the frames do not fill the latents: the VAE would ignore the last ones.
        """
        clips = pixel_values.unsqueeze(2) if pixel_values.ndim == 4 else pixel_values
        frames, factor = clips.shape[2], self.pipeline.vae_scale_factor_temporal
        if frames % factor != 1:
            raise ValueError(
                f"A clip must have 1 frame more than a multiple of {factor}, got {frames}. Cut it to "
                f"{1 + (frames - 1) // factor * factor}."
            )
        return super().vae_moments(clips)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = channel_statistics(self.pipeline.vae, latents)
        return (latents - mean) / std

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Timesteps are passed by row, also if the pipeline repeats them for every token (`expand_timesteps`): it needs
        that for clips that begin with a given image, and equal timesteps give equal modulations."""
        text = conditioning["prompt_embeds"].to(latents.dtype)
        return {"hidden_states": latents, "timestep": timesteps, "encoder_hidden_states": text}
