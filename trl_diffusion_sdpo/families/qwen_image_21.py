"""Qwen-Image 2.1: a transformer over one causal sequence of prompt and image tokens, trained by flow matching.

The VAE encodes an alpha channel and compresses 16 times along each side. Each latent is a token.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21TemporalTimesteps
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..utils._compat import forward_pre_hooks
from ..utils.errors import UserError
from .base import PromptPadding
from .qwen_image import QwenImageLatentsFamily

SLOT = 2  # in the text encoder's sequence, one token of an image covers a square of latents with this side
SOURCE_AREA = 1024 * 1024  # pixels of a resized source image


class QwenImage21Family(QwenImageLatentsFamily):
    """Trains `QwenImage21Pipeline`, on prompts alone or with source images.

    Position ids of image tokens start after those of the padded prompt. As in the pipeline, a prediction therefore
    depends on the longest prompt of its batch.

    The model is made for sampling without classifier-free guidance.
    """

    name = "Qwen-Image 2.1"
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")  # our choice, as for Qwen-Image
    learning_rate_lora = 1e-4  # our choice, as for Qwen-Image
    patch_size = 1
    default_resolution = 1024  # default of the pipeline's call; the denoiser's configuration has no image size
    prompt_padding: ClassVar[PromptPadding] = "end, shifting the image"
    may_take_source = True
    takes_several_sources = True

    def prepare_denoiser(self, denoiser: nn.Module) -> None:
        """Keep the timestep's frequencies in float32, as in the model's files. DeepSpeed and
        `pipeline.to(torch.bfloat16)` round them."""
        for module in denoiser.modules():
            if isinstance(module, QwenImage21TemporalTimesteps) and _exact_frequencies not in forward_pre_hooks(
                module
            ):
                module.register_forward_pre_hook(_exact_frequencies)

    def check_image_size(self, height: int, width: int) -> None:
        multiple = SLOT * self.vae_scale_factor
        if height % multiple or width % multiple:
            raise UserError(
                f"The sides of images for {self.name} must be multiples of {multiple} pixels, got {height} x {width}. "
                "Change `resolution`, or `step` of `bucket_kwargs`."
            )

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return the guidance scale as `true_cfg_scale`, and a space as negative prompt. Without one, the pipeline
        applies no guidance."""
        if scale is None:
            return {}
        return {"true_cfg_scale": scale, **({"negative_prompt": " "} if scale > 1 else {})}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, mask, _ = self.call_encode_prompt(prompts)
        if mask is None:  # all prompts have the same length
            mask = prompt_embeds.new_ones(prompt_embeds.shape[:2])
        # (N, tokens of the longest prompt, width) and (N, tokens)
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask.bool()}

    def encode_edits(self, prompts: list[str], sources: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        """Encode each prompt together with its source images, and the source images to latents."""
        latents = self.encode_sources(sources)
        rows = []
        masks = []
        slots = []
        for prompt, of_pair in zip(prompts, cycle(sources), strict=False):
            embeds, _, is_image = self.call_encode_prompt([prompt], image=[self.resized(source) for source in of_pair])
            rows.append(embeds[0])
            masks.append(embeds.new_ones(embeds.shape[1], dtype=torch.bool))
            slots.append(is_image[0])
        # (N, tokens of the longest prompt with its sources, width), and twice (N, tokens)
        return latents | {
            "prompt_embeds": pad_sequence(rows, batch_first=True),
            "prompt_mask": pad_sequence(masks, batch_first=True),
            "image_slots": pad_sequence(slots, batch_first=True),
        }

    def source_pixels(self, source: Image.Image) -> torch.Tensor:
        resized = self.resized(source)
        return self.pipeline.image_processor.preprocess(resized, resized.height, resized.width)

    def resized(self, source: Image.Image) -> Image.Image:
        """Resize a source image for the text encoder and the VAE, as the pipeline does."""
        width, height, _ = pipeline_qwenimage21.calculate_dimensions(SOURCE_AREA, source.width / source.height)
        return self.pipeline.image_processor.resize(source, height, width)

    def vae_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        opaque = torch.ones_like(pixel_values[:, :1])
        return super().vae_moments(torch.cat([pixel_values, opaque], dim=1))  # RGBA

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        mask = conditioning["prompt_mask"]
        slots = conditioning.get("image_slots", torch.zeros_like(mask))
        images = [*self.latents_of_sources(conditioning, latents.dtype), latents]  # the edited image comes last
        return {
            "hidden_states": torch.cat([image.flatten(2).transpose(1, 2) for image in images], dim=1),  # (N, H * W, C)
            "timestep": timesteps / 1000,
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, *image.shape[-2:]) for image in images]] * len(latents),  # frames, rows and columns
            "img_mask": torch.cat([slots, mask.new_ones(len(latents), height * width // SLOT**2)], dim=1),
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        height, width = latents.shape[-2:]
        image = output[:, -height * width :]  # the output of text tokens comes first
        return image.transpose(1, 2).unflatten(2, (height, width))


def _exact_frequencies(module: Any, _: Any) -> None:
    if module.freqs.dtype != torch.float32:
        module.freqs = QwenImage21TemporalTimesteps(module.timestep_dim).freqs.to(module.freqs.device)
