"""FLUX.1: a transformer over packed latents, trained by flow matching.

It is conditioned on T5 tokens, the pooled CLIP text embedding and, in guidance-distilled models, a guidance scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

from .packing import PackedLatentsFamily, pack_patches, patch_positions


class FluxFamily(PackedLatentsFamily):
    """Trains `FluxPipeline` with the transformer of FLUX.1 dev or schnell.

    Pipelines saved as the image-to-image or inpainting class can be trained too: their transformer is the same. Fill,
    Canny and Depth are refused, because they take additional images.

    FLUX.1 dev takes the guidance scale as an input. Training sets it to `guidance_scale`; the trained model can
    generate at any scale. Prefer dev to schnell, which has no guidance input and was distilled to generate in few
    steps: training gradually undoes that.
    """

    name = "FLUX.1"
    frozen_components = ("vae", "text_encoder", "text_encoder_2")
    # 1 is no guidance, as in the README of diffusers' scripts: training targets have none.
    guidance_scale: float | None = 1.0

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        if self.denoiser is None or not self.denoiser.config.guidance_embeds:
            self.guidance_scale = None

    @property
    def has_few_steps(self) -> bool:
        return not self.denoiser.config.guidance_embeds  # schnell

    @property
    def max_sequence_length(self) -> int:
        """Number of tokens to which every prompt is padded, without a mask, from the model cards."""
        return 512 if self.denoiser.config.guidance_embeds else 256

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return arguments with the prompt length of training; the pipeline's default is dev's."""
        return {**super().generation_kwargs(scale), "max_sequence_length": self.max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, pooled_prompt_embeds, _ = self.call_encode_prompt(
            prompts, text_encoder="text_encoder_2", max_sequence_length=self.max_sequence_length
        )
        # (N, tokens, width of T5) and (N, width of CLIP)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        device = latents.device
        guidance = None
        if self.denoiser.config.guidance_embeds:
            assert self.guidance_scale is not None
            guidance = torch.full(timesteps.shape, self.guidance_scale, device=device, dtype=torch.float32)
        prompt_embeds = conditioning["prompt_embeds"].to(latents.dtype)
        return {
            "hidden_states": pack_patches(latents),  # (N, H/2 * W/2, 4C)
            "timestep": timesteps / 1000,
            "guidance": guidance,
            "pooled_projections": conditioning["pooled_prompt_embeds"].to(latents.dtype),
            "encoder_hidden_states": prompt_embeds,
            "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=device),
            "img_ids": patch_positions(latents.shape[-2], latents.shape[-1], device),
        }


class FluxKontextFamily(FluxFamily):
    """Trains `FluxKontextPipeline`, which edits a source image by the prompt.

    Tokens of the source image follow the noisy latents, with 1 as the first number of their position ids. Only the
    noisy latents have a prediction and an error.
    """

    name = "FLUX.1 Kontext"
    takes_source = True

    def size_kwargs(self, height: int, width: int) -> dict[str, Any]:
        """Return the size and the area, without which the pipeline's call scales every size to about 1 megapixel."""
        return {"height": height, "width": width, "max_area": height * width}

    def source_pixels(self, source: Image.Image) -> torch.Tensor:
        height, width = self.source_size(source)
        processor = self.pipeline.image_processor
        return processor.preprocess(processor.resize(source, height, width), height, width)

    def source_size(self, source: Image.Image) -> tuple[int, int]:
        """Return the `(height, width)` that the pipeline gives a source: the Kontext resolution with the nearest
        aspect ratio."""
        height, width = self.pipeline.image_processor.get_default_height_width(source)
        ratio = width / height
        resolutions = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in resolutions)
        multiple = self.vae_scale_factor * self.patch_size
        return height // multiple * multiple, width // multiple * multiple

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        inputs = super().denoiser_inputs(latents, timesteps, conditioning)
        (source,) = self.latents_of_sources(conditioning, latents.dtype)
        positions = patch_positions(source.shape[-2], source.shape[-1], latents.device)
        positions[:, 0] = 1
        tokens = [inputs["hidden_states"], pack_patches(source)]  # tokens of the edited image and of the source
        inputs["hidden_states"] = torch.cat(tokens, dim=1)
        inputs["img_ids"] = torch.cat([inputs["img_ids"], positions])
        return inputs

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return super().prediction_of(output[:, : self.image_seq_len(latents)], latents)
