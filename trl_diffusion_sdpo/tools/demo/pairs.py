"""Make preference pairs of the toy world: two drawings of a prompt, of which the oracle chooses one."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from ...utils.errors import UserError
from .oracle import oracle_score
from .world import Caption, captions, imperfect_render

FEATURES = Features(
    {"prompt": Value("string"), "chosen": Image(), "rejected": Image()}
    | {name: Value("float32") for name in ("chosen_score", "rejected_score")}
)
_TRAIN_KEY, _EVAL_KEY = 1, 2  # part of the seeds: the two sets of pairs must differ


def off_policy_pairs(seed: int = 0, per_prompt: int = 14, margin: float = 0.05) -> Dataset:
    """Return training pairs of two flawed drawings of one prompt. The higher oracle score is chosen.

    Args:
        seed (`int`): Seed of the drawings' random flaws.
        per_prompt (`int`): Number of pairs to render for each of the 72 prompts, before near ties are dropped.
        margin (`float`): Drop pairs whose oracle scores differ by at most this much.

    Returns:
        `datasets.Dataset`: Columns `prompt`, `chosen` and `rejected` (PNG images), `chosen_score` and `rejected_score`.
    """
    return _rendered_pairs(np.random.default_rng([_TRAIN_KEY, seed]), per_prompt, margin)


def eval_pairs(seed: int = 0, per_prompt: int = 2, margin: float = 0.05) -> Dataset:
    """Return held-out pairs, made like those of [`off_policy_pairs`] but with other random numbers."""
    return _rendered_pairs(np.random.default_rng([_EVAL_KEY, seed]), per_prompt, margin)


def write_pairs(splits: Mapping[str, Dataset], folder: str | Path) -> Path:
    """Write pairs as an `imagefolder`, which `datasets.load_dataset(folder)` reads.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): Name of a split -> pairs with the columns of [`off_policy_pairs`].
        folder (`str` or `Path`): A new or empty folder. Each split becomes a subfolder with a `metadata.jsonl`.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"The folder for the pairs must be new or empty, got {folder}. Use another folder.")
    for split, pairs in splits.items():
        (folder / split / "images").mkdir(parents=True)
        lines = []
        for number, row in enumerate(pairs):
            for side in ("chosen", "rejected"):
                name = f"images/{number:04}_{side}.png"
                row.pop(side).save(folder / split / name)
                row[f"{side}_file_name"] = name  # `datasets` reads this key as the column `chosen` or `rejected`
            lines.append(json.dumps(row))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _rendered_pairs(generator: np.random.Generator, per_prompt: int, margin: float) -> Dataset:
    shown = [caption for caption in captions() for _ in range(per_prompt)]
    return _rank(shown, np.stack([imperfect_render(c, generator) for c in shown for _ in range(2)]), margin)


def _rank(shown: list[Caption], images: np.ndarray, margin: float) -> Dataset:
    """Return at most N pairs from 2N images, two consecutive ones each, the one with the higher score as chosen. Near
    ties are dropped."""
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
    return Dataset.from_list(rows, features=FEATURES)


def _png(pixels: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
