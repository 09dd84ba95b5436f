"""Matches liked with disliked images, where each row has one image and a verdict on it.

A loss on single images (`tgo`, `kto`) reads each half of a pair by itself, so it does not matter which images are
matched. As pairs, they have all that pairs have: caches, engines, the safeguard in every step, evaluations.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np

from ..utils.errors import UserError
from .data_report import BadDataError
from .formats import LONGEST_PROMPT, LabelError, PreferenceFormat, Reject, finite_number

logger = logging.getLogger(__name__)

NumberedRow = tuple[int, Mapping[str, Any]]
LABELS_MIDDLE = 0.5  # between the labels 0 of disliked images and 1 of liked ones
WAITING = 16  # images of a stream that wait for one of the other kind, and of each kind that may be used again
ONE_KIND = 1000  # images at the start of a stream that may be of one kind
ORDER = 0  # seed of the matching, which an index that is kept for other runs cannot take from a run


def match_images(row_format: PreferenceFormat, rows: Iterable[NumberedRow], name: str, reject: Reject) -> np.ndarray:
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
    for (number, _), value in _judged(row_format, rows, reject):
        numbers.append(number)
        values.append(value)
    if not numbers:
        return np.zeros((0, 4), dtype=np.int32)
    images, scores = np.array(numbers), np.array(values)
    threshold = row_format.score_threshold
    is_liked = scores >= _least(row_format)
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


def match_in_order(
    row_format: PreferenceFormat, rows: Iterable[NumberedRow], name: str, reject: Reject
) -> Iterator[list[NumberedRow]]:
    """Yield pairs of a liked and a disliked image from a stream, each as its winner's and its loser's row.

    An image is matched with the first of the other kind that waits, and if none does, it waits itself. If more than
    `WAITING` wait, and at the end, one that waits is matched with that of the last images of the other kind whose use
    is the longest ago. So every image is in a pair, except some before the first of the other kind. The pairs depend on
    the rows alone, so a resumed run finds them again.

    Args:
        name (`str`): Name of the data in messages.
        reject (`Callable`): Is called for images without a pair, and as by [`match_images`].

    Raises:
        `BadDataError`: If the first `ONE_KIND` images, or all of fewer, are liked, or disliked.
    """
    waiting: dict[bool, deque[NumberedRow]] = {True: deque(), False: deque()}
    used: dict[bool, deque[NumberedRow]] = {True: deque(maxlen=WAITING), False: deque(maxlen=WAITING)}

    def matched(image: NumberedRow, is_liked: bool) -> Iterator[list[NumberedRow]]:
        others = waiting[not is_liked] or used[not is_liked]
        if not others:
            kind = "liked" if is_liked else "disliked"
            reject("unmatched", image[0], f"it and all images so far are {kind}, so there is none to match it with", 1)
            return
        other = others.popleft()
        used[is_liked].append(image)
        used[not is_liked].append(other)
        yield [image, other] if is_liked != row_format.is_swapped else [other, image]

    least = _least(row_format)
    for number, (image, value) in enumerate(_judged(row_format, rows, reject), 1):
        is_liked = value >= least
        if waiting[not is_liked]:
            yield from matched(image, is_liked)
            continue
        waiting[is_liked].append(image)
        if len(waiting[is_liked]) > WAITING:
            yield from matched(waiting[is_liked].popleft(), is_liked)
        if number == ONE_KIND and not used[is_liked]:
            raise _one_kind(f"The first {ONE_KIND}", name, is_liked)
    for is_liked, images in waiting.items():
        if images and not used[is_liked]:
            raise _one_kind("The", name, is_liked)
        for image in images:
            yield from matched(image, is_liked)


def _one_kind(images: str, name: str, is_liked: bool) -> BadDataError:
    return BadDataError(
        "Single images of a stream are matched as they come, so liked and disliked ones must be mixed. "
        f"{images} images of the {name} stream, or of the share of a process or worker, are all "
        f"{'liked' if is_liked else 'disliked'}. Shuffle the rows before you write them, set another "
        "`score_threshold` if they have scores, or load the data without `streaming=True`."
    )


def class_names(row_format: PreferenceFormat, features: Mapping[str, Any] | None) -> dict[str, dict[int, str]]:
    """Return the names of the numbers in a column of verdicts that has classes, such as folders."""
    kinds = [(column, (features or {}).get(column)) for (column,) in row_format.label_readers]
    return {column: dict(enumerate(kind.names)) for column, kind in kinds if isinstance(kind, datasets.ClassLabel)}


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


def _least(row_format: PreferenceFormat) -> float:
    """Return the least score of a liked image."""
    return LABELS_MIDDLE if row_format.score_threshold is None else row_format.score_threshold


def _judged(
    row_format: PreferenceFormat, rows: Iterable[NumberedRow], reject: Reject
) -> Iterator[tuple[NumberedRow, float]]:
    """Yield the rows whose prompt and label can be read, each with the score of its image."""
    for number, row in rows:
        try:
            (value,), _ = row_format.image_scores(row)
            prompt = row_format.whole_prompt(row)
        except ValueError as error:
            reject("bad_labels" if isinstance(error, LabelError) else "bad_prompts", number, str(error), 1)
            continue
        if len(prompt) > LONGEST_PROMPT:
            reject("cut_prompts", number, f"only the first {LONGEST_PROMPT} characters of the prompt are read", 1)
        yield (number, row), value


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
