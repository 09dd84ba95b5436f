"""Check the UNets of Stable Diffusion and SDXL pipelines."""

from typing import Any

from diffusers import DiffusionPipeline

from ..utils.errors import UserError


def check_text_to_image_unet(pipeline: DiffusionPipeline) -> None:
    """Raise `ValueError` if a pipeline's UNet needs more than noisy latents, timesteps and prompts. UNets for
    inpainting, depth or editing need more input channels, and distilled UNets a guidance scale."""
    unet: Any = pipeline.unet.config
    channels = pipeline.vae.config.latent_channels
    if unet.in_channels != channels:
        raise UserError(
            f"A text-to-image UNet must have {channels} input channels, the latent channels of its VAE. This one has "
            f"{unet.in_channels}, so it was made for inpainting, depth or editing. Use the text-to-image checkpoint of "
            "the same model."
        )
    if unet.time_cond_proj_dim is not None:
        raise UserError(
            "A UNet must not take the guidance scale as an input, and this one does (`time_cond_proj_dim` is "
            f"{unet.time_cond_proj_dim}). It was distilled, and preference training would undo that. Use the "
            "checkpoint from which it was distilled."
        )
