"""Noise bins (ranges of noise levels), and how errors change in each."""

from __future__ import annotations

import torch

NOISE_BINS = 8  # number of noise bins of a run


def noise_bin_of(noise_levels: torch.Tensor, num_noise_bins: int = NOISE_BINS) -> torch.Tensor:
    """Return the noise bin of each noise level in `[0, 1]`, int64. Bins are equally wide."""
    return (noise_levels * num_noise_bins).long().clamp(0, num_noise_bins - 1)


def noise_range_weights(noise_levels: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return 1 for noise levels in `[low, high]` and 0 for others, float32, of the same shape."""
    return ((noise_levels >= low) & (noise_levels <= high)).float()


def noise_bin_changes(noise_bins: torch.Tensor, errors: torch.Tensor) -> dict[str, float]:
    """Return how much the policy's errors differ from the reference's, in each noise bin and over all pairs.

    Args:
        noise_bins (`torch.Tensor` of shape `(P,)` or `(P, D)`, int64): Noise bin of each pair at each of its D draws
            of noise, on the CPU like `errors`.
        errors (`torch.Tensor` of shape `(P, 4)` or `(P, D, 4)`): Errors of winner and loser, then the same two before
            training or under the reference.

    Returns:
        `dict[str, float]`: Metrics of all pairs, and of each bin with pairs (the names below are for bin 0).

        - `errors/winner_change@0` and `errors/loser_change@0`: mean error of the policy minus that of the reference.
        - `errors/winner_change_relative@0` and `errors/loser_change_relative@0`: the same, divided by the reference's
          error; 0 if that is 0.
        - `errors/winner_change_relative_stderr@0`: standard error of `errors/winner_change_relative@0`
          ([`share_stderr`]), if at least two pairs of the bin have a reference's error above 0.
        - `errors/winner_change_relative` and `errors/winner_change_relative_stderr`: relative change of the winners'
          error over all pairs, and its standard error.
        - `errors/pairs`: number of pairs.
        - The metrics of [`preference_learned`].
    """
    if errors.ndim == 2:
        noise_bins, errors = noise_bins.unsqueeze(1), errors.unsqueeze(1)
    metrics = {}
    for noise_bin in noise_bins.unique().tolist():
        in_bin = noise_bins == noise_bin
        # Sum errors over each pair's draws, which are not independent.
        pair_sums = torch.where(in_bin.unsqueeze(2), errors, 0.0).sum(1)[in_bin.any(1)]
        sums = pair_sums.sum(0).tolist()
        for name, error, before in zip(("winner_change", "loser_change"), sums[:2], sums[2:], strict=True):
            change = error - before
            metrics[f"errors/{name}@{noise_bin}"] = change / int(in_bin.sum())
            metrics[f"errors/{name}_relative@{noise_bin}"] = change / before if before else 0.0
        stderr = share_stderr(pair_sums[:, 0] - pair_sums[:, 2], pair_sums[:, 2])
        if stderr is not None:
            metrics[f"errors/winner_change_relative_stderr@{noise_bin}"] = stderr
    of_pairs = errors.sum(1)
    winner, _, before, _ = of_pairs.sum(0).tolist()
    metrics["errors/pairs"] = float(len(errors))
    if before:
        metrics["errors/winner_change_relative"] = (winner - before) / before
        stderr = share_stderr(of_pairs[:, 0] - of_pairs[:, 2], of_pairs[:, 2])
        if stderr is not None:
            metrics["errors/winner_change_relative_stderr"] = stderr
            metrics |= preference_learned(errors)
    return metrics


def preference_learned(errors: torch.Tensor) -> dict[str, float]:
    """Return how often, and by how much, the loser's error rose more than the winner's.

    Args:
        errors (`torch.Tensor` of shape `(P, D, 4)`): Errors of at least two pairs, as in [`noise_bin_changes`].

    Returns:
        `dict[str, float]`: Two metrics and their standard errors (suffix `_stderr`).

        - `errors/accuracy`: share of noise draws in which the loser's error rose more than the winner's, averaged over
          each pair's draws, then over the pairs. Equal rises count half.
        - `errors/margin_relative`: mean of the loser's rise minus the winner's, divided by the winners' mean error
          before training or under the reference.

    The standard error of the accuracy counts four added pairs, two with the accuracy 1 and two with 0. Without them,
    it would be 0 if all pairs have the same accuracy.

    Source of the added pairs: Agresti and Coull, Approximate is better than "exact" for interval estimation of
    binomial proportions, 1998.
    """
    margins = (errors[..., 1] - errors[..., 3]) - (errors[..., 0] - errors[..., 2])
    right = ((margins > 0).double() + (margins == 0).double() / 2).mean(1)
    widened = torch.cat([right, right.new_tensor([0.0, 0.0, 1.0, 1.0])])
    before = errors[..., 2].sum(1)
    metrics = {
        "errors/accuracy": float(right.mean()),
        "errors/accuracy_stderr": float(widened.std(correction=0) / len(widened) ** 0.5),
        "errors/margin_relative": float(margins.sum() / before.sum()),
    }
    stderr = share_stderr(margins.sum(1), before)
    return metrics if stderr is None else metrics | {"errors/margin_relative_stderr": stderr}


def share_stderr(changes: torch.Tensor, before: torch.Tensor) -> float | None:
    """Return the standard error of the ratio `changes.sum() / before.sum()`, estimated from the pairs.

    This is the jackknife, from the ratios with each pair left out in turn. A plain standard deviation over pairs would
    be too small, because pairs with large errors pull the ratio towards themselves. The result is multiplied by the
    quantile of Student's t-distribution at one standard deviation, as an estimate from few pairs, or from few with
    large errors, is itself uncertain. Its degrees of freedom assume that the standard deviation of a pair's change is
    proportional to its error.

    Args:
        changes (`torch.Tensor` of shape `(P,)`): Change of each pair's error.
        before (`torch.Tensor` of shape `(P,)`): Error of each pair before training or under the reference.

    Returns:
        `float`, or `None` if fewer than two pairs have an error above 0 in `before`.

    Sources: Miller, The jackknife - a review, 1974. Satterthwaite, An approximate distribution of estimates of variance
    components, 1946. Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, equation 26.7.5.
    """
    pairs, rest = len(changes), before.sum() - before
    if pairs < 2 or (rest <= 0).any():
        return None
    share = changes.sum() / before.sum()
    variance = (pairs - 1) / pairs * ((changes - share * before) / rest).square().sum()
    squares = (before / before.max()).square()
    freedom = ((pairs - 1) / pairs * squares.sum() ** 2 / squares.square().sum()).clamp(min=1.0)
    widened = 1 + 1 / (2 * freedom) + 1 / (4 * freedom**2) + 1 / (16 * freedom**3)  # within 1.4 %
    return float(variance.sqrt() * widened)
