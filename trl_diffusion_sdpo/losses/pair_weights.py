"""Score gaps, loss weights of pairs, and calibrated scores, from the scores of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS_AT_ONCE = 1024  # images compared at once with all images of their prompt, to bound memory
BIN = 0.01  # width of the bins in which [`rarity_weights`] counts scores


def score_gaps(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return score gaps: by how much the winner's score exceeds the loser's, at least 0.

    Args:
        scores (`torch.Tensor` of shape `(P, 2, ...)`): Scores of winner and loser.
        sorts_by_scores (`bool`): Whether the loss exchanges winner and loser if the loser has the higher score. If so,
            the gap is the absolute difference of the scores; otherwise such a pair, whose label contradicts its scores,
            has gap 0.

    Returns:
        `torch.Tensor` of shape `(P, ...)`.
    """
    gaps = scores[:, 0] - scores[:, 1]
    return gaps.abs() if sorts_by_scores else gaps.relu()


def gap_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return the score gaps of pairs as weights `(P,)`, from scores `(P, 2, 1)`.

    Divided by their mean ([`with_mean_one`]), they do not depend on the scale of the scores.

    The formula is ours.
    """
    return score_gaps(scores, sorts_by_scores=sorts_by_scores)[:, 0]


def gain_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `(P,)` proportional to the gap of the gains `2^score`, from scores `(P, 2, 1)`.

    Divided by their mean ([`with_mean_one`]), they stay the same if a constant is added to all scores, but not if all
    scores are multiplied by a factor.

    Source: the gains of RankDPO (https://huggingface.co/papers/2410.18013), without its discounts by rank.
    """
    gains = torch.exp2(scores - scores.max())  # the largest gain is 1, so no gain overflows
    return score_gaps(gains, sorts_by_scores=sorts_by_scores)[:, 0]


def inverse_gap_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `1 / (1 + gap / mean gap)`, `(P,)`, from scores `(P, 2, 1)`.

    A gap of 0 has weight 1, the mean gap 1/2.

    Source: the weights of MADPO (https://huggingface.co/papers/2510.05342) are larger for small gaps; the formula here
    is ours.
    """
    gaps = gap_weights(scores, sorts_by_scores=sorts_by_scores)
    return 1 / (1 + gaps / _mean(gaps))


def rarity_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `1 / sqrt(n_w n_l)`, `(P,)`, from scores `(P, 2, 1)`: pairs with rare scores weigh more.

    `n_w` and `n_l` are how many of the `2P` scores lie in the winner's and in the loser's bin of width [`BIN`].
    `sorts_by_scores` has no effect: exchanging winner and loser leaves the weight as it is.

    Source: VideoDPO (https://huggingface.co/papers/2412.14167), `(c / sqrt(p_w p_l))^a` with the shares `p` of all
    scores in a bin, known to us from a summary. Division by the mean ([`with_mean_one`]) removes `c`; `a` is 1, as in
    the published code.
    """
    bins = (scores[..., 0] / BIN).round()  # (P, 2); rounding keeps scores of two decimals off the edges of bins
    _, bin_of_score, counts = bins.unique(return_inverse=True, return_counts=True)
    return 1 / counts[bin_of_score].double().prod(dim=1).sqrt()


def agreement_weights(scores: torch.Tensor, *, sorts_by_scores: bool) -> torch.Tensor:
    """Return weights `1 / (1 + s)`, `(P,)`, from scores `(P, 2, K)` of K scorers that disagree by `s`.

    `s` is the standard deviation of a pair's K score differences `winner - loser`, each scorer's divided by their mean
    absolute value. `sorts_by_scores` has no effect: exchanging winner and loser changes the sign of all differences,
    which leaves `s` as it is.

    Source: uncertainty-penalised DPO (https://huggingface.co/papers/2410.20187) penalises uncertain rewards; the
    formula here is ours.
    """
    differences = scores[:, 0] - scores[:, 1]  # (P, K)
    scales = torch.stack([_mean(distances) for distances in differences.abs().unbind(1)])
    return 1 / (1 + (differences / scales).std(dim=1, correction=0))


@dataclass(frozen=True)
class WeightFunction:
    """A function that computes weights of pairs, an entry of [`WEIGHT_FUNCTIONS`].

    Args:
        function (`Callable`): Takes scores `(P, 2, K)` in float64 and returns weights `(P,)`.
        several_scorers (`bool`): Whether it compares several scorers. If `False`, K is 1.
        reads_gaps (`bool`): Whether it reads the gap, which is 0 if the label contradicts the scores.
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
    """Return each image's calibrated score: its expected share of wins against the other images of its prompt.

    For image `i`, this is the mean of `sigma(r_i - r_j)` over all other images `j` of the prompt, or 1/2 if there are
    none.

    Args:
        rewards (`torch.Tensor` of shape `(..., N)`): Scores of a prompt's N different images. The dimensions before the
            last index prompts.

    Returns:
        `torch.Tensor` of the same shape: Shares in `[0, 1]`.

    Source: CaPO (https://huggingface.co/papers/2502.02588), which does not say whether an image is also compared with
    itself. Here it is not.
    """
    images = rewards.shape[-1]
    if images < 2:
        return torch.full_like(rewards, 0.5)
    chunks = rewards.split(ROWS_AT_ONCE, dim=-1)
    wins = [torch.sigmoid(chunk[..., :, None] - rewards[..., None, :]).sum(dim=-1) for chunk in chunks]
    return (torch.cat(wins, dim=-1) - 0.5) / (images - 1)  # subtract the comparison of each image with itself, 1/2


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of values `(P,)`. The sum is rounded only once, so it is equal on every machine."""
    return values.new_tensor(math.fsum(values.tolist()) / len(values))
