"""Qwen-Image: a transformer over packed latents, conditioned on the tokens of a vision-language model, over flow
matching; its VAE is one of videos."""

from collections.abc import Mapping
from typing import Any

import torch

from .base import FLOW_DEFAULTS, Family, check_in_channels, constant, no_autocast
from .noise import FlowMatchingProcess
from .packing import pack_patches, unpack_patches

# Of transformers that edit or draw in layers, or that no pipeline of diffusers can call.
_OTHER_INPUTS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenImageFamily(Family):
    """`QwenImagePipeline`, and folders of its image-to-image and inpainting classes, which hold the same transformer.
    Those of Qwen-Image-Edit and Qwen-Image-Layered, which take further images, are other pipelines.

    An image is a video of one frame to the VAE; latents here are without that frame, `(N, C, H, W)`.
    """

    name = "Qwen-Image"
    pipeline_classes = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # as diffusers' own LoRA script for Qwen-Image
    # Our choice: half of Stable Diffusion's, because weights of a larger model bear smaller steps.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # as diffusers' script
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    patch_size = 2
    max_sequence_length = 512  # of a prompt, in tokens, as the pipeline's own call; longer ones are cut

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    @property
    def idle_modules(self) -> tuple[str, ...]:
        """The last block's text side: only the image is read after it."""
        last = f"transformer_blocks.{self.denoiser.config.num_layers - 1}"
        return f"{last}.attn.to_add_out", f"{last}.txt_mlp"

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """The scale, and the space that the model card gives as negative prompt: without one there is no guidance."""
        own = {} if scale is None else {"true_cfg_scale": scale}
        return own if scale is not None and scale <= 1 else {**own, "negative_prompt": " "}

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, 4 * self.pipeline.vae.config.z_dim)  # two by two latents per token
        others = [name for name in _OTHER_INPUTS if self.denoiser.config[name]]
        if others:
            raise ValueError(
                f"A text-to-image Qwen-Image transformer takes a prompt and latents, and this one has "
                f"{', '.join(others)}: it was made for editing or for layers. Use Qwen-Image."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with no_autocast(device):
            prompt_embeds, mask = self.pipeline.encode_prompt(
                prompts, device=device, num_images_per_prompt=1, max_sequence_length=self.max_sequence_length
            )
        if mask is None:  # the pipeline's word for prompts of one length
            mask = torch.ones(prompt_embeds.shape[:2], device=device)
        # (N, tokens of the longest prompt, width) and (N, tokens)
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask.bool()}

    def vae_latents(self, pixel_values: torch.Tensor, generator: list[torch.Generator] | None) -> torch.Tensor:
        video = pixel_values.unsqueeze(2)  # (N, 3, one frame, H, W)
        return super().vae_latents(video, generator).squeeze(2)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        stated = (tuple(config.latents_mean), tuple(config.latents_std))
        mean, std = (constant(v, latents.dtype, latents.device).view(1, -1, 1, 1) for v in stated)
        return (latents - mean) / std

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        dtype = self.dtype
        height, width = noisy_latents.shape[-2:]
        tokens = denoiser(
            hidden_states=pack_patches(noisy_latents.to(dtype)),  # (N, H/2 * W/2, 4C)
            timestep=timesteps / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=conditioning["prompt_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy_latents),  # frames, rows and columns of tokens
            return_dict=False,
        )[0]
        return unpack_patches(tokens, height, width)
