"""Random-weight pipelines with a UNet of a given size, and random pairs, for `safeguard_overhead.py`."""

import io
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, Value
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from published_sizes import SD15, SDXL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

UNETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "28m": {
        "sample_size": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (96, 192, 384),
        "layers_per_block": 1,
        "cross_attention_dim": 256,
        "attention_head_dim": 8,
    },
    "sd15": SD15,
    "sdxl": SDXL,
}
XL_TEXT_WIDTHS = (768, 1280)
PROMPT_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def build_pipeline(size: str, latents: int) -> DiffusionPipeline:
    """Build a pipeline with a UNet of the given size, one-layer text encoders and a VAE without downsampling.

    Text encoders and VAE cost almost nothing. Their cost is the same in every mode and would shift the ratios towards
    1.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[size] | {"sample_size": latents})
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    widths = XL_TEXT_WIDTHS if size == "sdxl" else (unet.config.cross_attention_dim,)
    return assemble(unet, vae, [text_config(width) for width in widths])


def assemble(unet: UNet2DConditionModel, vae: AutoencoderKL, texts: list[CLIPTextConfig]) -> DiffusionPipeline:
    """Build a pipeline of Stable Diffusion 1.x, or of SDXL if it has two text encoders."""
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**noise, clip_sample=False, steps_offset=1)
    shared = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": build_tokenizer()}
    shared["text_encoder"] = CLIPTextModel(texts[0])
    if len(texts) == 2:
        second = {"text_encoder_2": CLIPTextModelWithProjection(texts[1]), "tokenizer_2": build_tokenizer()}
        return StableDiffusionXLPipeline(**shared, **second, add_watermarker=False)
    return StableDiffusionPipeline(
        **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def build_tokenizer(size: int = 514) -> CLIPTokenizer:
    """Build a CLIP tokenizer with one token per byte, and unused tokens up to `size`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [*(f"<unused{i}>" for i in range(size - len(tokens) - 2)), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=[],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=PROMPT_TOKENS,
    )


def text_config(width: int, layers: int = 1, widening: int = 1) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=widening * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def random_pairs(count: int, side: int) -> Dataset:
    generator = np.random.default_rng(0)

    def image() -> Image.Image:
        return Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))

    return Dataset.from_list([{"prompt": f"{i}", "chosen": image(), "rejected": image()} for i in range(count)])


def encoded_pairs(count: int, side: int) -> Dataset:
    """Return pairs of JPEG files, as datasets contain them.

    Each image is blurred noise with some grain, which takes as long to decode as a photograph.
    """
    generator = np.random.default_rng(0)

    def image() -> dict[str, bytes]:
        coarse = generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side)), dtype=np.int16)
        grain = generator.integers(-6, 7, (side, side, 1), dtype=np.int16)
        file = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        return {"bytes": file.getvalue()}

    rows = [{"prompt": f"{number}", "chosen": image(), "rejected": image()} for number in range(count)]
    kinds = {"prompt": Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    return Dataset.from_list(rows, features=Features(kinds))
