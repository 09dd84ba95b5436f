"""How many rows and pairs a data set has, and how many were dropped and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..utils.errors import UserError

SAMPLED_PAIRS = 128  # pairs to decode before training, within a second or two

COUNTS = ("rows", "pairs", "ties", "undecodable", "bad_prompts", "bad_labels", "too_small", "unmatched", "cut_prompts")
RARE = ("too_small", "unmatched", "cut_prompts")  # counts not listed if 0
MAX_EXAMPLES = 5
PERMUTED = "losers are winners of other pairs, drawn anew in every epoch"
SWAPPED = "labels are swapped: the winner of each pair is the image that the data set calls the loser"


class BadDataError(UserError):
    """Stops the run: the data cannot be used for training."""


@dataclass
class DataReport:
    """Counts of rows and pairs, of drops by reason, and examples of dropped rows."""

    name: str  # name of the data in messages
    format: str  # a key of `FORMATS`, or several keys joined by `+`
    rows: int = 0  # rows of the data set
    pairs: int = 0  # pairs to train on
    ties: int = 0  # pairs whose two images have equal labels
    undecodable: int = 0  # pairs with an image that cannot be decoded
    bad_prompts: int = 0  # rows whose prompt is not a valid string
    bad_labels: int = 0  # rows in which a label, score, weight or noise seed is missing or unreadable
    too_small: int = 0  # pairs with an image whose shorter side is below `min_side`
    unmatched: int = 0  # single images of a stream before the first of the other kind
    cut_prompts: int = 0  # rows whose prompt is longer than `LONGEST_PROMPT`; these rows are kept
    unread: tuple[str, ...] = ()  # columns that are not read
    notes: tuple[str, ...] = ()  # further lines of the printed report
    is_swapped: bool = False  # whether winners are the images that the data set calls losers
    is_permuted: bool = False  # whether losers are the winners of other pairs
    matching: str = ""  # how single images became pairs
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # dropped rows and reasons

    @property
    def dropped(self) -> int:
        """Number of all dropped rows and pairs."""
        return self.ties + self.undecodable + self.bad_prompts + self.bad_labels + self.too_small + self.unmatched

    def add(self, kind: str, row: int, reason: str, amount: int = 1) -> bool:
        """Add `amount` to the count `kind`. Return whether the row is now one of the examples."""
        setattr(self, kind, getattr(self, kind) + amount)
        examples = self.examples.setdefault(kind, [])
        if len(examples) == MAX_EXAMPLES:
            return False
        examples.append((row, reason))
        return True

    def __str__(self) -> str:
        listed = [count for count in COUNTS if count not in RARE or getattr(self, count)]
        counts = ", ".join(f"{getattr(self, count)} {count.replace('_', ' ')}" for count in listed)
        lines = [f"{self.name} data ({self.format}): {counts}"]
        if self.unread:
            lines.append(f"  columns that are not read: {', '.join(self.unread)}")
        if self.is_swapped:
            lines.append(f"  {SWAPPED}")
        if self.is_permuted:
            lines.append(f"  {PERMUTED}")
        if self.matching:
            lines.append(f"  {self.matching}")
        for kind, examples in self.examples.items():
            lines += [f"  {kind.replace('_', ' ')}: row {row}: {reason}" for row, reason in examples]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def evenly_spaced(size: int, wanted: int) -> np.ndarray:
    """Return up to `wanted` evenly spaced indices from 0 to `size - 1`, starting at 0, all different."""
    count = min(size, wanted)
    return np.arange(count, dtype=np.int64) * size // max(count, 1)
