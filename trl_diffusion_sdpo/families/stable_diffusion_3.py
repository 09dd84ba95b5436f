"""Stable Diffusion 3 and 3.5: a transformer over one sequence of image and text tokens, trained by flow matching.

It is conditioned on two CLIP text encoders and optionally on T5.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .base import JOINT_ATTENTION_TARGETS, Family, check_in_channels


class StableDiffusion3Family(Family):
    """Trains `StableDiffusion3Pipeline`.

    Pipelines saved as the image-to-image or inpainting class can be trained too, if their transformer is a
    text-to-image one. Loaded without T5 (`text_encoder_3=None, tokenizer_3=None`), the pipeline uses zeros in place of
    its embeddings.

    Source of the architecture and the noise process: https://huggingface.co/papers/2403.03206.
    """

    name = "Stable Diffusion 3"
    frozen_components: tuple[str, ...] = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    # The joint attention of every block, as in diffusers' train_dreambooth_lora_sd3.py. The second attention (`attn2`)
    # of some blocks of 3.5 Medium is not trained.
    lora_target_modules = JOINT_ATTENTION_TARGETS
    learning_rate_full = 1e-6  # our choice, between the rates of Stable Diffusion (2e-6) and SDXL (2e-7)
    learning_rate_lora = 1e-4  # from diffusers' script
    weighting_scheme = "logit_normal"  # from the paper and diffusers' script
    patch_size = 2

    def __init__(self, pipeline: DiffusionPipeline):
        if pipeline.text_encoder_3 is None:
            self.frozen_components = ("vae", "text_encoder", "text_encoder_2")
        super().__init__(pipeline)

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.call_encode_prompt(
            prompts, prompt_2=None, prompt_3=None, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        # (N, tokens of CLIP and then of T5, width of T5) and (N, projection widths of both CLIP encoders)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": timesteps,
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "pooled_projections": conditioning["pooled_prompt_embeds"].to(latents.dtype),
        }
