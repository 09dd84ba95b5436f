"""Noise levels: in which part of them a pair lies, and what training did to the errors of each."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from .gradients import exact_dtype

CHANGES = ("winner_change", "loser_change")


def level_of(levels: torch.Tensor, parts: int) -> torch.Tensor:
    """Which of `parts` equal parts of [0, 1] noise levels lie in; int64, of the same shape."""
    return (levels * parts).long().clamp(0, parts - 1)


class LevelMeter:
    """Sums of errors by noise level over an evaluation; one reduction over processes when they are read.

    Args:
        parts (`int`): Number of noise levels.
    """

    def __init__(self, parts: int):
        self.parts = parts
        self._sums: torch.Tensor | None = None

    def add(self, levels: torch.Tensor, errors: torch.Tensor, counts: bool) -> None:
        """Add a batch.

        Args:
            levels (`torch.Tensor` of shape `(B,)`): Noise levels of the pairs.
            errors (`torch.Tensor` of shape `(B, 4)`): Of winner and loser, and of the reference's.
            counts (`bool`): Whether the pairs count; if not, only the names come into being.
        """
        rows = torch.cat([errors, torch.ones_like(errors[:, :1])], 1) * float(counts)
        sums = torch.zeros(self.parts, rows.shape[1], device=rows.device, dtype=exact_dtype(rows.device))
        sums.index_add_(0, level_of(levels, self.parts), rows.to(sums))
        self._sums = sums if self._sums is None else self._sums + sums

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """`errors/winner_change@0` and so on, absolute and as a share of the reference's error (`..._relative@0`), of
        the levels that had a pair; every process must call it together."""
        if self._sums is None:
            return {}
        sums, self._sums = accelerator.reduce(self._sums, reduction="sum").tolist(), None
        metrics = {}
        for level, (*errors, count) in enumerate(sums):
            if not count:
                continue
            for name, error, before in zip(CHANGES, errors[:2], errors[2:], strict=True):
                metrics[f"errors/{name}@{level}"] = (error - before) / count
                metrics[f"errors/{name}_relative@{level}"] = (error - before) / before if before else 0.0
        return metrics
