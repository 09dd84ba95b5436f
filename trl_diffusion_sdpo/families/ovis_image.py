"""Ovis-Image: a transformer over packed latents, conditioned on the tokens of a Qwen3 language model, over flow
matching."""

from collections.abc import Mapping

import torch

from .base import FLOW_DEFAULTS, Family, check_in_channels, no_autocast
from .noise import FlowMatchingProcess
from .packing import TWO_STREAM_TARGETS, pack_patches, patch_positions, unpack_patches


class OvisImageFamily(Family):
    """`OvisImagePipeline`. A prompt is padded with zeros to one length, all of which the transformer sees."""

    name = "Ovis-Image"
    pipeline_classes = ("OvisImagePipeline",)
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    # Our choice, because diffusers has no script for it: what its LoRA script for FLUX takes, whose blocks these are.
    lora_target_modules = TWO_STREAM_TARGETS
    # Our choice: half of Stable Diffusion's, because weights of a larger model bear smaller steps.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # as diffusers' scripts for its kin
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    patch_size = 2

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, 4 * self.pipeline.vae.config.latent_channels)  # two by two latents per token

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with no_autocast(device):
            prompt_embeds = self.pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, device=device, num_images_per_prompt=1
            )[0]
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width)

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        dtype, device = self.dtype, noisy_latents.device
        height, width = noisy_latents.shape[-2:]
        prompt_embeds = conditioning["prompt_embeds"].to(dtype)
        tokens = denoiser(
            hidden_states=pack_patches(noisy_latents.to(dtype)),  # (N, H/2 * W/2, 4C)
            timestep=timesteps / 1000,
            encoder_hidden_states=prompt_embeds,
            txt_ids=_text_positions(prompt_embeds.shape[1], device),
            img_ids=patch_positions(height, width, device),
            return_dict=False,
        )[0]
        return unpack_patches(tokens, height, width)


def _text_positions(length: int, device: torch.device) -> torch.Tensor:
    """Position ids `(length, 3)` of text, float32: zero, and the token's number as row and as column."""
    numbers = torch.arange(length, device=device, dtype=torch.float32)
    return torch.stack([torch.zeros_like(numbers), numbers, numbers], dim=1)
