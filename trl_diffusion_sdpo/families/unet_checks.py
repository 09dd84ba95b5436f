"""Checks of the pipelines that the families of Stable Diffusion and SDXL refuse."""

from typing import Any

from diffusers import DiffusionPipeline


def check_text_to_image_unet(pipeline: DiffusionPipeline) -> None:
    """Refuse UNets that take more than noisy latents and a prompt.

    Raises:
        ValueError: For inpainting, depth or editing UNets (more input channels than latents have), and for UNets
            distilled to take a guidance scale as an input.
    """
    unet: Any = pipeline.unet.config
    channels = pipeline.vae.config.latent_channels
    if unet.in_channels != channels:
        raise ValueError(
            f"A text-to-image UNet takes the VAE's {channels} latent channels, and this one takes "
            f"{unet.in_channels}: it was made for inpainting, depth or editing. Use the text-to-image checkpoint of "
            "the same model."
        )
    if unet.time_cond_proj_dim is not None:
        raise ValueError(
            f"This UNet takes the guidance scale as an input (`time_cond_proj_dim` is {unet.time_cond_proj_dim}): it "
            "was distilled, and preference training would undo that. Use the checkpoint it was distilled from."
        )
