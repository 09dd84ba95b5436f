"""Calibrated scores: each image's expected share of wins among the images of its prompt."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import torch

from ..losses import calibrated_scores
from .images import ImageReader, UndecodableImageError
from .pairs import PreferenceDataset
from .sources import PairSource

COMPARED_AT_ONCE = 1 << 22  # comparisons in memory at a time


def calibrate(dataset: PreferenceDataset) -> np.ndarray:
    """Return the calibrated scores of winners and losers, `(P, 2)` in float64.

    An image is compared with all distinct images of its prompt. Two images of a prompt count as one image if they have
    equal scores and equal content. An image is read only if another image of its prompt has the same score.
    """
    assert dataset.scores is not None
    source, index = dataset.origins()
    prompts = np.repeat(_prompt_numbers(source, index[:, 0]), 2)
    places, flat_scores = index.reshape(-1, 2), dataset.scores.reshape(-1)
    images, prompts, scores = _different_images(source, dataset.reader, places, prompts, flat_scores)
    order = np.argsort(prompts, kind="stable")
    calibrated = np.empty(len(order))
    sizes = np.unique(prompts, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes).tolist():
        groups = order[starts[sizes == size, None] + np.arange(size)]  # (groups, size)
        for part in np.array_split(groups, -(-groups.size * size // COMPARED_AT_ONCE)):
            calibrated[part] = calibrated_scores(torch.from_numpy(scores[part])).numpy()
    return calibrated[images].reshape(-1, 2)


def _prompt_numbers(source: PairSource, rows: np.ndarray) -> np.ndarray:
    """Return a number for the prompt of each row. Equal prompts have equal numbers."""
    different, places = np.unique(rows, return_inverse=True)
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(prompt, len(numbers)) for prompt in source.prompts_of_rows(different)]
    return np.array(codes, dtype=np.int64)[places.reshape(-1)]


def _different_images(
    source: PairSource, reader: ImageReader, places: np.ndarray, prompts: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the distinct images. Return the number of the distinct image for each image, and their prompts and scores.

    Args:
        places (`np.ndarray` of shape `(N, 2)`): Row of each image, and its number within the row.
    """
    rows = list(zip(prompts.tolist(), scores.tolist(), map(tuple, places.tolist()), strict=True))
    alike = Counter((prompt, score) for prompt, score, _ in set(rows))
    contents: dict[tuple[int, int], str] = {}
    numbers: dict[tuple, int] = {}
    image_numbers = np.empty(len(rows), dtype=np.int64)
    for number, (prompt, score, place) in enumerate(rows):
        content = ""
        if alike[prompt, score] > 1:
            content = contents.get(place) or contents.setdefault(place, _content(source, reader, *place))
        image_numbers[number] = numbers.setdefault((prompt, score, content), len(numbers))
    return (
        image_numbers,
        np.array([key[0] for key in numbers]),
        np.array([key[1] for key in numbers], dtype=np.float64),
    )


def _content(source: PairSource, reader: ImageReader, row: int, image: int) -> str:
    try:
        decoded = reader.decode_at(source.images(row), image)
    except UndecodableImageError:
        return f"unreadable image {image} of row {row}"
    return f"{decoded.size} {hashlib.sha256(decoded.tobytes()).hexdigest()}"
