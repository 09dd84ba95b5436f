"""Ratings of images from comparisons by the Bradley-Terry model, and the choice of the next pair to compare."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PRIOR = 3.0  # standard deviation of a rating before any comparison, in log odds
CERTAIN = 1.036  # standard deviations of a difference: its sign is right with a probability of 0.85
OFFERED = 16  # pairs of a prompt that are offered next, at most


def bradley_terry(wins: np.ndarray, prior: float = PRIOR) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable ratings, and their covariance by Laplace's method.

    The probability that image i is preferred to image j is `sigmoid(rating[i] - rating[j])`. Before any comparison,
    ratings are normal with mean 0.

    Args:
        wins (`np.ndarray` of shape `(K, K)`): How often image i was preferred to image j. A tie counts one half for
            both.
        prior (`float`): Standard deviation of a rating before any comparison.

    Returns:
        `tuple`: Ratings of shape `(K,)`, and their covariance of shape `(K, K)`.
    """
    games = wins + wins.T
    ratings = np.zeros(len(wins))
    for _ in range(100):  # Newton's method; the probability is concave, so few steps are needed
        chance = 1 / (1 + np.exp(ratings[None, :] - ratings[:, None]))
        gradient = wins.sum(1) - (games * chance).sum(1) - ratings / prior**2
        information = games * chance * (1 - chance)
        precision = np.diag(information.sum(1) + prior**-2) - information
        step = np.linalg.solve(precision, gradient)
        ratings = ratings + np.clip(step, -2, 2)
        if np.abs(step).max(initial=0) < 1e-9:
            break
    return ratings, np.linalg.inv(precision)


class Group:
    """Images of one prompt, their ratings, and the best next pairs.

    Args:
        names (`Iterable[str]`): The images.
        compared (`Iterable`): Comparisons: two images, and the share of the win that the first one gets: 1, 0.5, 0, or
            `None` for a skipped pair, which says nothing.
    """

    def __init__(self, names: Iterable[str], compared: Iterable[tuple[str, str, float | None]] = ()) -> None:
        self.names = list(names)
        count = len(self.names)
        index = {name: position for position, name in enumerate(self.names)}
        wins = np.zeros((count, count))
        judged = np.eye(count, dtype=bool)
        for first, second, share in compared:
            one, other = index[first], index[second]
            judged[one, other] = judged[other, one] = True
            if share is not None:
                wins[one, other] += share
                wins[other, one] += 1 - share
        self.ratings, covariance = bradley_terry(wins)
        difference = np.abs(self.ratings[:, None] - self.ratings[None, :])
        variance = np.diag(covariance)[:, None] + np.diag(covariance)[None, :] - 2 * covariance
        self.uncertain = ~judged & (difference < CERTAIN * np.sqrt(np.maximum(variance, 0)))
        chance = 1 / (1 + np.exp(-difference))
        # Information that a comparison brings, to first order. Images that were never shown come first.
        gain = chance * (1 - chance) * variance
        unseen = judged.sum(1) == 1
        gain += PRIOR**2 * (unseen[:, None].astype(float) + unseen[None, :])
        rows, columns = np.nonzero(np.triu(self.uncertain))
        order = np.argsort(-gain[rows, columns], kind="stable")[:OFFERED]
        self.open = len(rows)  # pairs whose order is still uncertain
        self.offers = [
            (float(gain[one, other]), self.names[one], self.names[other])
            for one, other in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
        ]

    def ranking(self) -> list[tuple[str, float, bool]]:
        """Return the images from the best to the worst, their ratings, and whether their rank is still uncertain."""
        order = np.argsort(-self.ratings, kind="stable").tolist()
        doubtful = self.uncertain.any(1)
        return [(self.names[index], float(self.ratings[index]), bool(doubtful[index])) for index in order]
