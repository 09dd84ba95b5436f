"""Calibrated scores: each image's expected share of wins among the images of its prompt."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import torch

from ..losses import calibrated_scores
from .images import UndecodableImageError, decode_image
from .pairs import PreferenceDataset
from .sources import PairSource

COMPARED_AT_ONCE = 1 << 22  # images of groups with one another


def calibrate(dataset: PreferenceDataset) -> np.ndarray:
    """The calibrated scores of winners and losers, `(P, 2)` in float64.

    The group of an image are the different images of its prompt. Two images of a prompt are the same one if they have
    the same score and the same content, which is read of those alone that share prompt and score with another.
    """
    assert dataset.scores is not None
    source, index = dataset.origins()
    prompts = np.repeat(_prompt_numbers(source, index[:, 0]), 2)
    images, prompts, scores = _different_images(source, index.reshape(-1, 2), prompts, dataset.scores.reshape(-1))
    order = np.argsort(prompts, kind="stable")
    found, sizes = np.empty(len(order)), np.unique(prompts, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes).tolist():
        groups = order[starts[sizes == size, None] + np.arange(size)]  # (groups, size)
        for part in np.array_split(groups, -(-groups.size * size // COMPARED_AT_ONCE)):
            found[part] = calibrated_scores(torch.from_numpy(scores[part])).numpy()
    return found[images].reshape(-1, 2)


def _prompt_numbers(source: PairSource, rows: np.ndarray) -> np.ndarray:
    """Return a number for the prompt of each of some rows, equal for equal ones."""
    different, places = np.unique(rows, return_inverse=True)
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(prompt, len(numbers)) for prompt in source.prompts_of_rows(different)]
    return np.array(codes, dtype=np.int64)[places.reshape(-1)]


def _different_images(
    source: PairSource, places: np.ndarray, prompts: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of each image among the different ones, and of those the prompts and the scores.

    Args:
        places (`np.ndarray` of shape `(N, 2)`): The row of each image, and its number within the row.
    """
    rows = list(zip(prompts.tolist(), scores.tolist(), map(tuple, places.tolist()), strict=True))
    alike = Counter((prompt, score) for prompt, score, _ in set(rows))
    contents: dict[tuple[int, int], str] = {}
    numbers: dict[tuple, int] = {}
    found = np.empty(len(rows), dtype=np.int64)
    for number, (prompt, score, place) in enumerate(rows):
        content = ""
        if alike[prompt, score] > 1:
            content = contents.get(place) or contents.setdefault(place, _content(source, *place))
        found[number] = numbers.setdefault((prompt, score, content), len(numbers))
    return found, np.array([key[0] for key in numbers]), np.array([key[1] for key in numbers], dtype=np.float64)


def _content(source: PairSource, row: int, image: int) -> str:
    try:
        decoded = decode_image(source.images(row)[image])
    except (UndecodableImageError, IndexError):
        return f"unreadable image {image} of row {row}"
    return f"{decoded.size} {hashlib.sha256(decoded.tobytes()).hexdigest()}"
