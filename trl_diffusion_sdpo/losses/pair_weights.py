"""Formulas on the scores of a pair's images: gaps, factors of the pair's loss, and calibrated scores.

`data/pair_scores.py` reads the columns with the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS_AT_ONCE = 1024  # images that are compared with their group at once, to bound memory


def score_gaps(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return by how much the winner's score exceeds the loser's, at least 0.

    Args:
        scores (`torch.Tensor` of shape `(P, 2, ...)`): Scores of winner and loser.
        sorts_by_scores (`bool`): Whether the loss swaps the images of a pair whose loser has the higher score. The gap
            of such a pair is then the distance of its scores. Otherwise it is 0, because the label contradicts the
            scores.

    Returns:
        `torch.Tensor` of shape `(P, ...)`.
    """
    gaps = scores[:, 0] - scores[:, 1]
    return gaps.abs() if sorts_by_scores else gaps.relu()


def gap_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return the gap of the scores `(P, 2, 1)`, `(P,)`. With a mean of 1, it does not depend on the scores' scale.

    Source: VideoDPO (https://huggingface.co/papers/2412.14167) has weights that grow with the gap. This form is ours.
    """
    return score_gaps(scores, sorts_by_scores=sorts_by_scores)[:, 0]


def gain_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return the gap of the gains `2^score` of scores `(P, 2, 1)`, `(P,)`, up to a factor that all pairs share.

    With a mean of 1, a constant added to all scores changes nothing. Their scale changes the weights.

    Source: the gains of RankDPO (https://huggingface.co/papers/2410.18013), without its discounts by rank.
    """
    gains = torch.exp2(scores - scores.max())  # the largest gain is 1, so none overflows
    return score_gaps(gains, sorts_by_scores=sorts_by_scores)[:, 0]


def inverse_gap_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return `1 / (1 + gap / mean gap)` of scores `(P, 2, 1)`, `(P,)`. It is 1 at a gap of 0, and 1/2 at the mean gap.

    Source: MADPO (https://huggingface.co/papers/2510.05342) has larger weights for small gaps. This form is ours.
    """
    gaps = gap_weights(scores, sorts_by_scores=sorts_by_scores)
    return 1 / (1 + gaps / _mean(gaps))


def agreement_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return `1 / (1 + s)` of scores `(P, 2, K)` from K scorers, `(P,)`.

    `s` is the standard deviation over the scorers of the signed differences `winner - loser`. Each difference is
    divided by its scorer's mean distance. `sorts_by_scores` has no effect, because a swap changes the signs of all
    differences.

    Source: uncertainty-penalised DPO has a penalty on disagreement. This form is ours.
    """
    differences = scores[:, 0] - scores[:, 1]  # (P, K)
    scales = torch.stack([_mean(distances) for distances in differences.abs().unbind(1)])
    return 1 / (1 + (differences / scales).std(dim=1, correction=0))


@dataclass(frozen=True)
class WeightFunction:
    """Row of [`WEIGHT_FUNCTIONS`].

    Args:
        function (`Callable`): Function from scores `(P, 2, K)` in float64 to weights `(P,)` of any mean.
        several_scorers (`bool`): Whether the function reads the scores of several scorers. Otherwise K is 1.
    """

    function: Callable[..., torch.Tensor]
    several_scorers: bool = False


WEIGHT_FUNCTIONS: dict[str, WeightFunction] = {
    "gap": WeightFunction(gap_weights),
    "gain": WeightFunction(gain_weights),
    "inverse_gap": WeightFunction(inverse_gap_weights),
    "agreement": WeightFunction(agreement_weights, several_scorers=True),
}


def with_mean_one(weights: torch.Tensor) -> torch.Tensor:
    """Divide weights `(P,)` by their mean, which must be above 0. Weights that are all 1 stay exactly 1."""
    return weights / _mean(weights)


def calibrated_scores(rewards: torch.Tensor) -> torch.Tensor:
    """Return each image's expected share of wins in its group: the mean of `sigma(r_i - r_j)` over all others `j`.

    An image is not compared with itself. Of two images, one has `sigma(r_1 - r_2)` and the other its complement. A
    single image has 1/2.

    Args:
        rewards (`torch.Tensor` of shape `(..., N)`): Scores of the N different images of a prompt, for any number of
            prompts.

    Returns:
        `torch.Tensor` of the same shape: Shares in `[0, 1]`.

    Source: CaPO (https://huggingface.co/papers/2502.02588). The paper leaves open whether `j` may be `i`.
    """
    images = rewards.shape[-1]
    if images < 2:
        return torch.full_like(rewards, 0.5)
    chunks = rewards.split(ROWS_AT_ONCE, dim=-1)
    wins = [torch.sigmoid(chunk[..., :, None] - rewards[..., None, :]).sum(dim=-1) for chunk in chunks]
    return (torch.cat(wins, dim=-1) - 0.5) / (images - 1)  # subtract each image's 1/2 against itself


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of values `(P,)`. It is exact up to its last rounding, so it is equal on every machine."""
    return values.new_tensor(math.fsum(values.tolist()) / len(values))
