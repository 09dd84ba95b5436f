"""Preference pairs of the embedded world, ranked by the oracle, in the canonical columns.

Off-policy pairs are two rendered images. On-policy pairs are two images that a model generated.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import StableDiffusionPipeline
from PIL import Image as PILImage

from .oracle import oracle_score
from .pipeline import LATENT_SHAPE, generate_images
from .world import Caption, captions, imperfect_render

FEATURES = Features(
    {"prompt": Value("string"), "chosen": Image(), "rejected": Image()}
    | {name: Value("float32") for name in ("chosen_score", "rejected_score")}
)
_TRAIN_KEY, _EVAL_KEY = 1, 2  # keys of the generators, so that training and held-out pairs differ for every seed


def off_policy_pairs(seed: int = 0, per_prompt: int = 14, margin: float = 0.05) -> Dataset:
    """Return training pairs of two rendered images with flaws. The better one is chosen.

    Args:
        seed (`int`): Seed of the flaws.
        per_prompt (`int`): Pairs rendered for each of the 72 prompts, before near ties are dropped.
        margin (`float`): Pairs whose scores differ by at most this are dropped.

    Returns:
        `datasets.Dataset`: `prompt`, `chosen` and `rejected` (PNG), `chosen_score`, `rejected_score`.
    """
    return _rendered_pairs(np.random.default_rng([_TRAIN_KEY, seed]), per_prompt, margin)


def eval_pairs(seed: int = 0, per_prompt: int = 2, margin: float = 0.05) -> Dataset:
    """Return held-out pairs, like [`off_policy_pairs`] but from another generator."""
    return _rendered_pairs(np.random.default_rng([_EVAL_KEY, seed]), per_prompt, margin)


def on_policy_pairs(
    pipeline: StableDiffusionPipeline, seed: int = 0, per_prompt: int = 14, margin: float = 0.05, steps: int = 12
) -> Dataset:
    """Return training pairs like [`off_policy_pairs`], of images that `pipeline` generates in `steps` denoising steps
    from latents of this `seed`."""
    shown = _repeated(per_prompt)
    prompts = [caption.text for caption in shown for _ in range(2)]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(prompts), *LATENT_SHAPE, generator=generator)
    return _rank(shown, generate_images(pipeline, prompts, latents, steps), margin)


def write_pairs(splits: Mapping[str, Dataset], folder: str | Path) -> Path:
    """Write pairs as a folder of images that `datasets.load_dataset(folder)` reads, in the layout of an imagefolder.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): Name of a split -> pairs in the columns of [`off_policy_pairs`].
        folder (`str` or `Path`): A new or empty folder. Each split becomes a folder in it, with `metadata.jsonl`.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"The pairs must go into a new or an empty folder, got {folder}. Name another one.")
    for split, pairs in splits.items():
        (folder / split / "images").mkdir(parents=True)
        lines = []
        for number, row in enumerate(pairs):
            for side in ("chosen", "rejected"):
                name = f"images/{number:04}_{side}.png"
                row.pop(side).save(folder / split / name)
                row[f"{side}_file_name"] = name  # `datasets` makes it the column `chosen` or `rejected`
            lines.append(json.dumps(row))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _rendered_pairs(generator: np.random.Generator, per_prompt: int, margin: float) -> Dataset:
    shown = _repeated(per_prompt)
    return _rank(shown, np.stack([imperfect_render(c, generator) for c in shown for _ in range(2)]), margin)


def _repeated(per_prompt: int) -> list[Caption]:
    if per_prompt < 1:
        raise ValueError(f"`per_prompt` must be at least 1, got {per_prompt}. The default is 14.")
    return [caption for caption in captions() for _ in range(per_prompt)]


def _rank(shown: list[Caption], images: np.ndarray, margin: float) -> Dataset:
    """Rank 2N images, the two of a pair consecutive, into at most N pairs."""
    scores = oracle_score(images, [caption.text for caption in shown for _ in range(2)]).reshape(-1, 2)
    images = images.reshape(-1, 2, *images.shape[1:])  # (2N, H, W, 3) -> (N, 2, H, W, 3)
    rows = []
    for caption, pair, pair_scores in zip(shown, images, scores, strict=True):
        better = int(pair_scores.argmax())
        worse = 1 - better
        if pair_scores[better] - pair_scores[worse] <= margin:
            continue
        rows.append(
            {
                "prompt": caption.text,
                "chosen": _png(pair[better]),
                "rejected": _png(pair[worse]),
                "chosen_score": float(pair_scores[better]),
                "rejected_score": float(pair_scores[worse]),
            }
        )
    if not rows:
        raise ValueError(f"`margin` must leave some pairs, but no two scores differ by more than {margin}. Lower it.")
    return Dataset.from_list(rows, features=FEATURES)


def _png(pixels: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
