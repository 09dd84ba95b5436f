"""Compute ratings of images from comparisons of two images, by the Bradley-Terry model."""

from __future__ import annotations

import numpy as np

PRIOR = 3.0  # standard deviation of a rating before any comparison, in log odds


def bradley_terry(wins: np.ndarray, prior: float = PRIOR) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable ratings of K images, and the covariance of these ratings by Laplace's method.

    The model: image i is preferred to image j with the probability `sigmoid(rating[i] - rating[j])`. The prior of each
    rating is a normal distribution with mean 0.

    Args:
        wins (`np.ndarray` of shape `(K, K)`): `wins[i, j]` is the number of times that image i was preferred to image
            j. A tie adds one half to `wins[i, j]` and to `wins[j, i]`.
        prior (`float`): Standard deviation of the prior.

    Returns:
        `tuple`: Ratings of shape `(K,)`, and their covariance of shape `(K, K)`.
    """
    games = wins + wins.T
    ratings = np.zeros(len(wins))
    for _ in range(100):  # Newton's method; the log-probability is concave, so few steps are needed
        chance = 1 / (1 + np.exp(ratings[None, :] - ratings[:, None]))
        gradient = wins.sum(1) - (games * chance).sum(1) - ratings / prior**2
        information = games * chance * (1 - chance)
        precision = np.diag(information.sum(1) + prior**-2) - information
        step = np.linalg.solve(precision, gradient)
        ratings = ratings + np.clip(step, -2, 2)
        if np.abs(step).max(initial=0) < 1e-9:
            break
    return ratings, np.linalg.inv(precision)
