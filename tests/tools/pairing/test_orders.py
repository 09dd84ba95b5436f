"""Ratings of images, and the choice of the next pair to compare."""

import numpy as np
import pytest

from trl_diffusion_sdpo.tools.pairing.orders import Group, bradley_terry


def test_two_images_by_hand():
    """With prior deviation s, the rating r solves 1 - sigmoid(2 r) = r / s^2 for the winner; the loser has -r."""
    ratings, covariance = bradley_terry(np.array([[0.0, 1.0], [0.0, 0.0]]), prior=2.0)
    assert ratings[0] == -ratings[1] and 1 / (1 + np.exp(2 * ratings[0])) == pytest.approx(ratings[0] / 4)
    information = np.exp(2 * ratings[0]) / (1 + np.exp(2 * ratings[0])) ** 2
    precision = np.array([[information + 0.25, -information], [-information, information + 0.25]])
    np.testing.assert_allclose(covariance @ precision, np.eye(2), atol=1e-12)


def test_ties_are_equal_and_many_wins_converge():
    assert bradley_terry(np.array([[0, 0.5], [0.5, 0]]))[0] == pytest.approx(0)
    wins = np.triu(np.full((12, 12), 50.0), 1)
    ratings, covariance = bradley_terry(wins)
    assert np.isfinite(covariance).all() and (np.diff(ratings) < 0).all()


def test_unseen_images_come_first_then_close_ratings():
    group = Group("abcd")
    compared = []
    seen = []
    while group.offers:
        _, first, second = group.offers[0]
        seen.append({first, second})
        compared.append((first, second, float(first < second)))  # a is the best
        group = Group(group.names, compared)
    assert seen[0] | seen[1] == set("abcd")
    names, _, uncertain = zip(*group.ranking(), strict=True)
    assert names == tuple("abcd") and not any(uncertain)
    assert len(seen) < 6 and {"a", "d"} not in seen  # the best and the worst are clear from other picks


def test_skipped_pairs_are_not_asked_again_and_say_nothing():
    group = Group("ab", [("a", "b", None)])
    assert not group.offers and (group.ratings == 0).all()
