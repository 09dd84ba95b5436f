"""Matches liked with disliked images, where each row has one image and a verdict on it.

A loss on single images (`tgo`, `kto`) reads each half of a pair by itself, so it does not matter which images are
matched. As pairs, they have all that pairs have: caches, engines, the safeguard in every step, evaluations.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..utils.errors import UserError
from .formats import LONGEST_PROMPT, LabelError, PreferenceFormat, Reject, finite_number

logger = logging.getLogger(__name__)

LABELS_MIDDLE = 0.5  # between the labels 0 of disliked images and 1 of liked ones
ORDER = 0  # seed of the matching, which an index that is kept for other runs cannot take from a run


def match_images(
    row_format: PreferenceFormat, rows: Iterable[tuple[int, Mapping[str, Any]]], name: str, reject: Reject
) -> np.ndarray:
    """Return pairs of a liked and a disliked image, matched at random, as positions `(P, 4)` of a [`PairTable`]. The
    kind that has fewer images is repeated until each image of the other is matched.

    Args:
        name (`str`): Name of the data in messages.
        reject (`Callable`): Is called for rows whose prompt or label is missing or unreadable.

    Raises:
        `ValueError`: If all images are liked, or all disliked.
    """
    numbers: list[int] = []
    values: list[float] = []
    for number, row in rows:
        try:
            (value,), _ = row_format.image_scores(row)
            prompt = row_format.whole_prompt(row)
        except ValueError as error:
            reject("bad_labels" if isinstance(error, LabelError) else "bad_prompts", number, str(error), 1)
            continue
        if len(prompt) > LONGEST_PROMPT:
            reject("cut_prompts", number, f"only the first {LONGEST_PROMPT} characters of the prompt are read", 1)
        numbers.append(number)
        values.append(value)
    if not numbers:
        return np.zeros((0, 4), dtype=np.int32)
    images, scores = np.array(numbers), np.array(values)
    threshold = row_format.score_threshold
    is_liked = scores >= (LABELS_MIDDLE if threshold is None else threshold)
    if is_liked.all() or not is_liked.any():
        kind = "liked" if is_liked.all() else "disliked"
        advice = ""
        if threshold is not None:
            kind += f", because their scores of {scores.min():g} to {scores.max():g} are "
            kind += f"{'not ' if is_liked.all() else ''}below the threshold {threshold:g}"
            advice = "Set another `score_threshold`. "
        raise UserError(
            f"Single images must be of two kinds, liked and disliked. All {len(images)} images of the {name} data are "
            f"{kind}. {advice}Add images of the other kind, or hold out more images if these are the held-out ones. If "
            "you have good images only, make their losers with `trl-diffusion-sdpo pairs generate --from_images`, or "
            "train on them alone: `--loss_type sft --losers permute`."
        )
    if threshold is not None:
        logger.info("%s data: images with a score of %g or more are liked, the others disliked.", name, threshold)
    is_winner = ~is_liked if row_format.is_swapped else is_liked
    return _matched(images[is_winner], images[~is_winner], np.random.default_rng(ORDER))


def median_score(values: Iterable[Any]) -> float | None:
    """Return the median of the readable scores, or the next one above it if no score is below it. Return `None` if
    there are none."""
    readable = []
    for value in values:
        with contextlib.suppress(LabelError):
            readable.append(finite_number(value))
    scores = np.unique(readable)
    if not len(scores):
        return None
    middle = float(np.median(readable))
    return middle if scores[0] < middle else float(scores[:2][-1])


def match_again(positions: np.ndarray, is_good: np.ndarray, buckets: np.ndarray | None) -> np.ndarray:
    """Return pairs of the good images of `positions`, with buckets of two images in one bucket as far as there are any.

    Args:
        positions (`np.ndarray` of shape `(P, 4)`): Pairs of [`match_images`].
        is_good (`np.ndarray` of shape `(P, 2)`): Whether each of their images can be used.
        buckets (`np.ndarray` of shape `(P, 2)`, *optional*): Bucket of each image.
    """
    rows, numbers = [], []
    for side in (0, 1):
        images, first = np.unique(positions[:, 2 * side], return_index=True)
        good = is_good[first, side]
        rows.append(images[good])
        numbers.append(np.zeros(good.sum()) if buckets is None else buckets[first[good], side])
    generator = np.random.default_rng(ORDER)
    parts = [positions[:0]]
    for bucket in np.union1d(*numbers) if all(map(len, rows)) else ():
        own = [images[number == bucket] for images, number in zip(rows, numbers, strict=True)]
        wanted = max(map(len, own))
        winners, losers = (
            of_bucket if len(of_bucket) else generator.choice(images, wanted)
            for of_bucket, images in zip(own, rows, strict=True)
        )
        parts.append(_matched(winners, losers, generator))
    return np.concatenate(parts)


def _matched(liked: np.ndarray, disliked: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return positions `(P, 4)` of pairs, with P the larger number of rows of the two kinds."""
    wanted = max(len(liked), len(disliked))
    rows = [_repeated(kind, wanted, generator) for kind in (liked, disliked)]
    positions = np.stack([rows[0], np.zeros_like(rows[0]), rows[1], np.zeros_like(rows[1])], axis=1)
    return positions.astype(np.int32 if positions.max() <= np.iinfo(np.int32).max else np.int64)


def _repeated(rows: np.ndarray, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """Return `wanted` of `rows` in random order, each equally often, or once more."""
    rounds = [generator.permutation(rows) for _ in range(-(-wanted // len(rows)))]
    return np.concatenate(rounds)[:wanted]
