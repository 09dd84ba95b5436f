"""Z-Image: a transformer over one sequence of image and prompt tokens, trained by flow matching.

The transformer gets prompts, encoded by Qwen 3, without padding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from ..utils.errors import UserError
from .base import Family

PROMPT_TOKENS = 512  # the pipeline's `max_sequence_length`


class ZImageFamily(Family):
    """Trains `ZImagePipeline` with Z-Image or Z-Image-Turbo. Refuses transformers of Z-Image-Omni.

    Better train Z-Image than Turbo, which is distilled from it to generate in about eight steps without guidance
    (its configuration does not say so). Long training gradually undoes the distillation.

    The transformer's time runs from 0 (noise) to 1 (image), and it predicts image minus noise. We reverse both,
    so that the usual noise process applies. Guidance is off at `guidance_scale=0` instead of 1: the pipeline adds the
    scaled guidance to the prediction for the prompt.

    Source: https://huggingface.co/papers/2511.22699.
    """

    name = "Z-Image"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # from diffusers' LoRA script for Z-Image
    learning_rate_full = 1e-6  # our choice, between the rates of Stable Diffusion (2e-6) and SDXL (2e-7)
    learning_rate_lora = 1e-4  # from diffusers' script
    patch_size = 2
    default_resolution = 1024  # default of the pipeline's call; the denoiser's configuration has no image size
    conditional_rows = "first"
    host_conditioning = ("prompt_lengths",)

    def check_pipeline(self) -> None:
        super().check_pipeline()
        if self.denoiser.config.siglip_feat_dim is not None:
            raise UserError(
                "A text-to-image Z-Image transformer must have `siglip_feat_dim` None, got "
                f"{self.denoiser.config.siglip_feat_dim}. This one belongs to Z-Image-Omni. Use Z-Image or "
                "Z-Image-Turbo."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        # The pipeline changes the list, so pass a copy.
        rows, _ = self.call_encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        # Pad to a fixed length, so that embeddings of several batches fit into one.
        prompt_embeds = torch.stack([pad(row, (0, 0, 0, PROMPT_TOKENS - len(row))) for row in rows])
        # Lengths stay on the CPU, where every prediction reads them to remove the padding.
        lengths = torch.tensor([len(row) for row in rows])
        return {"prompt_embeds": prompt_embeds, "prompt_lengths": lengths}  # (N, PROMPT_TOKENS, width) and (N,)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        lengths = conditioning["prompt_lengths"].tolist()
        prompts = conditioning["prompt_embeds"].to(latents.dtype)
        return {
            "x": list(latents.unsqueeze(2).unbind()),  # N tensors (C, 1, H, W): images are videos of one frame
            "t": (1000 - timesteps) / 1000,  # 0 is noise, 1 the image
            "cap_feats": [row[:length] for row, length in zip(prompts, lengths, strict=True)],
        }

    def prediction_of(self, output: Any, latents: torch.Tensor) -> torch.Tensor:
        return -torch.stack(output).squeeze(2)  # N tensors (C, 1, H, W) -> (N, C, H, W)

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 - 1000 * inputs["t"]
