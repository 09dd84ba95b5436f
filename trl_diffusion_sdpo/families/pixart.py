"""PixArt-alpha and PixArt-Sigma: transformers conditioned on a T5 text encoder, over a DDPM noise process. They differ
in the length of prompts, in alpha's conditioning on image sizes and in the VAE."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

from .base import Family
from .loss_defaults import DDPM_DEFAULTS
from .noise import DDPMProcess, constant


class PixArtHooks(Family):
    """Settings and hooks that both families share."""

    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    # As PixArt's LoRA script (diffusers has none): every linear layer of the blocks, and the embeddings of text,
    # timestep, sizes and patches. `proj` is the projection of patches and of feed-forward layers.
    lora_target_modules = (
        *("to_k", "to_q", "to_v", "to_out.0", "proj", "proj_out", "ff.net.2", "linear", "linear_1", "linear_2"),
    )
    # Our choice: a tenth of the 2e-5 of the published training configurations, which begin from less trained weights.
    learning_rate_full = 2e-6
    learning_rate_lora = 1e-4  # our choice, as for other families; the default of PixArt's script is 1e-6
    defaults = DDPM_DEFAULTS
    noise_process_class = DDPMProcess
    patch_size = 2

    @property
    def takes_sizes(self) -> bool:
        """Whether the transformer is conditioned on sizes: by default if it is for 1024 pixels, as in diffusers."""
        config = self.denoiser.config
        stated = config.use_additional_conditions
        return config.sample_size == 128 if stated is None else stated

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """The scale, and images of the requested size instead of the nearest in the pipeline's list."""
        return {**super().generation_kwargs(scale), "use_resolution_binning": False}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings `(N, tokens, width)` and their mask `(N, tokens)`, bool. Prompts are cleaned as by default in the
        pipeline's call, if the packages for it are installed."""
        clean = is_bs4_available() and is_ftfy_available()
        prompt_embeds, mask, _, _ = self.call_encode_prompt(
            prompts, do_classifier_free_guidance=False, num_images_per_prompt=1, clean_caption=clean
        )
        return {"prompt_embeds": prompt_embeds, "prompt_attention_mask": mask.bool()}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Sizes are `None` where the transformer takes none."""
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "encoder_attention_mask": conditioning["prompt_attention_mask"],
            "timestep": timesteps,
            "added_cond_kwargs": {name: conditioning.get(name) for name in ("resolution", "aspect_ratio")},
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return output[:, : latents.shape[1]]  # without the learned variance, in the other half of the channels if any


class PixArtAlphaFamily(PixArtHooks):
    """`PixArtAlphaPipeline`, with and without conditioning on sizes; prompts are truncated at 120 tokens, as there.

    Source of the conditioning on sizes: https://huggingface.co/papers/2310.00426.
    """

    name = "PixArt-alpha"
    pipeline_classes = ("PixArtAlphaPipeline",)

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """The size of the training images `(N, 2)` and height divided by width `(N, 1)`, float32; empty if the
        transformer takes no sizes. The pipeline conditions on the size that it generates, and PixArt's LoRA script
        likewise."""
        if not self.takes_sizes:
            return {}
        height, width = target_size
        n, device = len(original_sizes), original_sizes.device
        resolution = constant((height, width), torch.float32, device)
        aspect_ratio = constant((height / width,), torch.float32, device)
        return {"resolution": resolution.repeat(n, 1), "aspect_ratio": aspect_ratio.repeat(n, 1)}


class PixArtSigmaFamily(PixArtHooks):
    """`PixArtSigmaPipeline`; prompts are truncated at 300 tokens, as there.

    Source: https://huggingface.co/papers/2403.04692.
    """

    name = "PixArt-Sigma"
    pipeline_classes = ("PixArtSigmaPipeline",)

    def check_pipeline(self) -> None:
        super().check_pipeline()
        if self.takes_sizes:
            raise ValueError(
                "A PixArt-Sigma transformer takes no image sizes (`use_additional_conditions=False`), and this one "
                "does, as PixArt-alpha's for 1024 pixels: the pipeline gives it none. Load it as PixArtAlphaPipeline."
            )
