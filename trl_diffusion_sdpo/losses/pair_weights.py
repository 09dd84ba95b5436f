"""Formulas on the scores of a pair's images: gaps, factors of the pair's loss, and calibrated scores.

`data/pair_scores.py` reads the columns with the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS_AT_ONCE = 1024  # of a group that are compared with the whole group


def score_gaps(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return by how much the winner's score exceeds the loser's, never below 0.

    Args:
        scores (`torch.Tensor` of shape `(P, 2, ...)`): Of winner and loser.
        sorts_by_scores (`bool`): Whether the loss exchanges the images of a pair whose loser has the higher score: its
            gap is then the distance of the scores, and otherwise 0, as the label stands against them.

    Returns:
        `torch.Tensor` of shape `(P, ...)`.
    """
    gaps = scores[:, 0] - scores[:, 1]
    return gaps.abs() if sorts_by_scores else gaps.relu()


def gap_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """The gap of the scores `(P, 2, 1)` itself, `(P,)`: independent of the scale of the scores once the mean is 1.

    Source: the weight grows with the gap as in VideoDPO (https://huggingface.co/papers/2412.14167); this form is ours.
    """
    return score_gaps(scores, sorts_by_scores=sorts_by_scores)[:, 0]


def gain_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """The gap of the gains `2^score` of scores `(P, 2, 1)`, `(P,)`, up to a factor that all pairs share. A constant
    added to all scores changes nothing once the mean is 1; their scale does.

    Source: https://huggingface.co/papers/2410.18013 (RankDPO), its gains without the discounts of ranks.
    """
    gains = torch.exp2(scores - scores.max())  # the largest is 1: none overflows
    return score_gaps(gains, sorts_by_scores=sorts_by_scores)[:, 0]


def inverse_gap_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """`1 / (1 + gap / mean gap)` of scores `(P, 2, 1)`, `(P,)`: 1 at no gap, 1/2 at the mean one, whatever the scale.

    Source: larger weights for small gaps as in MADPO (https://huggingface.co/papers/2510.05342); this form is ours.
    """
    gaps = gap_weights(scores, sorts_by_scores=sorts_by_scores)
    return 1 / (1 + gaps / _mean(gaps))


def agreement_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """`1 / (1 + s)` of scores `(P, 2, K)` of K scorers, `(P,)`: `s` is the standard deviation, over the scorers, of the
    signed differences `winner - loser`, each divided by its scorer's mean distance. `sorts_by_scores` changes nothing:
    an exchange turns the signs of all of them.

    Source: the penalty on disagreement of uncertainty-penalised DPO; this form is ours.
    """
    differences = scores[:, 0] - scores[:, 1]  # (P, K)
    scales = torch.stack([_mean(distances) for distances in differences.abs().unbind(1)])
    return 1 / (1 + (differences / scales).std(dim=1, correction=0))


@dataclass(frozen=True)
class WeightFunction:
    """A row of [`WEIGHT_FUNCTIONS`].

    Args:
        function (`Callable`): From scores `(P, 2, K)` in float64 to weights `(P,)` of any mean.
        several_scorers (`bool`): Whether it reads several scores of each image; if not, K is 1.
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
    """Divide weights `(P,)` by their mean. The mean must be above 0. Weights of 1 stay 1 to the bit."""
    return weights / _mean(weights)


def calibrated_scores(rewards: torch.Tensor) -> torch.Tensor:
    """The expected share of wins of each image of a group: `c_i`, the mean of `sigma(r_i - r_j)` over all others `j`.

    An image is not compared with itself, so that of two images the one has `sigma(r_1 - r_2)` and the other its
    complement. One image alone has 1/2.

    Args:
        rewards (`torch.Tensor` of shape `(..., N)`): Of the different images of one prompt, for any number of prompts.

    Returns:
        `torch.Tensor` of the same shape: In `[0, 1]`.

    Source: https://huggingface.co/papers/2502.02588 (CaPO); that `j` is not `i` is our reading.
    """
    images = rewards.shape[-1]
    if images < 2:
        return torch.full_like(rewards, 0.5)
    parts = rewards.split(ROWS_AT_ONCE, dim=-1)
    wins = [torch.sigmoid(part[..., :, None] - rewards[..., None, :]).sum(dim=-1) for part in parts]
    return (torch.cat(wins, dim=-1) - 0.5) / (images - 1)  # without an image's 1/2 against itself


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of values `(P,)`. It is exact up to its last rounding, so it is equal on every machine."""
    return values.new_tensor(math.fsum(values.tolist()) / len(values))
