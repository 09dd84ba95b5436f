"""The kinds of pairs that the studies train on. A plan or a row names one as its `pairs`.

`off_policy` pairs are the demo's. `on_policy` pairs are two images of the base model, ranked by the oracle. The winners
of the aligned kinds (`blurred`, `partial`, `local`) are those of the off-policy pairs, and each loser is made from its
winner. `corner` and `strange_corner` pairs differ in one corner only, for the study of masks.
"""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image as PILImage
from PIL import ImageFilter

from trl_diffusion_sdpo.tools.demo.oracle import oracle_score
from trl_diffusion_sdpo.tools.demo.pairs import off_policy_pairs
from trl_diffusion_sdpo.tools.demo.pipeline import LATENT_SHAPE, generate_images
from trl_diffusion_sdpo.tools.demo.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, captions, imperfect_render

BLUR = 2.0  # standard deviation in pixels
STRENGTH = 0.6  # share of the sampler's steps by which a loser is re-noised
STEPS = 20
GUIDANCE = 3.0
MARGIN = 0.05  # on-policy pairs are dropped if the scores of the two images differ by at most this much
ON_POLICY_SEED = 500_000
BOX = (12, 20)  # sides of a restored region in pixels
CORNER = slice(IMAGE_SIZE - 8, IMAGE_SIZE)
CORNER_COLOUR = np.rint(255 * np.array(COLOURS["red"])).astype(np.uint8)


def pairs_of_kind(kind: str, pipeline: StableDiffusionPipeline, seed: int, per_prompt: int) -> Dataset:
    """Return pairs of a kind, with a `mask` column if they differ in a region."""
    if kind == "off_policy":
        return off_policy_pairs(seed, per_prompt)
    if kind == "on_policy":
        return _on_policy_pairs(pipeline, seed, per_prompt)
    generator = np.random.default_rng([3, seed])
    if kind in ("corner", "strange_corner"):
        return _corner_pairs(generator, per_prompt, strange=kind == "strange_corner")
    winners = off_policy_pairs(seed, per_prompt).select_columns(["prompt", "chosen"])
    prompts = list(winners["prompt"])
    chosen = np.stack([np.asarray(image) for image in winners["chosen"]])
    masks = None
    if kind == "blurred":
        blur = ImageFilter.GaussianBlur(BLUR)
        rejected = np.stack([np.asarray(PILImage.fromarray(image).filter(blur)) for image in chosen])
    else:
        if kind not in ("partial", "local"):
            raise ValueError(f"`pairs` must be a kind of pairs that `pairs_of_kind` makes; got {kind!r}.")
        masks = np.full(chosen.shape[:3], kind == "partial")
        if kind == "local":
            for mask in masks:
                height, width = generator.integers(*BOX, size=2, endpoint=True)
                top, left = generator.integers(0, [IMAGE_SIZE - height, IMAGE_SIZE - width], endpoint=True)
                mask[top : top + height, left : left + width] = True
        rejected = _restored(pipeline, prompts, chosen, masks, seed)
    return _dataset(prompts, chosen, rejected, masks if kind == "local" else None)


def single_images(pairs: Dataset) -> Dataset:
    """Return the images of pairs as rows of their own, each liked or disliked."""
    rows = [pairs.select_columns(["prompt", side]).rename_column(side, "image") for side in ("chosen", "rejected")]
    labelled = [each.add_column("label", [liked] * len(each)) for each, liked in zip(rows, (True, False), strict=True)]
    return concatenate_datasets(labelled)


@torch.no_grad()
def _on_policy_pairs(pipeline: StableDiffusionPipeline, seed: int, per_prompt: int) -> Dataset:
    """Return pairs of two images that the model generates for a prompt. The oracle decides which one is chosen."""
    prompts = [caption.text for caption in captions() for _ in range(per_prompt)]
    latents = torch.randn(
        2, len(prompts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(ON_POLICY_SEED + seed)
    )
    pairs = [generate_images(pipeline, prompts, noise, guidance_scale=GUIDANCE) for noise in latents]
    scores = np.stack([oracle_score(images, prompts) for images in pairs])
    clear = np.abs(scores[0] - scores[1]) > MARGIN
    first = (scores[0] > scores[1])[:, None, None, None]
    chosen = np.where(first, *pairs)[clear]
    rejected = np.where(first, *pairs[::-1])[clear]
    return _dataset([prompt for prompt, shown in zip(prompts, clear, strict=True) if shown], chosen, rejected, None)


def _corner_pairs(generator: np.random.Generator, per_prompt: int, *, strange: bool) -> Dataset:
    """Return pairs of one drawing with and without a red corner. Its mask is the corner.

    The drawings are those of the world. If `strange`, all of them are on another background than the prompt says.
    """
    shown = [caption for caption in captions() for _ in range(per_prompt)]
    names = list(BACKGROUNDS)
    after = dict(zip(names, names[1:] + names[:1], strict=True))
    drawn = [replace(caption, background=after[caption.background]) if strange else caption for caption in shown]
    rejected = np.stack([imperfect_render(caption, generator) for caption in drawn])
    backgrounds = np.array([BACKGROUNDS[caption.background] for caption in drawn])
    rejected[:, CORNER, CORNER] = np.rint(255 * backgrounds)[:, None, None]
    chosen = rejected.copy()
    chosen[:, CORNER, CORNER] = CORNER_COLOUR
    masks = np.zeros(chosen.shape[:3], dtype=bool)
    masks[:, CORNER, CORNER] = True
    return _dataset([caption.text for caption in shown], chosen, rejected, masks)


@torch.no_grad()
def _restored(
    pipeline: StableDiffusionPipeline, prompts: list[str], images: np.ndarray, masks: np.ndarray, seed: int
) -> np.ndarray:
    """Re-noise the regions of images `(N, 32, 32, 3)`, and let the frozen base denoise them. The rest is kept."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps[-round(STRENGTH * STEPS) :]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    clean = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    region = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(masks).float().unsqueeze(1), clean.shape[-2:])
    prompt_embeds, negative_embeds = pipeline.encode_prompt(prompts, "cpu", 1, True)
    latents = scheduler.add_noise(clean, noise, timesteps[:1])
    for index, timestep in enumerate(timesteps):
        conditional = pipeline.unet(latents, timestep, prompt_embeds).sample
        unconditional = pipeline.unet(latents, timestep, negative_embeds).sample
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
        last = index + 1 == len(timesteps)
        outside = clean if last else scheduler.add_noise(clean, noise, timesteps[index + 1 : index + 2])
        latents = torch.where(region > 0, latents, outside)
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    restored = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    return np.where(masks[..., None], restored, images)


def _dataset(prompts: list[str], chosen: np.ndarray, rejected: np.ndarray, masks: np.ndarray | None) -> Dataset:
    columns: dict[str, Any] = {
        "prompt": list(prompts),
        "chosen": [_png(image) for image in chosen],
        "rejected": [_png(image) for image in rejected],
    }
    features = {"prompt": Value("string"), "chosen": Image(), "rejected": Image()}
    if masks is not None:
        columns["mask"] = [_png(np.where(mask, 255, 0).astype(np.uint8)) for mask in masks]
        features["mask"] = Image()
    return Dataset.from_dict(columns, features=Features(features))


def _png(pixels: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


# ---- Measuring a corner ---------------------------------------------------------------------------------------------


def corner_changes(images: np.ndarray, base_images: np.ndarray) -> dict[str, float]:
    """Compare images of equal noise `(N, 32, 32, 3)` by the model and by its base.

    Returns:
        `dict[str, float]`: `red`, how red the corner is: 0 for gray, 1 for the red of the pairs. And `outside`,
        the mean change of a pixel outside of the corner, in [0, 255].
    """
    values, before = images.astype(float), base_images.astype(float)
    red, green, blue = values[:, CORNER, CORNER].mean((0, 1, 2))
    most = CORNER_COLOUR[0] - CORNER_COLOUR[1:].mean()
    changed = np.abs(values - before).mean(-1)
    changed[:, CORNER, CORNER] = np.nan
    return {"red": float((red - (green + blue) / 2) / most), "outside": float(np.nanmean(changed))}
