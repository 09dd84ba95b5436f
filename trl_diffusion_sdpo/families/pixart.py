"""PixArt-alpha and PixArt-Sigma: transformers conditioned on a T5 text encoder, over a DDPM noise process. They differ
in the length of the text, in alpha's conditioning on image sizes and in the VAE."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from .base import DDPM_DEFAULTS, Family, constant, no_autocast
from .noise import DDPMProcess

# As PixArt's own LoRA script, which is written with diffusers (diffusers has none): every linear layer of the blocks,
# and the embeddings of text, timestep, sizes and patches. `proj` is that of the patches and of the feed-forwards.
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "proj", "proj_out", "ff.net.2", "linear", "linear_1", "linear_2")
# Our choice: a tenth of the 2e-5 of the published training configurations, which begin much further from the end.
LEARNING_RATE_FULL = 2e-6
LEARNING_RATE_LORA = 1e-4  # our choice, as for the other families; PixArt's script leaves it at 1e-6


class PixArtAlphaFamily(Family):
    """`PixArtAlphaPipeline`, with and without conditioning on sizes; prompts are cut at 120 tokens, as there.

    Source of the conditioning on sizes: https://huggingface.co/papers/2310.00426.
    """

    name = "PixArt-alpha"
    pipeline_classes = ("PixArtAlphaPipeline",)
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = LORA_TARGETS
    learning_rate_full = LEARNING_RATE_FULL
    learning_rate_lora = LEARNING_RATE_LORA
    defaults = DDPM_DEFAULTS
    noise_process_class = DDPMProcess
    patch_size = 2

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """The scale, and images of the size that is asked for, not of the nearest in the pipeline's list."""
        return {**super().generation_kwargs(scale), "use_resolution_binning": False}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return encode_with_mask(self.pipeline, prompts)

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """The size of the training images `(N, 2)` and height by width `(N, 1)`, float32; empty for transformers that
        take no sizes. The pipeline conditions on the size that it draws, and PixArt's LoRA script on the same."""
        if not takes_sizes(self.denoiser):
            return {}
        height, width = target_size
        n, device = len(original_sizes), original_sizes.device
        resolution = constant((height, width), torch.float32, device)
        aspect_ratio = constant((height / width,), torch.float32, device)
        return {"resolution": resolution.repeat(n, 1), "aspect_ratio": aspect_ratio.repeat(n, 1)}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        return predict_without_variance(denoiser, noisy_latents, timesteps, conditioning, self.dtype)


class PixArtSigmaFamily(Family):
    """`PixArtSigmaPipeline`; prompts are cut at 300 tokens, as there.

    Source: https://huggingface.co/papers/2403.04692.
    """

    name = "PixArt-Sigma"
    pipeline_classes = ("PixArtSigmaPipeline",)
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = LORA_TARGETS
    learning_rate_full = LEARNING_RATE_FULL
    learning_rate_lora = LEARNING_RATE_LORA
    defaults = DDPM_DEFAULTS
    noise_process_class = DDPMProcess
    patch_size = 2

    def check_pipeline(self) -> None:
        super().check_pipeline()
        if takes_sizes(self.denoiser):
            raise ValueError(
                "A PixArt-Sigma transformer takes no image sizes (`use_additional_conditions=False`), and this one "
                "does, as PixArt-alpha's for 1024 pixels: the pipeline gives it none. Load it as PixArtAlphaPipeline."
            )

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """The scale, and images of the size that is asked for, not of the nearest in the pipeline's list."""
        return {**super().generation_kwargs(scale), "use_resolution_binning": False}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return encode_with_mask(self.pipeline, prompts)

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        return predict_without_variance(denoiser, noisy_latents, timesteps, conditioning, self.dtype)


def takes_sizes(transformer: torch.nn.Module) -> bool:
    """Whether a PixArt transformer is conditioned on sizes; where its configuration is silent, 1024 pixels decide."""
    stated = transformer.config.use_additional_conditions
    return transformer.config.sample_size == 128 if stated is None else stated


def encode_with_mask(pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Embeddings `(N, tokens, width)` and which tokens are text `(N, tokens)`, bool. Prompts are cleaned as the
    pipeline's own call cleans them by default: where the packages for it are installed."""
    device = pipeline.text_encoder.device
    with no_autocast(device):
        prompt_embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            num_images_per_prompt=1,
            device=device,
            clean_caption=is_bs4_available() and is_ftfy_available(),
        )
    return {"prompt_embeds": prompt_embeds, "prompt_attention_mask": mask.bool()}


def predict_without_variance(
    denoiser: torch.nn.Module,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The prediction without the learned variance, where the transformer answers with twice the latents' channels."""
    output = denoiser(
        noisy_latents.to(dtype),
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        encoder_attention_mask=conditioning["prompt_attention_mask"],
        timestep=timesteps,
        added_cond_kwargs={name: conditioning.get(name) for name in ("resolution", "aspect_ratio")},
        return_dict=False,
    )[0]
    return output[:, : noisy_latents.shape[1]]
