"""Compute score gaps, loss weights of pairs, and calibrated scores from the scores of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS_AT_ONCE = 1024  # to bound memory, this many images are compared with all images of their prompt at once
BIN = 0.01  # width of the bins in which [`rarity_weights`] counts scores


def score_gaps(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return score gaps: by how much the winner's score exceeds the loser's, at least 0.

    Args:
        scores (`torch.Tensor` of shape `(P, 2, ...)`): Scores of winner and loser.
        sorts_by_scores (`bool`): Whether the loss exchanges winner and loser if the loser has the higher score. If
            true, the gap is the absolute difference of the two scores. If false, the gap of a pair whose loser has the
            higher score is 0, because the label contradicts the scores.

    Returns:
        `torch.Tensor` of shape `(P, ...)`.
    """
    gaps = scores[:, 0] - scores[:, 1]
    return gaps.abs() if sorts_by_scores else gaps.relu()


def gap_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `(P,)` equal to the score gaps of pairs, from scores `(P, 2, 1)`.

    After division by their mean ([`with_mean_one`]), the weights do not depend on the scale of the scores.

    The formula is ours.
    """
    return score_gaps(scores, sorts_by_scores=sorts_by_scores)[:, 0]


def gain_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `(P,)` proportional to the gap of the gains `2^score`, from scores `(P, 2, 1)`.

    After division by their mean ([`with_mean_one`]), the weights do not change if a constant is added to all scores.
    The weights change if all scores are multiplied by a factor.

    Source: the gains of RankDPO (https://huggingface.co/papers/2410.18013), without its discounts by rank.
    """
    gains = torch.exp2(scores - scores.max())  # the largest gain is 1, so no gain overflows
    return score_gaps(gains, sorts_by_scores=sorts_by_scores)[:, 0]


def inverse_gap_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `1 / (1 + gap / mean gap)`, `(P,)`, from scores `(P, 2, 1)`.

    The weight is 1 for a gap of 0, and 1/2 for the mean gap.

    Source: the weights of MADPO (https://huggingface.co/papers/2510.05342) are larger for small gaps; the formula here
    is ours.
    """
    gaps = gap_weights(scores, sorts_by_scores=sorts_by_scores)
    return 1 / (1 + gaps / _mean(gaps))


def rarity_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `1 / sqrt(n_w n_l)`, `(P,)`, from scores `(P, 2, 1)`: pairs with rare scores weigh more.

    `n_w` and `n_l` are how many of the `2P` scores lie in the same bin of width [`BIN`] as the score of the winner and
    of the loser. `sorts_by_scores` has no effect, because the weight stays the same if winner and loser are exchanged.

    Source: VideoDPO (https://huggingface.co/papers/2412.14167), `(c / sqrt(p_w p_l))^a` with the shares `p` of all
    scores in a bin, known to us from a summary. Division by the mean ([`with_mean_one`]) removes `c`. `a` is 1, as in
    the published code.
    """
    bins = (scores[..., 0] / BIN).round()  # (P, 2); rounding keeps scores of two decimals off the edges of bins
    _, bin_of_score, counts = bins.unique(return_inverse=True, return_counts=True)
    return 1 / counts[bin_of_score].double().prod(dim=1).sqrt()


def agreement_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `1 / (1 + s)`, `(P,)`, from scores `(P, 2, K)` of K scorers that disagree by `s`.

    To compute `s`, each scorer's score differences `winner - loser` are divided by their mean absolute value. `s` is
    the standard deviation of a pair's K differences. `sorts_by_scores` has no effect: if winner and loser are
    exchanged, all differences change sign and `s` stays the same.

    Source: uncertainty-penalised DPO (https://huggingface.co/papers/2410.20187) penalises uncertain rewards; the
    formula here is ours.
    """
    differences = scores[:, 0] - scores[:, 1]  # (P, K)
    scales = torch.stack([_mean(distances) for distances in differences.abs().unbind(1)])
    return 1 / (1 + (differences / scales).std(dim=1, correction=0))


@dataclass(frozen=True)
class WeightFunction:
    """Function that computes weights of pairs, an entry of [`WEIGHT_FUNCTIONS`].

    Args:
        function (`Callable`): Function that takes scores `(P, 2, K)` in float64 and returns weights `(P,)`.
        several_scorers (`bool`): Whether the function compares several scorers. If `False`, K is 1.
        reads_gaps (`bool`): Whether the function reads the gap, which is 0 if the label contradicts the scores.
    """

    function: Callable[..., torch.Tensor]
    several_scorers: bool = False
    reads_gaps: bool = True


WEIGHT_FUNCTIONS: dict[str, WeightFunction] = {
    "gap": WeightFunction(gap_weights),
    "gain": WeightFunction(gain_weights),
    "inverse_gap": WeightFunction(inverse_gap_weights),
    "rarity": WeightFunction(rarity_weights, reads_gaps=False),
    "agreement": WeightFunction(agreement_weights, several_scorers=True, reads_gaps=False),
}


def with_mean_one(weights: torch.Tensor) -> torch.Tensor:
    """Divide weights `(P,)` by their mean, which must be above 0. Weights that are all 1 stay exactly 1."""
    return weights / _mean(weights)


def calibrated_scores(rewards: torch.Tensor) -> torch.Tensor:
    """Return each image's expected share of wins against the other images of its prompt (its calibrated score).

    The calibrated score of image `i` is the mean of `sigma(r_i - r_j)` over all other images `j` of the prompt. If a
    prompt has a single image, the calibrated score of this image is 1/2.

    Args:
        rewards (`torch.Tensor` of shape `(..., N)`): Scores of the N different images of a prompt. The dimensions
            before the last one index prompts.

    Returns:
        `torch.Tensor` of the same shape: Shares in `[0, 1]`.

    Source: CaPO (https://huggingface.co/papers/2502.02588). The paper does not say whether an image is also compared
    with itself. In this function, an image is not compared with itself.
    """
    images = rewards.shape[-1]
    if images < 2:
        return torch.full_like(rewards, 0.5)
    chunks = rewards.split(ROWS_AT_ONCE, dim=-1)
    wins = [torch.sigmoid(chunk[..., :, None] - rewards[..., None, :]).sum(dim=-1) for chunk in chunks]
    return (torch.cat(wins, dim=-1) - 0.5) / (images - 1)  # subtract the comparison of each image with itself, 1/2


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of values `(P,)`. The sum is rounded only once, so the mean is equal on every machine."""
    return values.new_tensor(math.fsum(values.tolist()) / len(values))
