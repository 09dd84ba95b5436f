"""Report of rows, pairs and drops, and checks of images before the first batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..utils.hints import did_you_mean
from ..utils.switch_words import SWITCH_WORDS

logger = logging.getLogger(__name__)

VERIFY_IMAGES = ("sample", "all", "none")
SAMPLED_PAIRS = 128  # a second or two

STRONG_CROP = 0.25  # share of an image's area; pairs that lose more to cropping are counted
ENLARGED = "enlarged"

COUNTS = ("rows", "pairs", "ties", "undecodable", "bad_prompts", "bad_labels", "too_small")
MAX_EXAMPLES = 5
PERMUTED = "losers are the winners of other pairs, drawn in every epoch"
SWAPPED = "labels are swapped: the winner of a pair is the published loser"
HOW_TO_DROP = 'Fix the row, or pass on_bad_row="drop" to leave such rows out.'


class BadDataError(ValueError):
    """Error for data that stop a run."""


@dataclass
class DataReport:
    """Counts of the rows, pairs and drops of a preference set, with examples of what was dropped."""

    name: str  # in messages
    format: str  # key in `FORMATS`
    rows: int = 0  # of the source
    pairs: int = 0  # to train on
    ties: int = 0  # pairs whose images were judged equal
    undecodable: int = 0  # pairs with an image that cannot be decoded
    bad_prompts: int = 0  # rows whose prompt is no string
    bad_labels: int = 0  # rows whose label or score is missing or unreadable
    too_small: int = 0  # pairs with an image whose shorter side is below `min_side`
    notes: tuple[str, ...] = ()  # notes on the sizes of the images
    is_swapped: bool = False  # whether the published losers are the winners of the pairs
    is_permuted: bool = False  # whether losers are the winners of other pairs
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # first row numbers and reasons, by kind

    @property
    def dropped(self) -> int:
        """Number of all drops."""
        return self.ties + self.undecodable + self.bad_prompts + self.bad_labels + self.too_small

    def add(self, kind: str, row: int, reason: str, amount: int = 1) -> bool:
        """Count drops. Return whether the row was added to the examples."""
        setattr(self, kind, getattr(self, kind) + amount)
        examples = self.examples.setdefault(kind, [])
        if len(examples) == MAX_EXAMPLES:
            return False
        examples.append((row, reason))
        return True

    def __str__(self) -> str:
        listed = [count for count in COUNTS if count != "too_small" or self.too_small]  # which depends on a setting
        counts = ", ".join(f"{getattr(self, count)} {count.replace('_', ' ')}" for count in listed)
        lines = [f"{self.name} data ({self.format}): {counts}"]
        if self.is_swapped:
            lines.append(f"  {SWAPPED}")
        if self.is_permuted:
            lines.append(f"  {PERMUTED}")
        for kind, examples in self.examples.items():
            lines += [f"  {kind.replace('_', ' ')}: row {row}: {reason}" for row, reason in examples]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def reject(report: DataReport, strict: bool, kind: str, row: int, reason: str, amount: int) -> bool:
    """Count a drop. Return whether the row was added to the examples.

    Raises:
        BadDataError: If `strict` and the row is bad. Ties and small images are not bad rows: their labels are valid.
    """
    if strict and kind not in ("ties", "too_small"):
        raise BadDataError(f"{report.name} data, row {row}: {reason}. {HOW_TO_DROP}")
    return report.add(kind, row, reason, amount)


def check_identical(name: str, identical: Sequence[bool]) -> None:
    """Warn if the two images of most pairs are identical, and raise `ValueError` if those of all pairs are.

    Args:
        name (`str`): Name of the data in messages.
        identical (`Sequence[bool]`): For each pair that was checked, whether its images are identical.
    """
    count, checked = sum(identical), len(identical)
    summary = (
        f"In {count} of {checked} pairs of the {name} data that were checked, chosen and rejected are the same image"
    )
    if 0 < checked == count:
        raise ValueError(
            f"{summary}, so no image is better. Check the columns, or use `loss_type='sft'` to train on the winners "
            "alone."
        )
    if 2 * count > checked:
        logger.warning("%s. Such pairs do not train anything. Check the columns.", summary)


def parse_verify_images(value: Any) -> str:
    """Return one of `VERIFY_IMAGES`. Booleans, also as text, mean `"all"` and `"none"`.

    Raises:
        ValueError: If the value is anything else.
    """
    word = str(value).lower()
    if word in SWITCH_WORDS:
        return "all" if SWITCH_WORDS[word] else "none"
    if word not in VERIFY_IMAGES:
        raise ValueError(
            f"`verify_images` must be one of {', '.join(VERIFY_IMAGES)}; got {value!r}."
            f"{did_you_mean(word, VERIFY_IMAGES)} Leave it unset for a sample."
        )
    return word


def evenly_spaced(size: int, wanted: int) -> np.ndarray:
    """Return at most `wanted` of the indices `0 .. size - 1`, evenly spaced, without repeats, starting at 0."""
    count = min(size, wanted)
    return np.arange(count, dtype=np.int64) * size // max(count, 1)


def describe_sizes(sizes: np.ndarray, targets: np.ndarray) -> tuple[str, ...]:
    """Return sentences about how images are resized and cropped.

    Args:
        sizes (`np.ndarray` of shape `(P, 2, 2)`): Height and width of winners and losers.
        targets (`np.ndarray` of shape `(P, 2)` or `(1, 2)`): Height and width at which they are trained.
    """
    if not len(sizes):
        return ()
    scales = (targets[:, None] / sizes).max(axis=2)  # (P, 2)
    ratios = sizes[..., 0] / sizes[..., 1] / (targets[:, 0] / targets[:, 1])[:, None]
    cropped = 1 - np.minimum(ratios, 1 / ratios)  # shares of the images' areas
    strongly = int((cropped > STRONG_CROP).any(axis=1).sum())
    used = len(np.unique(targets, axis=0))
    notes = [
        f"image sizes: pairs are trained at {used} size{'s' if used > 1 else ''}; of an image {cropped.mean():.1%} is "
        f"cropped on average and {cropped.max():.1%} at most, and in {strongly} pairs more than {STRONG_CROP:.0%}"
    ]
    enlarged = int((scales > 1).any(axis=1).sum())
    if enlarged:
        notes.append(f"{ENLARGED}: {enlarged} pairs have an image that is enlarged, at most {scales.max():.2f} times")
    return tuple(notes)
