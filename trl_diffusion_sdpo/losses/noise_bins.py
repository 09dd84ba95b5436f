"""Noise levels in equal bins: which bin a level lies in, weights by level, and the changes of errors by bin."""

from __future__ import annotations

import torch


def noise_bin_of(noise_levels: torch.Tensor, num_noise_bins: int) -> torch.Tensor:
    """Bin of each noise level in `[0, 1]`, of `num_noise_bins` equally wide ones; int64, of the same shape."""
    return (noise_levels * num_noise_bins).long().clamp(0, num_noise_bins - 1)


def noise_range_weights(noise_levels: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """1 for noise levels in `[low, high]` and 0 for others; float32, of the same shape."""
    return ((noise_levels >= low) & (noise_levels <= high)).float()


def noise_bin_changes(noise_bins: torch.Tensor, errors: torch.Tensor) -> dict[str, float]:
    """Metrics of how much the errors of policy and reference differ, at each noise bin and over all.

    Args:
        noise_bins (`torch.Tensor` of shape `(P,)`, int64): Noise bin of each pair; on the host, as the errors.
        errors (`torch.Tensor` of shape `(P, 4)`): Errors of winner and loser, then the same before training or under
            the reference.

    Returns:
        `dict[str, float]`: For each bin with a pair, `errors/winner_change@0` and `errors/loser_change@0` (means of
        policy minus reference), as shares of the reference's error `errors/winner_change_relative@0` and so on (0
        where that error is 0), and where two pairs have an error, `errors/winner_change_relative_stderr@0`, the
        standard error of the winner's share ([`share_stderr`]). Over all pairs, `errors/winner_change_relative` and
        `errors/winner_change_relative_stderr`, and `errors/pairs`, their number.
    """
    metrics = {}
    for noise_bin in noise_bins.unique().tolist():
        own = errors[noise_bins == noise_bin]
        sums = own.sum(0).tolist()
        for name, error, before in zip(("winner_change", "loser_change"), sums[:2], sums[2:], strict=True):
            change = error - before
            metrics[f"errors/{name}@{noise_bin}"] = change / len(own)
            metrics[f"errors/{name}_relative@{noise_bin}"] = change / before if before else 0.0
        stderr = share_stderr(own[:, 0] - own[:, 2], own[:, 2])
        if stderr is not None:
            metrics[f"errors/winner_change_relative_stderr@{noise_bin}"] = stderr
    winner, _, before, _ = errors.sum(0).tolist()
    metrics["errors/pairs"] = float(len(errors))
    if before:
        metrics["errors/winner_change_relative"] = (winner - before) / before
        stderr = share_stderr(errors[:, 0] - errors[:, 2], errors[:, 2])
        if stderr is not None:
            metrics["errors/winner_change_relative_stderr"] = stderr
    return metrics


def share_stderr(changes: torch.Tensor, before: torch.Tensor) -> float | None:
    """Standard error over the pairs of `changes.sum() / before.sum()`, for changes and earlier errors of shape `(P,)`;
    `None` where fewer than two pairs have an earlier error.

    The jackknife's, from the shares without each pair in turn: the share lies closest to the pairs with the largest
    errors, whose distance from it says too little. It is widened by the quantile of Student's distribution at one
    standard deviation, since a scatter of few pairs, or of few that are large, is itself uncertain. The degrees of
    freedom are those of changes that scatter in proportion to the error.

    Sources: Miller, The jackknife - a review, 1974. Satterthwaite, An approximate distribution of estimates of variance
    components, 1946. Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, equation 26.7.5.
    """
    pairs, rest = len(changes), before.sum() - before
    if pairs < 2 or (rest <= 0).any():
        return None
    share = changes.sum() / before.sum()
    variance = (pairs - 1) / pairs * ((changes - share * before) / rest).square().sum()
    parts = (before / before.max()).square()
    freedom = ((pairs - 1) / pairs * parts.sum() ** 2 / parts.square().sum()).clamp(min=1.0)
    widened = 1 + 1 / (2 * freedom) + 1 / (4 * freedom**2) + 1 / (16 * freedom**3)  # within 1.4 %
    return float(variance.sqrt() * widened)
