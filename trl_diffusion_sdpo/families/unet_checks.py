"""Checks of UNets, for Stable Diffusion and SDXL."""

from typing import Any

from diffusers import DiffusionPipeline


def check_text_to_image_unet(pipeline: DiffusionPipeline) -> None:
    """Raise an error if a UNet takes more inputs than noisy latents and a prompt.

    Raises:
        ValueError: If the UNet has more input channels than latents have (inpainting, depth, editing), or takes a
            guidance scale as an input (distilled).
    """
    unet: Any = pipeline.unet.config
    channels = pipeline.vae.config.latent_channels
    if unet.in_channels != channels:
        raise ValueError(
            f"A text-to-image UNet has {channels} input channels, the latent channels of its VAE. This UNet has "
            f"{unet.in_channels}, so it was made for inpainting, depth or editing. Use the text-to-image checkpoint "
            "of the same model."
        )
    if unet.time_cond_proj_dim is not None:
        raise ValueError(
            f"This UNet takes the guidance scale as an input (`time_cond_proj_dim` is {unet.time_cond_proj_dim}), so "
            "it was distilled. Preference training would undo the distillation. Use the checkpoint that it was "
            "distilled from."
        )
