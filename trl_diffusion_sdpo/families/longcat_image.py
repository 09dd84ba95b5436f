"""LongCat-Image: a transformer over packed latents, conditioned on Qwen2.5-VL and trained by flow matching."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from .base import no_autocast
from .ovis_image import OvisImageFamily


class LongCatImageFamily(OvisImageFamily):
    """Trains `LongCatImagePipeline`. Prompts are padded to 512 tokens, and the padding is not masked.

    The pipeline's call lets the text encoder rewrite each prompt. Training takes prompts as they are, and so do sample
    images.
    """

    name = "LongCat-Image"
    pipeline_classes = ("LongCatImagePipeline",)

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        return {**super().generation_kwargs(scale), "enable_prompt_rewrite": False}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        pipeline = self.pipeline
        device = pipeline.text_encoder.device
        # The pipeline encodes on the device of its first component, which may be another than the text encoder's.
        here = SimpleNamespace(
            device=device,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            tokenizer_max_length=pipeline.tokenizer_max_length,
            prompt_template_encode_prefix=pipeline.prompt_template_encode_prefix,
            prompt_template_encode_suffix=pipeline.prompt_template_encode_suffix,
        )
        with no_autocast(device):
            return {"prompt_embeds": type(pipeline)._encode_prompt(here, prompts)}  # (N, 512, width)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        inputs = super().denoiser_inputs(latents, timesteps, conditioning)
        positions = inputs["img_ids"]
        positions[:, 0] = 1
        positions[:, 1:] += self.pipeline.tokenizer_max_length  # rows and columns continue after the text
        return inputs
