"""Load the tiny `StableDiffusionPipeline` of this package, and generate images with it."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ...models.generation import draw_images, quiet_copy
from .world import BACKGROUNDS, IMAGE_SIZE, SHAPES, captions

LATENT_SHAPE = (4, 8, 8)
_CHUNK = 256  # images per forward pass


def load_base_pipeline() -> StableDiffusionPipeline:
    """Return the packaged base model in float32 on the CPU, without progress bar and safety checker."""
    return load_pipeline(base_pipeline_folder())


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load a pipeline from a folder, such as a tuned model of the demo, in the same way as [`load_base_pipeline`]."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def base_pipeline_folder() -> Path:
    """Return the folder of the packaged base model, which `benchmarks/build_demo_base.py` wrote."""
    return Path(__file__).parent / "base"


def generate_images(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    latents: torch.Tensor,
    steps: int = 12,
    *,
    guidance_scale: float = 1.0,
    context: Callable[[StableDiffusionPipeline], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> np.ndarray:
    """Generate one image per prompt from initial latents, with deterministic DDIM sampling.

    Args:
        pipeline (`StableDiffusionPipeline`): The pipeline. Neither it nor its scheduler is modified.
        prompts (`Sequence[str]` of length N): The prompts.
        latents (`torch.Tensor` of shape `(N, 4, 8, 8)`): Initial latents, drawn from a standard normal distribution.
        steps (`int`): Number of denoising steps.
        guidance_scale (`float`): Scale of classifier-free guidance; 1 turns it off.
        context (`Callable`): Takes the pipeline and returns a context in which to generate images, such as
            `preference_guidance`.

    Returns:
        `np.ndarray` of shape `(N, 32, 32, 3)`, uint8.
    """
    sampler = quiet_copy(pipeline, DDIMScheduler.from_config(pipeline.scheduler.config))
    latents = latents.to(pipeline.device, pipeline.unet.dtype)
    images: list[Any] = []
    with context(sampler):
        for start in range(0, len(prompts), _CHUNK):
            images += draw_images(
                sampler,
                list(prompts[start : start + _CHUNK]),
                latents=latents[start : start + _CHUNK],
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
            )
    return np.stack([np.asarray(image) for image in images])


def score_prompts(n_per_prompt: int = 3) -> list[str]:
    """Return the 72 prompts, each `n_per_prompt` times in a row, in the same order as [`score_latents`]."""
    return [caption.text for caption in captions() for _ in range(n_per_prompt)]


def reported_captions() -> list[bool]:
    """Return, for each of the 72 captions, whether the demo reports scores of its images.

    The others choose each model's scale of classifier-free guidance. Half of each colour's captions are reported, with
    every shape and every background among them.
    """
    return [sum(divmod(index, len(SHAPES) * len(BACKGROUNDS))) % 2 == 0 for index in range(len(captions()))]


def score_latents(n_per_prompt: int = 3, seed: int = 0) -> torch.Tensor:
    """Return initial latents for the prompts of [`score_prompts`], `(72 * n_per_prompt, 4, 8, 8)` in float32, the same
    for all models that are compared."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(captions()) * n_per_prompt, *LATENT_SHAPE, generator=generator)
