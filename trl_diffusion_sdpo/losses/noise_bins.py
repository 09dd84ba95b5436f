"""Noise levels in equal bins: which bin a level lies in, weights by level, and the changes of errors by bin."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def noise_bin_of(noise_levels: torch.Tensor, num_noise_bins: int) -> torch.Tensor:
    """Bin of each noise level in `[0, 1]`, of `num_noise_bins` equally wide ones; int64, of the same shape."""
    return (noise_levels * num_noise_bins).long().clamp(0, num_noise_bins - 1)


def noise_range_weights(noise_levels: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """1 for noise levels in `[low, high]` and 0 for others; float32, of the same shape."""
    return ((noise_levels >= low) & (noise_levels <= high)).float()


def noise_bin_changes(sums: Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics of how much the errors of policy and reference differ at each noise bin.

    Args:
        sums (`Sequence` of `num_noise_bins` rows): Of each bin, the summed errors of winner and loser, those under the
            reference, and the number of pairs.

    Returns:
        `dict[str, float]`: For each bin with a pair, `errors/winner_change@0` and `errors/loser_change@0` (means of
        policy minus reference), and as shares of the reference's error `errors/winner_change_relative@0` and so on; 0
        where that error is 0.
    """
    metrics = {}
    for noise_bin, (*errors, count) in enumerate(sums):
        if not count:
            continue
        for name, error, reference in zip(("winner_change", "loser_change"), errors[:2], errors[2:], strict=True):
            metrics[f"errors/{name}@{noise_bin}"] = (error - reference) / count
            metrics[f"errors/{name}_relative@{noise_bin}"] = (error - reference) / reference if reference else 0.0
    return metrics
