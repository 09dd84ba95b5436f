"""Small pipelines in which VAE, reference and policy take the same shares of a step's time as at the published size.

Widths and image sides are chosen so that the shares of time on one CPU core are close to the shares of FLOPs at the
published size. SDXL's VAE counts 1.8 times, because it runs in float32 beside a denoiser in half precision.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from published_sizes import SD15, SDXL
from random_pipeline import assemble, text_config

TIME_EMBEDDING = 32  # embedding width of each of SDXL's six size numbers, in the small pipelines
SD_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
THIN = "thin sd15"


@dataclass(frozen=True)
class Proportions:
    """A small pipeline with the proportions of a published one.

    Attributes:
        published (`str`): `"sd15"` or `"sdxl"`.
        unet, vae (`int`): Channels of the first block. Other blocks have the published ratios to it.
        text (`tuple[int, ...]`): Widths of the text encoders. They have two layers, because at the published size
            their cost is negligible.
        pixels (`int`): Side of an image in pixels.
        pairs (`int`): Pairs per step. SDXL has four, so that a step encodes eight images at once, as the cache does,
            and both round equally.
        transformers (`tuple[int, ...]`): Transformer layers in each block, for SDXL.
        layers (`int`): Layers per block.
    """

    published: str
    unet: int
    vae: int
    text: tuple[int, ...]
    pixels: int
    pairs: int = 1
    transformers: tuple[int, ...] = (1, 2, 10)
    layers: int = 2

    def build(self) -> DiffusionPipeline:
        """Build the pipeline with random weights of a fixed seed."""
        torch.manual_seed(0)
        xl = self.published == "sdxl"
        published = SDXL if xl else SD15
        settings = published | {
            "block_out_channels": tuple(self.unet * channels // 320 for channels in published["block_out_channels"]),
            "sample_size": self.pixels // 8,
            "cross_attention_dim": sum(self.text),
            "norm_num_groups": 16,
            "layers_per_block": self.layers,
        }
        if xl:
            pooled = self.text[-1] + 6 * TIME_EMBEDDING
            settings |= {
                "addition_time_embed_dim": TIME_EMBEDDING,
                "projection_class_embeddings_input_dim": pooled,
                "transformer_layers_per_block": self.transformers,
            }
        channels = {"block_out_channels": tuple(self.vae * times for times in (1, 2, 4, 4)), "norm_num_groups": 8}
        texts = [text_config(width, layers=2, widening=4) for width in self.text]
        return assemble(UNet2DConditionModel(**settings), AutoencoderKL(**SD_VAE | channels), texts)


PROPORTIONS = {
    "sd15": Proportions("sd15", unet=64, vae=40, text=(128,), pixels=192),
    # LoRA runs use wider layers on fewer tokens, because in narrow layers a LoRA takes much of the time. Full training
    # does not, because the optimizer would take much of the time here, but takes almost none at the published size.
    "sd15, lora": Proportions("sd15", unet=128, vae=80, text=(128,), pixels=128),
    "sdxl": Proportions("sdxl", unet=64, vae=32, text=(48, 80), pixels=128, pairs=4, transformers=(1, 2, 3)),
    # As many layers as at the published size, with almost no arithmetic in them.
    THIN: Proportions("sd15", unet=32, vae=8, text=(32,), pixels=64),
    "smallest sd15": Proportions("sd15", unet=32, vae=8, text=(32,), pixels=64, layers=1),
    "smallest sdxl": Proportions(
        "sdxl", unet=32, vae=8, text=(32, 32), pixels=64, pairs=4, transformers=(1, 1, 1), layers=1
    ),
}
