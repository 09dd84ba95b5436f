"""AuraFlow: a transformer with learned positions and a T5 text encoder, trained by flow matching with a fixed shift."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..utils.errors import UserError
from .base import Family, check_in_channels

# Default image size of the pipeline's call. `sample_size` in the published configurations would give 512.
CALL_RESOLUTION = 1024


class AuraFlowFamily(Family):
    """Trains `AuraFlowPipeline` with any version of AuraFlow.

    The pipeline pads every prompt to 256 tokens and sets the embeddings of padding to zero. The transformer gets no
    mask, so it attends to the padding.
    """

    name = "AuraFlow"
    frozen_components = ("vae", "text_encoder")
    # Our choice: the targets of diffusers' LoRA script for Stable Diffusion 3, whose joint blocks are similar; there is
    # none for AuraFlow. Only its four joint blocks have text projections.
    lora_target_modules = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    learning_rate_full = 1e-6  # our choice for a large model (6.8B parameters); no rate is published
    learning_rate_lora = 1e-4  # our choice: the usual rate in diffusers' LoRA scripts
    patch_size = 2

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)

    @property
    def default_resolution(self) -> int:
        """Default image size of the pipeline's call, or less if the transformer has too few position embeddings."""
        return min(CALL_RESOLUTION, self._positions_per_side * self.patch_size * self.vae_scale_factor)

    @property
    def _positions_per_side(self) -> int:
        return math.isqrt(self.denoiser.config.pos_embed_max_size)

    def check_image_size(self, height: int, width: int) -> None:
        """Raise `ValueError` if an image has more tokens along a side than the transformer has position embeddings:
        it would silently give several tokens the same one."""
        largest = self._positions_per_side * self.patch_size * self.vae_scale_factor
        if max(height, width) > largest:
            raise UserError(
                f"This AuraFlow transformer has position embeddings for at most {largest} pixels along a side, got "
                f"images of {height} by {width}. Train at a smaller `resolution`."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, *_ = self.call_encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "timestep": timesteps / 1000,  # the transformer multiplies by 1000 again
        }

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 * inputs["timestep"]
