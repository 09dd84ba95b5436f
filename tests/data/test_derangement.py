"""No value lands on one equal to it, and no place is preferred where there is a choice."""

from collections import Counter

import numpy as np
import pytest

from trl_diffusion_sdpo.data.permuted_losers import derangement

AWKWARD = {
    "two": [0, 1],
    "all different": list(range(9)),
    "half of one": [7] * 5 + [1, 2, 3, 4, 5],
    "two halves": [3, 4] * 6,
    "half of an odd number, rounded down": [7] * 4 + [1, 1, 2, 3, 3],
    "thirds": [0] * 4 + [1] * 4 + [2] * 4,
    "nearly half and one more": [0] * 5 + [1] * 5 + [2],
    "negative and large": [-(2**63), 2**63 - 1, -(2**63), 0],
}


@pytest.mark.parametrize("values", AWKWARD.values(), ids=AWKWARD)
def test_every_place_is_given_once_and_never_to_an_equal_value(values):
    values = np.array(values, dtype=np.int64)
    for seed in range(300):
        image = derangement(values, [seed, 0])
        assert sorted(image.tolist()) == list(range(len(values)))
        assert (values[image] != values).all()


def test_every_permutation_that_is_allowed_is_drawn_about_as_often():
    """Two of one value among four: the 2 x 2 ways to give each half the places of the other, 1000 of 4000 times each;
    four different values: all 9 permutations without a fixed point. Within four standard deviations."""
    for values, ways in (([0, 0, 1, 2], 4), ([0, 1, 2, 3], 9)):
        drawn = Counter(tuple(derangement(np.array(values), [seed]).tolist()) for seed in range(4000))
        assert len(drawn) == ways
        assert all(abs(count - 4000 / ways) < 4 * (4000 / ways) ** 0.5 for count in drawn.values()), drawn
