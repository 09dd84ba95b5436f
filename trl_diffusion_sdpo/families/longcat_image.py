"""LongCat-Image: a transformer over packed latents, conditioned on Qwen2.5-VL and trained by flow matching."""

from collections.abc import Mapping
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from PIL import Image

from ..utils._compat import longcat_prompt_embeds
from .base import no_autocast
from .ovis_image import OvisImageFamily
from .packing import pack_patches, patch_positions

SOURCE_AREA = 1024 * 1024  # pixels of a resized source image


class LongCatImageFamily(OvisImageFamily):
    """Trains `LongCatImagePipeline`. Prompts are padded to 512 tokens, without a mask.

    The pipeline's call lets the text encoder rewrite each prompt; training and sample images use them unchanged.
    """

    name = "LongCat-Image"

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        return {**super().generation_kwargs(scale), "enable_prompt_rewrite": False}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        here = _prompt_encoder(self.pipeline)
        with no_autocast(here.device):
            return {"prompt_embeds": longcat_prompt_embeds(self.pipeline, here, prompts)}  # (N, 512, width)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        inputs = super().denoiser_inputs(latents, timesteps, conditioning)
        positions = inputs["img_ids"]
        positions[:, 0] = 1
        positions[:, 1:] += self.pipeline.tokenizer_max_length  # rows and columns continue after the text
        return inputs


class LongCatImageEditFamily(OvisImageFamily):
    """Trains `LongCatImageEditPipeline`, which edits a source image by the prompt.

    The text encoder reads prompt and source image together. In the transformer, source tokens follow the noisy latents,
    and have no prediction or error. The pipeline's call generates about 1024 x 1024 pixels.
    """

    name = "LongCat-Image-Edit"
    takes_source = True

    def size_kwargs(self, height: int, width: int) -> dict[str, Any]:
        """Return no arguments: the source image determines the size."""
        return {}

    def encode_edits(self, prompts: list[str], sources: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        """Encode each prompt together with its source image, and the source images to latents."""
        pipeline = self.pipeline
        processor = pipeline.image_processor
        latents = self.encode_sources(sources)
        resized = [self.resized(source) for (source,) in sources]
        here = _prompt_encoder(pipeline, "image_processor_vl", "image_token")
        with no_autocast(here.device):
            rows = [
                longcat_prompt_embeds(
                    pipeline, here, [prompt], processor.resize(image, image.height // 2, image.width // 2)
                )
                for prompt, image in zip(prompts, cycle(resized), strict=False)
            ]
        return {**latents, "prompt_embeds": torch.cat(rows)}  # (N, tokens of source and text, width)

    def source_pixels(self, source: Image.Image) -> torch.Tensor:
        resized = self.resized(source)
        return self.pipeline.image_processor.preprocess(resized, resized.height, resized.width)

    def resized(self, source: Image.Image) -> Image.Image:
        ratio = source.width / source.height
        width, height = pipeline_longcat_image_edit.calculate_dimensions(SOURCE_AREA, ratio)
        return self.pipeline.image_processor.resize(source, height, width)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        inputs = super().denoiser_inputs(latents, timesteps, conditioning)
        (source,) = self.latents_of_sources(conditioning, latents.dtype)
        positions = [patch_positions(part.shape[-2], part.shape[-1], latents.device) for part in (latents, source)]
        for image, ids in enumerate(positions, 1):
            ids[:, 0] = image
            ids[:, 1:] += conditioning["prompt_embeds"].shape[1]  # rows and columns continue after the text
        inputs["img_ids"] = torch.cat(positions)
        inputs["hidden_states"] = torch.cat([inputs["hidden_states"], pack_patches(source)], dim=1)
        return inputs

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return super().prediction_of(output[:, : self.image_seq_len(latents)], latents)


def _prompt_encoder(pipeline: Any, *names: str) -> SimpleNamespace:
    """Return an object with the attributes that `_encode_prompt` of the pipeline reads, including `names`.

    Its `device` is the text encoder's; the pipeline's own is that of its first component.
    """
    names = (
        "text_encoder",
        "tokenizer",
        "tokenizer_max_length",
        "prompt_template_encode_prefix",
        "prompt_template_encode_suffix",
        *names,
    )
    attributes = {name: getattr(pipeline, name) for name in names}
    return SimpleNamespace(device=pipeline.text_encoder.device, **attributes)
