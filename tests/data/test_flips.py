"""The flips of many pairs, drawn at once, are those of each pair's own generator."""

import numpy as np
import pytest

from trl_diffusion_sdpo.data import flips
from trl_diffusion_sdpo.data.transforms import PairDraws


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**40 + 3, 2**70])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_flips_are_those_of_each_pairs_own_generator(seed, epoch, monkeypatch):
    monkeypatch.setattr(flips, "AT_ONCE", 60)  # several parts, the last one smaller
    expected = [PairDraws.from_key(seed, epoch, pair).flip < 0.5 for pair in range(200)]
    assert flips.mirrored(seed, epoch, 200).tolist() == expected
    expected = [PairDraws.from_key(seed, epoch, pair).dropout < 0.3 for pair in range(200)]
    assert flips.emptied(seed, epoch, 200, 0.3).tolist() == expected


def test_flips_of_late_pairs_and_of_none():
    mask = flips.mirrored(3, 1, 200_000)
    for pair in np.random.default_rng(0).integers(65_536, 200_000, 50).tolist():
        assert mask[pair] == (PairDraws.from_key(3, 1, pair).flip < 0.5)
    assert flips.mirrored(3, 1, 0).shape == (0,)
