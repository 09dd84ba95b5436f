"""Tiny PixArt-Sigma pipeline: PixArt-alpha without a conditioning on sizes, and with SDXL's VAE scaling."""

from diffusers import PixArtSigmaPipeline

from tiny_pipelines import pixart_alpha

RESOLUTION = 16
CALL = pixart_alpha.CALL
SIZES = {"attention_head_dim": 8, "cross_attention_dim": 32, "sample_size": 8, "use_additional_conditions": False}


def build(seed: int = 0) -> PixArtSigmaPipeline:
    return pixart_alpha.build_pixart(PixArtSigmaPipeline, seed, scaling_factor=0.13025, **SIZES)
