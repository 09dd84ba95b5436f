"""CogView4: a transformer conditioned on a GLM language model and on image sizes, trained by flow matching.

The shift of noise levels grows with the image size. The transformer gets unshifted timesteps.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from ..utils.errors import UserError
from .base import Family, check_in_channels
from .noise import FlowMatchingProcess, TimestepSampling, constant

PATCH_SIZE = 2


class CogView4Process(FlowMatchingProcess):
    """Flow matching that shifts the noise levels, but not the transformer's timesteps.

    The pipeline passes evenly spaced timesteps to its transformer, and its scheduler shifts their noise levels
    depending on the image size. So does the published training. Timesteps here are those of the transformer; their
    noise level depends on the number of image tokens.

    Source: `CogView4Pipeline` and diffusers' `train_control_cogview4.py`.
    """

    def shift_of(self, image_seq_len: int) -> float:
        """Return the shift for images with `image_seq_len` tokens:
        `base_shift + max_shift * sqrt(image_seq_len / base_image_seq_len)`."""
        return self.shifts[0] + self.shifts[1] * math.sqrt(image_seq_len / self.lengths[0])

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        tokens = math.prod(latents.shape[-2:]) // PATCH_SIZE**2
        sigmas = self.sigmas(timesteps, tokens).view(-1, *[1] * (latents.ndim - 1))
        return (1.0 - sigmas) * latents.float() + sigmas * noise.float()

    def sigmas(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        """Return the noise levels at the timesteps for images with `image_seq_len` tokens, `(N,)`, float32 in
        `[0, 1]`."""
        levels = timesteps.float() / self.num_train_timesteps
        factor = self._shift_factor(image_seq_len)
        return factor * levels / (1.0 + (factor - 1.0) * levels)

    def _timesteps_between(
        self, uniform: torch.Tensor, low: int, high: int, sampling: TimestepSampling, image_seq_len: int | None
    ) -> torch.Tensor:
        first, last = (sampling.share_below(end / self.num_train_timesteps) for end in (low, high))
        levels = sampling.quantile(first + uniform.float() * (last - first))
        return (self.num_train_timesteps * levels).clamp(low, high)


class CogView4Family(Family):
    """Trains `CogView4Pipeline`. Refuses transformers of the control pipeline, which need a control image.

    Prompts are padded on the left to the batch's longest one, rounded up to a multiple of 16 tokens, without a mask.
    As in the pipeline, a prompt's embedding therefore depends on the longest prompt of its batch. Only embeddings of
    equal length fit into one batch.
    """

    name = "CogView4"
    frozen_components = ("vae", "text_encoder")
    # Our choice: the attention layers, as in diffusers' LoRA scripts for other models.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    learning_rate_full = 1e-6  # our choice for a large model (6B parameters); no rate is published
    learning_rate_lora = 1e-4  # from diffusers' control script for CogView4, which trains all weights
    noise_process_class = CogView4Process
    patch_size = PATCH_SIZE
    conditional_rows = "all"
    batch_dimensions = {"image_rotary_emb": None}
    prompt_padding = "start"

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)
        patch_size = self.denoiser.config.patch_size
        if patch_size != PATCH_SIZE:
            raise UserError(
                f"A CogView4 transformer must have `patch_size` {PATCH_SIZE}, got {patch_size}. Use a checkpoint of "
                "CogView4."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.call_encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width)

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Return original size, target size and crop as three tensors `(N, 2)`, in float32 because half precision
        would round them."""
        target = constant(tuple(target_size), torch.float32, original_sizes.device)
        return {
            "original_size": original_sizes.float(),
            "target_size": target.expand(len(original_sizes), 2),
            "crop_coords": crop_top_lefts.float(),
        }

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "timestep": timesteps,
            "original_size": conditioning["original_size"],
            "target_size": conditioning["target_size"],
            "crop_coords": conditioning["crop_coords"],
            "image_rotary_emb": self._rotary(latents.shape[-2], latents.shape[-1], latents.device),
        }

    def noise_level_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        tokens = self.image_seq_len(inputs["hidden_states"])
        return self.noise_process.noise_level(self.timesteps_of(inputs), tokens)

    def _rotary(self, height: int, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return the rotary position embeddings for latents of this size, from a cache. The denoiser would compute
        them on the CPU in every prediction, and copy them to the accelerator in every layer."""
        rope: Any = self.denoiser.rope
        kind = (type(rope), rope.dim, rope.patch_size, tuple(rope.rope_axes_dim), rope.theta)
        return _made_rotary(kind, height, width, device)


@lru_cache(maxsize=64)
def _made_rotary(kind: tuple[Any, ...], height: int, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Compute rotary position embeddings with a new module. The denoiser's own may have hooks of DeepSpeed or FSDP,
    and the cache would keep it in memory."""
    rope_class, *settings = kind
    return tuple(part.to(device) for part in rope_class(*settings)(torch.empty(1, 1, height, width)))
