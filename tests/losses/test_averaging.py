"""The decay of an average of weights, by hand."""

import pytest

from trl_diffusion_sdpo.losses import ema_decay


@pytest.mark.parametrize(("step", "expected"), [(1, 2 / 11), (8, 0.5), (80, 0.9), (81, 0.9), (10**6, 0.9)])
def test_the_decay_rises_to_its_bound(step, expected):
    assert ema_decay(step, 0.9) == expected
