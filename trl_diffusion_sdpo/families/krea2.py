"""Krea 2: a transformer over one sequence of prompt and image tokens, trained by flow matching.

It is conditioned on hidden states of several layers of a vision-language model. The video VAE encodes an image as one
frame.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .noise import FlowMatchingProcess
from .packing import pack_patches, patch_positions
from .qwen_image import QwenImageLatentsFamily


class Krea2Family(QwenImageLatentsFamily):
    """Trains `Krea2Pipeline`: Krea 2 Raw or Turbo.

    Turbo is distilled from Raw to generate in about eight steps without guidance. The authors advise to train a LoRA on
    Raw and to load it into Turbo. Here guidance is off at `guidance_scale=0` instead of 1: the pipeline adds the scaled
    guidance to the prediction for the prompt.

    The VAE and the packing into tokens are those of Qwen-Image.
    """

    name = "Krea 2"
    # Attention only, as the authors advise for long trainings. Diffusers' LoRA script also trains other layers.
    lora_target_modules = ("to_q", "to_k", "to_v", "to_gate", "to_out.0")
    learning_rate_lora = 1e-4  # our choice, as for similar transformers; diffusers' script uses 3e-4
    default_resolution = 1024  # default of the pipeline's call; the denoiser's configuration has no image size
    batch_dimensions = {"position_ids": None}

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        if self.has_few_steps:
            assert isinstance(self.noise_process, FlowMatchingProcess)
            self.noise_process.shifts = (1.15, 1.15)  # Turbo's shift does not depend on the image's size

    @property
    def has_few_steps(self) -> bool:
        return self.pipeline.config.is_distilled

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        # Pad to the longest prompt: the pipeline's 512 tokens would take 30 MiB in bfloat16, and the denoiser masks
        # padding anyway.
        pipe = self.pipeline
        before = pipe.prompt_template_encode_start_idx
        after = pipe.prompt_template_encode_num_suffix_tokens
        texts = [pipe.prompt_template_encode_prefix + prompt for prompt in prompts]
        longest = self.max_sequence_length + before - after
        rows = pipe.tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        prompt_embeds, mask = self.call_encode_prompt(
            prompts, max_sequence_length=max(map(len, rows)) - before + after
        )
        # Move the padding from before the template's suffix to the end. Text tokens have no positions, so predictions
        # stay the same.
        order = (~mask).int().argsort(dim=1, stable=True)  # (N, tokens of the longest prompt)
        mask = mask.gather(1, order)
        prompt_embeds = prompt_embeds[torch.arange(len(order), device=order.device)[:, None], order]
        # (N, tokens, layers, width) and (N, tokens)
        return {"prompt_embeds": prompt_embeds * mask[:, :, None, None], "prompt_mask": mask}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        text = conditioning["prompt_embeds"].to(latents.dtype)
        positions = patch_positions(height, width, latents.device)
        return {
            "hidden_states": pack_patches(latents),  # (N, H/2 * W/2, 4C)
            "encoder_hidden_states": text,
            "timestep": timesteps / 1000,
            "position_ids": torch.cat([positions.new_zeros(text.shape[1], 3), positions]),  # 0 for text
            "encoder_attention_mask": conditioning["prompt_mask"],
        }
