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


def error_moments(errors: torch.Tensor) -> torch.Tensor:
    """Addends, per pair, of the sums that [`noise_bin_changes`] reads.

    Args:
        errors (`torch.Tensor` of shape `(B, 4)`): Errors of winner and loser, then the same before training or under
            the reference.

    Returns:
        `torch.Tensor` of shape `(B, 8)`: The errors, 1, and of the winner the squared change, the product of change and
        earlier error, and the squared earlier error.
    """
    winner, before = errors[:, :1], errors[:, 2:3]
    change = winner - before
    return torch.cat([errors, torch.ones_like(winner), change**2, change * before, before**2], 1)


def noise_bin_changes(sums: Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics of how much the errors of policy and reference differ, at each noise bin and over all.

    Args:
        sums (`Sequence` of `num_noise_bins` rows): The sums of [`error_moments`] over the pairs of each bin.

    Returns:
        `dict[str, float]`: For each bin with a pair, `errors/winner_change@0` and `errors/loser_change@0` (means of
        policy minus reference), as shares of the reference's error `errors/winner_change_relative@0` and so on (0
        where that error is 0), and with two pairs `errors/winner_change_relative_stderr@0`, the standard error of the
        winner's share. Over all pairs, `errors/winner_change_relative` and `errors/winner_change_relative_stderr`, and
        `errors/pairs`, their number.
    """
    metrics = {}
    for noise_bin, (*errors, count, squares, products, earlier) in enumerate(sums):
        if not count:
            continue
        for name, error, reference in zip(("winner_change", "loser_change"), errors[:2], errors[2:], strict=True):
            metrics[f"errors/{name}@{noise_bin}"] = (error - reference) / count
            metrics[f"errors/{name}_relative@{noise_bin}"] = (error - reference) / reference if reference else 0.0
        if count > 1 and errors[2]:
            ratio = _ratio_stderr(errors[0] - errors[2], errors[2], count, squares, products, earlier)
            metrics[f"errors/winner_change_relative_stderr@{noise_bin}"] = ratio
    winner, _, before, _, count, *moments = (sum(column) for column in zip(*sums, strict=True))
    metrics["errors/pairs"] = count
    if before:
        metrics["errors/winner_change_relative"] = (winner - before) / before
        if count > 1:
            metrics["errors/winner_change_relative_stderr"] = _ratio_stderr(winner - before, before, count, *moments)
    return metrics


def _ratio_stderr(
    change: float, before: float, count: float, squares: float, products: float, earlier: float
) -> float:
    """Standard error of `change / before`, a ratio of sums over `count` pairs, by its linear approximation: the
    scatter of each pair's change about what its earlier error would have it be.

    Source: Cochran, Sampling Techniques, 1977, equation 6.13, without the correction for a finite population.
    """
    ratio = change / before
    scatter = max(squares - 2 * ratio * products + ratio**2 * earlier, 0.0)  # in this order, no number stays none
    return (count / (count - 1) * scatter) ** 0.5 / before
