"""ERNIE-Image: a transformer over one sequence of image and prompt tokens, trained by flow matching.

The VAE is that of FLUX.2. Each image token is a square of two by two latents.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from .base import PromptPadding
from .flux2 import Flux2LatentsFamily


class ErnieImageFamily(Flux2LatentsFamily):
    """Trains `ErnieImagePipeline`.

    If the pipeline has a language model, its call rewrites each prompt with it. Training and sample images use the
    prompts unchanged.
    """

    name = "ERNIE-Image"
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")  # our choice, as for Qwen-Image
    learning_rate_lora = 1e-4  # our choice, as for similar transformers
    prompt_padding: ClassVar[PromptPadding] = "end"
    default_resolution = 1024  # default of the pipeline's call; the denoiser's configuration has no image size
    batch_norm_eps = 1e-5  # used by the pipeline, although the VAE's configuration has another epsilon

    @property
    def vae_scale_factor(self) -> int:
        return self.pipeline.vae_scale_factor  # pixels per token

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        return {**super().generation_kwargs(scale), "use_pe": False}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        rows = list(self.call_encode_prompt(prompts))
        masks = [row.new_ones(len(row), dtype=torch.bool) for row in rows]
        return {
            "prompt_embeds": pad_sequence(rows, batch_first=True),  # (N, tokens of the longest prompt, width)
            "prompt_mask": pad_sequence(masks, batch_first=True),  # (N, tokens)
        }

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": timesteps.to(latents.dtype),  # rounded as in the pipeline
            "text_bth": conditioning["prompt_embeds"].to(latents.dtype),
            "text_lens": conditioning["prompt_mask"].sum(dim=1),
        }
