"""Qwen-Image: a transformer over packed latents, conditioned on a vision-language model and trained by flow matching.

The video VAE encodes an image as one frame.
"""

from collections.abc import Mapping
from itertools import cycle
from types import ModuleType
from typing import Any, ClassVar

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from ..utils.errors import UserError
from .base import Family, PromptPadding, channel_statistics, check_in_channels
from .packing import pack_patches, unpack_patches


class QwenImageLatentsFamily(Family):
    """Base class of families with the VAE of Qwen-Image or a similar video VAE.

    Latents have no frame dimension, `(N, C, H, W)`. By default, a token is a square of two by two latents.
    """

    frozen_components = ("vae", "text_encoder")
    # Our choice: half of Stable Diffusion's rate, as larger models need smaller steps.
    learning_rate_full = 1e-6
    patch_size = 2
    conditional_rows = "all"
    prompt_padding: ClassVar[PromptPadding] = "end"
    max_sequence_length = 512  # tokens, the pipeline's default; longer prompts are truncated

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.patch_size**2 * self.pipeline.vae.config.z_dim)

    def vae_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().vae_moments(pixel_values.unsqueeze(2))  # (N, 3, one frame, H, W) to (N, 2C, 1, H/8, W/8)

    def sample_moments(self, moments: torch.Tensor, generator: list[torch.Generator] | None) -> torch.Tensor:
        return super().sample_moments(moments, generator).squeeze(2)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = channel_statistics(self.pipeline.vae, latents)
        return (latents - mean) / std

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return unpack_patches(output, *latents.shape[-2:])

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 * inputs["timestep"]


class QwenImageFamily(QwenImageLatentsFamily):
    """Trains `QwenImagePipeline`.

    Pipelines saved as the image-to-image or inpainting class can be trained too: their transformer is the same.
    Qwen-Image-Layered has another pipeline and cannot.
    """

    name = "Qwen-Image"
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # from diffusers' LoRA script for Qwen-Image
    learning_rate_lora = 1e-4  # from diffusers' script
    # Options of the transformer that only editing or layered models set, or that no pipeline of diffusers supports.
    other_inputs: ClassVar[tuple[str, ...]] = (
        "guidance_embeds",
        "zero_cond_t",
        "use_additional_t_cond",
        "use_layer3d_rope",
    )

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    @property
    def idle_modules(self) -> tuple[str, ...]:
        """Names of the last block's modules for text tokens, whose output nobody uses."""
        last = f"transformer_blocks.{self.denoiser.config.num_layers - 1}"
        return f"{last}.attn.to_add_out", f"{last}.txt_mlp"

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return the guidance scale as `true_cfg_scale`, and a space as negative prompt, as in the model card. Without
        one, the pipeline applies no guidance."""
        guidance = {} if scale is None else {"true_cfg_scale": scale}
        return guidance if scale is not None and scale <= 1 else {**guidance, "negative_prompt": " "}

    def check_pipeline(self) -> None:
        super().check_pipeline()
        others = [name for name in self.other_inputs if self.denoiser.config[name]]
        if others:
            raise UserError(
                f"A transformer of {self.name} must not set {', '.join(others)}, and this one does: it was made for "
                "another pipeline, such as those for editing or for layers. Use a text-to-image checkpoint."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, mask = self.call_encode_prompt(
            prompts, num_images_per_prompt=1, max_sequence_length=self.max_sequence_length
        )
        if mask is None:  # all prompts have the same length
            mask = torch.ones(prompt_embeds.shape[:2], device=self.pipeline.text_encoder.device)
        # (N, tokens of the longest prompt, width) and (N, tokens)
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask.bool()}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        return {
            "hidden_states": pack_patches(latents),  # (N, H/2 * W/2, 4C)
            "timestep": timesteps / 1000,
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "encoder_hidden_states_mask": conditioning["prompt_mask"],
            "img_shapes": [[(1, height // 2, width // 2)]] * len(latents),  # frames, rows and columns of tokens
        }


class QwenImageEditFamily(QwenImageFamily):
    """Trains `QwenImageEditPipeline`, which edits a source image by the prompt.

    The text encoder reads prompt and source image together. In the transformer, source tokens follow the noisy latents,
    and have no prediction or error.
    """

    name = "Qwen-Image-Edit"
    takes_source = True
    other_inputs = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
    pipeline_module: ClassVar[ModuleType] = pipeline_qwenimage_edit
    source_area: ClassVar[int] = 1024 * 1024  # pixels of a source image for the VAE
    read_area: ClassVar[int] = 1024 * 1024  # pixels of a source image for the text encoder

    def encode_edits(self, prompts: list[str], sources: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        """Encode each prompt together with its source images, and the source images to latents."""
        latents = self.encode_sources(sources)
        rows = []
        masks = []
        for prompt, of_pair in zip(prompts, cycle(sources), strict=False):
            embeds, _ = self.call_encode_prompt([prompt], image=self.read_images(of_pair), num_images_per_prompt=1)
            rows.append(embeds[0])
            masks.append(embeds.new_ones(embeds.shape[1], dtype=torch.bool))
        # (N, tokens of the longest prompt with its sources, width) and (N, tokens)
        return latents | {
            "prompt_embeds": pad_sequence(rows, batch_first=True),
            "prompt_mask": pad_sequence(masks, batch_first=True),
        }

    def source_pixels(self, source: Image.Image) -> torch.Tensor:
        width, height = self.resized(source, self.source_area)
        return self.pipeline.image_processor.preprocess(source, height, width)

    def read_images(self, sources: list[Image.Image]) -> list[Image.Image]:
        """Resize source images for the text encoder, as the pipeline does."""
        sizes = [self.resized(source, self.read_area) for source in sources]
        resize = self.pipeline.image_processor.resize
        return [resize(source, height, width) for source, (width, height) in zip(sources, sizes, strict=True)]

    def resized(self, source: Image.Image, area: int) -> tuple[int, int]:
        """Return the width and height of a source image after the pipeline's resizing to `area` pixels."""
        width, height, *_ = self.pipeline_module.calculate_dimensions(area, source.width / source.height)
        return width, height

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        inputs = super().denoiser_inputs(latents, timesteps, conditioning)
        for source in self.latents_of_sources(conditioning, latents.dtype):
            rows, columns = (side // 2 for side in source.shape[-2:])
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], pack_patches(source)], dim=1)
            inputs["img_shapes"] = [[*shapes, (1, rows, columns)] for shapes in inputs["img_shapes"]]
        return inputs

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return super().prediction_of(output[:, : self.image_seq_len(latents)], latents)


class QwenImageEditPlusFamily(QwenImageEditFamily):
    """Trains `QwenImageEditPlusPipeline`, which edits one or several source images."""

    name = "Qwen-Image-Edit-Plus"
    takes_several_sources = True
    pipeline_module = pipeline_qwenimage_edit_plus
    read_area = 384 * 384
