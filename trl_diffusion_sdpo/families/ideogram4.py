"""Ideogram 4: a transformer over one sequence of prompt and image tokens, trained by flow matching.

Its time runs from 0 (noise) to 1 (image). A second transformer predicts without a prompt, for classifier-free guidance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    SEQUENCE_PADDING_INDICATOR,
    Ideogram4MRoPE,
)
from torch import nn

from ..utils._compat import forward_pre_hooks
from ..utils.errors import UserError
from .base import PromptPadding
from .flux2 import Flux2LatentsFamily
from .noise import FlowMatchingProcess, TimestepSampling, generators_of, standard_normal

MOST_TOKENS = 2048  # the pipeline's `max_sequence_length`


class Ideogram4Process(FlowMatchingProcess):
    """Flow matching with the noise schedule of Ideogram 4, which is not in the scheduler's configuration.

    The pipeline's noise levels are quantiles of a logit-normal distribution, whose mean grows with the image size.
    Training samples from it by default.
    """

    std = 1.5  # of the logit-normal distribution; default of the pipeline's call

    def shift_of(self, image_seq_len: int) -> float:
        """Return the mean of the logit-normal distribution: `log(pixels / 512^2) / 2 + log(shift)`."""
        return 0.5 * math.log(image_seq_len * 16**2 / 512**2) + math.log(self.fixed_shift)

    def _timesteps_between(
        self, uniform: torch.Tensor, low: int, high: int, sampling: TimestepSampling, image_seq_len: int | None
    ) -> torch.Tensor:
        if image_seq_len is None:
            raise UserError(
                "The schedule of Ideogram 4 needs `image_seq_len`, and it is None. Pass the number of tokens per image."
            )
        total = self.num_train_timesteps
        mean = self.shift_of(image_seq_len)
        ends = torch.tensor([low, high], dtype=torch.float64) / total
        shares = torch.special.ndtr((ends.logit() - mean) / self.std).tolist()
        first, last = (sampling.share_below(share) for share in shares)
        levels = sampling.quantile(first + uniform.float() * (last - first))
        return (total * torch.sigmoid(mean + self.std * torch.special.ndtri(levels))).clamp(low, high)


class Ideogram4Family(Flux2LatentsFamily):
    """Trains the conditional transformer of `Ideogram4Pipeline`.

    Only sample images need the unconditional transformer, which takes as much memory as the trained one's weights. To
    save it, load the pipeline with `unconditional_transformer=None`.

    The authors trained on captions in JSON. The pipeline raises an error for prompts of more than 2048 tokens.
    """

    name = "Ideogram 4"
    frozen_components: tuple[str, ...] = ("vae", "text_encoder", "unconditional_transformer")
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")  # from diffusers' LoRA script
    learning_rate_lora = 1e-4  # from the README of diffusers' script
    default_resolution = 1024  # from the README of diffusers' script; the default of the pipeline's call is 2048
    noise_process_class = Ideogram4Process
    prompt_padding: ClassVar[PromptPadding] = "end"
    conditional_rows = "all"
    unconditional_name = "unconditional_transformer"

    def noise_of(self, seeds: Sequence[int], latents: torch.Tensor) -> torch.Tensor:
        count, channels, *grid = latents.shape
        shape = (count, math.prod(grid), channels)  # the shape in which the pipeline draws noise
        noise = standard_normal(shape, generators_of(seeds), latents.device, latents.dtype)
        return noise.transpose(1, 2).unflatten(2, grid).contiguous()

    def __init__(self, pipeline: DiffusionPipeline):
        if pipeline.unconditional_transformer is None:
            self.frozen_components = ("vae", "text_encoder")
        super().__init__(pipeline)

    def prepare_denoiser(self, denoiser: nn.Module) -> None:
        """Keep the frequencies of positions in float32, as in the model's files. DeepSpeed and
        `pipeline.to(torch.bfloat16)` round them, which gives large positions wrong angles. The same goes for
        the unconditional transformer, which sample images may cast."""
        _keep_frequencies_exact(denoiser)
        if self.pipeline.unconditional_transformer is not None:
            _keep_frequencies_exact(self.pipeline.unconditional_transformer)

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return a constant guidance scale; the pipeline's default is a list for exactly 48 steps."""
        return {"guidance_scale": 7.0 if scale is None else scale, "guidance_schedule": None}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return the hidden states of thirteen layers of the text encoder, concatenated, and the tokens' mask."""
        # Pad to the longest prompt: the pipeline's 2048 tokens would take 208 MiB in bfloat16, and the denoiser masks
        # padding anyway.
        longest = min(max(map(self._token_count, prompts)), MOST_TOKENS)
        prompt_embeds, _, _, indicator = self.call_encode_prompt(
            prompts, grid_h=0, grid_w=0, max_sequence_length=longest
        )
        mask = indicator == LLM_TOKEN_INDICATOR
        # Move the padding from the start to the end. Tokens have position ids, so predictions stay the same.
        order = (~mask).int().argsort(dim=1, stable=True)
        prompt_embeds = prompt_embeds.to(self.pipeline.text_encoder.dtype)  # the text encoder's own dtype
        prompt_embeds = prompt_embeds[torch.arange(len(order), device=order.device)[:, None], order]
        return {
            "prompt_embeds": prompt_embeds,
            "prompt_mask": mask.gather(1, order),
        }  # (N, tokens, width), (N, tokens)

    def _token_count(self, prompt: str) -> int:
        tokenizer = self.pipeline.tokenizer
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def as_squares(self, latents: torch.Tensor) -> torch.Tensor:
        """Reshape latents `(N, C, H, W)` to `(N, 4C, H/2, W/2)`, keeping each latent's C channels together."""
        squares = super().as_squares(latents)
        return squares.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        text = conditioning["prompt_embeds"].to(latents.dtype)
        mask = conditioning["prompt_mask"]
        image = latents.flatten(2).transpose(1, 2)  # (N, H * W, C)
        rows = len(latents)
        words = text.shape[1]
        tokens = image.shape[1]

        grid = torch.cartesian_prod(
            *(torch.arange(length, device=latents.device) for length in (1, *latents.shape[-2:]))
        )
        words_at = torch.arange(words, device=latents.device)[:, None].expand(-1, 3)
        positions = torch.cat([words_at, grid + IMAGE_POSITION_OFFSET]).expand(rows, -1, -1)
        everywhere = mask.new_ones(rows, tokens)
        padding = SEQUENCE_PADDING_INDICATOR
        one = torch.ones_like(mask, dtype=torch.long)
        return {
            "hidden_states": torch.cat([image.new_zeros(rows, words, image.shape[2]), image], dim=1),
            # From 0 (noise) to 1 (image), rounded as in the pipeline.
            "timestep": (1 - timesteps / 1000).to(latents.dtype),
            "encoder_hidden_states": torch.cat([text, text.new_zeros(rows, tokens, text.shape[2])], dim=1),
            "position_ids": positions,
            "segment_ids": torch.cat([torch.where(mask, one, padding), everywhere.long()], dim=1),
            "indicator": torch.cat([LLM_TOKEN_INDICATOR * mask.long(), OUTPUT_IMAGE_INDICATOR * everywhere], dim=1),
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        height, width = latents.shape[-2:]
        image = output[:, -height * width :]  # the output of text tokens comes first
        return -image.transpose(1, 2).unflatten(2, (height, width))  # the transformer predicts image minus noise

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return 1000 * (1 - inputs["timestep"].float())


def _keep_frequencies_exact(denoiser: Any) -> None:
    hook = _ExactFrequencies(denoiser.config.rope_theta)
    for module in denoiser.modules():
        if isinstance(module, Ideogram4MRoPE) and hook not in forward_pre_hooks(module):
            module.register_forward_pre_hook(hook)


@dataclass(frozen=True)
class _ExactFrequencies:
    """Forward pre-hook that recomputes rounded frequencies. Hooks of the same base are equal."""

    base: int

    def __call__(self, module: Any, _: Any) -> None:
        if module.inv_freq.dtype != torch.float32:
            exact = Ideogram4MRoPE(module.head_dim, self.base, module.mrope_section)
            module.inv_freq = exact.inv_freq.to(module.inv_freq.device)
