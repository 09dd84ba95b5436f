"""PixArt-alpha and PixArt-Sigma: transformers with a T5 text encoder, trained by DDPM.

They differ in prompt length and VAE. Only PixArt-alpha can be conditioned on image sizes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

from ..utils.errors import UserError
from .base import Family
from .loss_defaults import DDPM_DEFAULTS
from .noise import DDPMProcess, constant


class PixArtHooks(Family):
    """Base class of both PixArt families."""

    frozen_components = ("vae", "text_encoder")
    # As in PixArt's own LoRA script: every linear layer of the blocks, and the embeddings of text, timestep, sizes and
    # patches. `proj` matches the patch embedding and the feed-forward layers.
    lora_target_modules = (
        "to_k",
        "to_q",
        "to_v",
        "to_out.0",
        "proj",
        "proj_out",
        "ff.net.2",
        "linear",
        "linear_1",
        "linear_2",
    )
    # Our choice: a tenth of the published 2e-5, which is for less trained weights.
    learning_rate_full = 2e-6
    learning_rate_lora = 1e-4  # our choice: the same as for other models; PixArt's script has 1e-6
    defaults = DDPM_DEFAULTS
    noise_process_class = DDPMProcess
    patch_size = 2

    @property
    def takes_sizes(self) -> bool:
        """Whether the transformer is conditioned on image sizes. If the configuration leaves it open, models for 1024
        pixels are."""
        config = self.denoiser.config
        stated = config.use_additional_conditions
        return config.sample_size == 128 if stated is None else stated

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return arguments that also stop the pipeline from rounding image sizes to a fixed list."""
        return {**super().generation_kwargs(scale), "use_resolution_binning": False}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings of prompts, `(N, tokens, width)`, and their mask, `(N, tokens)`, bool.

        With the packages `bs4` and `ftfy`, prompts are cleaned as in the pipeline's call.
        """
        clean = is_bs4_available() and is_ftfy_available()
        prompt_embeds, mask, _, _ = self.call_encode_prompt(
            prompts, do_classifier_free_guidance=False, num_images_per_prompt=1, clean_caption=clean
        )
        return {"prompt_embeds": prompt_embeds, "prompt_attention_mask": mask.bool()}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditioning["prompt_embeds"].to(latents.dtype),
            "encoder_attention_mask": conditioning["prompt_attention_mask"],
            "timestep": timesteps,
            # Both `None` if the transformer is not conditioned on sizes.
            "added_cond_kwargs": {name: conditioning.get(name) for name in ("resolution", "aspect_ratio")},
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return output[:, : latents.shape[1]]  # drop the learned variance, if there is one


class PixArtAlphaFamily(PixArtHooks):
    """Trains `PixArtAlphaPipeline`, with or without conditioning on image sizes. Prompts are truncated to 120 tokens.

    Source of the conditioning on sizes: https://huggingface.co/papers/2310.00426.
    """

    name = "PixArt-alpha"

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Return height and width of the training images, `(N, 2)`, and height divided by width, `(N, 1)`, in float32.

        Empty if the transformer is not conditioned on image sizes. As in the pipeline and PixArt's LoRA script, sizes
        are those after resizing and cropping.
        """
        if not self.takes_sizes:
            return {}
        height, width = target_size
        n = len(original_sizes)
        device = original_sizes.device
        resolution = constant((height, width), torch.float32, device)
        aspect_ratio = constant((height / width,), torch.float32, device)
        return {"resolution": resolution.repeat(n, 1), "aspect_ratio": aspect_ratio.repeat(n, 1)}


class PixArtSigmaFamily(PixArtHooks):
    """Trains `PixArtSigmaPipeline`. Prompts are truncated to 300 tokens.

    Source: https://huggingface.co/papers/2403.04692.
    """

    name = "PixArt-Sigma"

    def check_pipeline(self) -> None:
        super().check_pipeline()
        if self.takes_sizes:
            raise UserError(
                "A PixArt-Sigma transformer is not conditioned on image sizes (`use_additional_conditions=False`), "
                "but this transformer is, like that of PixArt-alpha for 1024 pixels. Load the model as a "
                "PixArtAlphaPipeline."
            )
