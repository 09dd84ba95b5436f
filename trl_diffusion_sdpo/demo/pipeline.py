"""The embedded world's tiny `StableDiffusionPipeline`: building, loading and generating images."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, captions

LATENT_SHAPE = (4, 8, 8)
TEXT_LENGTH = 8  # start, five words, end, one unused
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_CHUNK = 256  # images per forward pass


def load_base_pipeline() -> StableDiffusionPipeline:
    """The packaged base model in float32 on the CPU, in evaluation mode, without progress bar and safety checker."""
    return load_pipeline(base_pipeline_folder())


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A model of the demo, as [`load_base_pipeline`]."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def base_pipeline_folder() -> Path:
    """Folder of the packaged base model, in diffusers' layout: weights rounded to bfloat16, stored in float32.

    Raises:
        ValueError: If the installed package lacks the folder.
    """
    folder = Path(str(files(__package__))) / "base"
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"The demo's base model must be in {folder}, but there is no model_index.json. "
            "Reinstall the package, or rebuild it with `python benchmarks/build_demo_base.py`."
        )
    return folder


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The untrained pipeline in float32 on the CPU: 1.8 million parameters, 32 x 32 images, 4 x 8 x 8 latents. Does not
    change the global random state."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, unet, text_encoder = _build_vae(), _build_unet(), _build_text_encoder(tokenizer)
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer with one token for every word of the world, and bytes for any other text.

    The merges follow from the word list: each word in turn is split with the merges so far, then its first two pieces
    are merged until one is left. A later merge has a lower rank, so it cannot split an earlier word.
    """
    words = ["a", "on", *COLOURS, *SHAPES, *BACKGROUNDS]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    characters = _byte_characters()
    tokens = [*characters, *(one + _WORD_END for one in characters), *(a + b for a, b in merges), _START, _END]
    vocab = {token: index for index, token in enumerate(tokens)}
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    return CLIPTokenizer(vocab=vocab, merges=cast(Any, merges), **special, model_max_length=TEXT_LENGTH)


def generate_images(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    latents: torch.Tensor,
    steps: int = 12,
    *,
    guidance_scale: float = 1.0,
    context: Callable[[StableDiffusionPipeline], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> np.ndarray:
    """Generate one image per prompt from given latents by deterministic DDIM.

    Args:
        pipeline (`StableDiffusionPipeline`): Not changed, nor its scheduler.
        prompts (`Sequence[str]` of length N): The prompts.
        latents (`torch.Tensor` of shape `(N, 4, 8, 8)`): Initial latents, standard normal.
        steps (`int`): Number of denoising steps.
        guidance_scale (`float`): Of classifier-free guidance; 1 is none.
        context (`Callable`): Makes a context manager for the pipeline that generates, such as `preference_guidance`.

    Returns:
        `np.ndarray` of shape `(N, 32, 32, 3)`, uint8.

    Raises:
        ValueError: If the numbers of prompts and latents differ, or are 0.
    """
    if len(prompts) != len(latents) or len(prompts) == 0:
        raise ValueError(
            f"Each of one or more prompts needs one latent, got {len(prompts)} prompts and {len(latents)} latents. "
            "`score_prompts` and `score_latents` with the same `n_per_prompt` belong together."
        )
    parts = {**pipeline.components, "scheduler": DDIMScheduler.from_config(pipeline.scheduler.config)}
    sampler = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    sampler.set_progress_bar_config(disable=True)
    latents = latents.to(pipeline.device, pipeline.unet.dtype)
    with context(sampler):
        images = [
            sampler(
                list(prompts[start : start + _CHUNK]),
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                latents=latents[start : start + _CHUNK],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="np",
            ).images
            for start in range(0, len(prompts), _CHUNK)
        ]
    return np.rint(255 * np.concatenate(images)).astype(np.uint8)


def score_prompts(n_per_prompt: int = 3) -> list[str]:
    """Every prompt of the world, `n_per_prompt` times in a row; the prompts of `score_latents`."""
    return [caption.text for caption in captions() for _ in range(n_per_prompt)]


def reported_captions() -> list[bool]:
    """Which of the 72 captions report: on the others, each model's scale of classifier-free guidance is chosen. Half of
    each colour's, every shape and background among them."""
    return [sum(divmod(index, len(SHAPES) * len(BACKGROUNDS))) % 2 == 0 for index in range(len(captions()))]


def score_latents(n_per_prompt: int = 3, seed: int = 0) -> torch.Tensor:
    """Fixed initial latents for `score_prompts`, `(72 * n_per_prompt, 4, 8, 8)` in float32, so that models are compared
    on equal noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(captions()) * n_per_prompt, *LATENT_SHAPE, generator=generator)


def _build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def _build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: merges in order of rank, each from left to right."""
    pieces = [*word[:-1], word[-1] + _WORD_END]
    for pair in merges:
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == pair:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def _byte_characters() -> list[str]:
    """The character of each of the 256 bytes in byte-level BPE; printable bytes are their own characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256, 256 + 256 - len(printable))
    return [chr(code) for code in [*printable, *others]]
