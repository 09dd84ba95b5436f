"""Small pipelines in which VAE, reference and policy take the same shares of a step's time as at the published size.

Widths and image sides are chosen so that the shares on one CPU core are close to `true_shares`. These are shares of
FLOPs, except for SDXL's VAE in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from published_flops import PASSES, published_flops
from published_sizes import SD15, SDXL
from random_pipeline import START, build_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

TIME_EMBEDDING = 32  # embedding width of each of SDXL's six size numbers, in the small pipelines
SD_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
THIN, XL_HALF = "thin sd15", "sdxl, VAE in half precision"
# Seconds to encode an image of 1024 by 1024 on one RTX 4090: SDXL's VAE in float32, and SD1.5's, which has the same
# layers, in half precision. Source: https://huggingface.co/docs/diffusers/hybrid_inference/vae_encode
FLOAT32_VAE = 0.142 / 0.078
PARTS = ("VAE", "text encoders", "reference", "policy")


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
        settings = (SDXL if xl else SD15) | {
            "block_out_channels": tuple(
                self.unet * channels // 320 for channels in published_channels(self.published)
            ),
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
        shared = {
            "unet": UNet2DConditionModel(**settings),
            "vae": AutoencoderKL(**SD_VAE | channels),
            "scheduler": DDPMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
            "tokenizer": build_tokenizer(),
        }
        if xl:
            encoders = {
                "text_encoder": CLIPTextModel(small_clip(self.text[0])),
                "text_encoder_2": CLIPTextModelWithProjection(small_clip(self.text[1])),
                "tokenizer_2": build_tokenizer(),
            }
            return StableDiffusionXLPipeline(**shared, **encoders, add_watermarker=False)
        return StableDiffusionPipeline(
            **shared,
            text_encoder=CLIPTextModel(small_clip(self.text[0])),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


PROPORTIONS = {
    "sd15": Proportions("sd15", unet=64, vae=40, text=(128,), pixels=192),
    # LoRA runs use wider layers on fewer tokens, because in narrow layers a LoRA takes much of the time. Full training
    # does not, because the optimizer would take much of the time here, but takes almost none at the published size.
    "sd15, lora": Proportions("sd15", unet=128, vae=80, text=(128,), pixels=128),
    "sdxl": Proportions("sdxl", unet=64, vae=32, text=(48, 80), pixels=128, pairs=4, transformers=(1, 2, 3)),
    # As many layers as at the published size, with almost no arithmetic in them.
    THIN: Proportions("sd15", unet=32, vae=8, text=(32,), pixels=64),
    XL_HALF: Proportions("sdxl", unet=64, vae=24, text=(48, 80), pixels=128, pairs=4, transformers=(1, 2, 4)),
    # For `--quick`: fewer tokens.
    "quick sd15, full": Proportions("sd15", unet=64, vae=40, text=(128,), pixels=128),
    "quick sd15, lora": Proportions("sd15", unet=128, vae=80, text=(128,), pixels=64),
    "quick sdxl, full": Proportions(
        "sdxl", unet=64, vae=32, text=(48, 80), pixels=128, pairs=2, transformers=(1, 2, 3)
    ),
    "smallest sd15": Proportions("sd15", unet=32, vae=8, text=(32,), pixels=64, layers=1),
    "smallest sdxl": Proportions(
        "sdxl", unet=32, vae=8, text=(32, 32), pixels=64, pairs=4, transformers=(1, 1, 1), layers=1
    ),
}


def published_channels(published: str) -> tuple[int, ...]:
    """Return the channels of each block of a published UNet."""
    return (SDXL if published == "sdxl" else SD15)["block_out_channels"]


def small_clip(width: int) -> CLIPTextConfig:
    tokenizer = build_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.convert_tokens_to_ids(START),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def true_shares(published: str, tuning: str) -> dict[str, float]:
    """Return the share of each part of a step in the FLOPs of one pair at the published size.

    SDXL's VAE counts by time, because it runs in float32 next to a denoiser in half precision. There are no shares for
    `THIN`.
    """
    if published == THIN:
        return {}
    flops = published_flops()[PROPORTIONS[published].published]
    of_parts = {
        "VAE": 2 * flops["vae"] * (FLOAT32_VAE if published == "sdxl" else 1),
        "text encoders": flops["text"],  # both images of a pair have one prompt
        "reference": 2 * flops["denoiser"],
        "policy": 2 * flops["denoiser"] * PASSES[tuning],
    }
    return {part: cost / sum(of_parts.values()) for part, cost in of_parts.items()}
