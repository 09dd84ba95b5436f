"""CogView4: a transformer conditioned on a GLM language model and on image sizes, over flow matching with a shift that
grows with the image. The transformer's timesteps are those before the shift."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from .base import Family, check_in_channels
from .loss_defaults import FLOW_DEFAULTS
from .noise import FlowMatchingProcess, constant
from .timestep_sampling import TimestepSampling

PATCH_SIZE = 2


class CogView4Process(FlowMatchingProcess):
    """Flow matching with timesteps *before* the shift, and noise levels after it.

    The pipeline gives its transformer evenly spaced timesteps, and its scheduler the same levels shifted by the size of
    the image; so does the published training. Timesteps here are those of the transformer. Their noise levels depend on
    an image's number of tokens.

    Source: `CogView4Pipeline` and diffusers' `train_control_cogview4.py`.
    """

    def shift_of(self, image_seq_len: int) -> float:
        """`base_shift`, and `max_shift` times the side of the image in units of `base_image_seq_len`'s side."""
        return self.shifts[0] + self.shifts[1] * math.sqrt(image_seq_len / self.lengths[0])

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        tokens = math.prod(latents.shape[-2:]) // PATCH_SIZE**2
        sigmas = self.sigmas(timesteps, tokens).view(-1, *[1] * (latents.ndim - 1))
        return (1.0 - sigmas) * latents.float() + sigmas * noise.float()

    def sigmas(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        """Share of noise at the timesteps, `(N,)`, float32 in `[0, 1]`, for images with this number of tokens.

        Raises:
            ValueError: If `image_seq_len` is needed and `None`.
        """
        levels, factor = timesteps.float() / self.num_train_timesteps, self._shift_factor(image_seq_len)
        return factor * levels / (1.0 + (factor - 1.0) * levels)

    def _timesteps_between(
        self, uniform: torch.Tensor, low: int, high: int, sampling: TimestepSampling, image_seq_len: int | None
    ) -> torch.Tensor:
        first, last = (sampling.share_below(end / self.num_train_timesteps) for end in (low, high))
        levels = sampling.quantile(first + uniform.float() * (last - first))
        return (self.num_train_timesteps * levels).clamp(low, high)


class CogView4Family(Family):
    """`CogView4Pipeline`; transformers of the control pipeline, which take a control image, are refused.

    The prompts of a call are padded on the left to the length of the longest, rounded up to 16, without a mask. As in
    the pipeline, a prompt's embedding depends on the longest prompt of its batch; only prompts of one length can be
    joined row by row.
    """

    name = "CogView4"
    pipeline_classes = ("CogView4Pipeline",)
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    # Our choice, as diffusers' script for CogView4 trains all weights: the attention targets of its LoRA scripts.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    learning_rate_full = 1e-6  # our choice: no number is published, and the model is large (6B)
    learning_rate_lora = 1e-4  # as diffusers' script for control, over all weights
    defaults = FLOW_DEFAULTS
    noise_process_class = CogView4Process
    patch_size = PATCH_SIZE
    conditional_rows = "all"
    shared_inputs = ("image_rotary_emb",)
    prompt_padding = "start"

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)
        patch_size = self.denoiser.config.patch_size
        if patch_size != PATCH_SIZE:
            raise ValueError(
                f"A CogView4 transformer makes a token of {PATCH_SIZE} by {PATCH_SIZE} latents, and this one of "
                f"{patch_size} by {patch_size}. Use a checkpoint of CogView4."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, _ = self.call_encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width)

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Three tensors of shape `(N, 2)`, float32. Half precision would round sizes."""
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
        """Cached rotary positions for a size of latents. The denoiser would compute them on the CPU in every prediction
        and copy them to the accelerator in every layer."""
        rope: Any = self.denoiser.rope
        kind = (type(rope), rope.dim, rope.patch_size, tuple(rope.rope_axes_dim), rope.theta)
        return _made_rotary(kind, height, width, device)


@lru_cache(maxsize=64)
def _made_rotary(kind: tuple[Any, ...], height: int, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Computed by a new module: that of the denoiser may have an engine's hooks, and the cache would keep it alive."""
    rope_class, *settings = kind
    return tuple(part.to(device) for part in rope_class(*settings)(torch.empty(1, 1, height, width)))
