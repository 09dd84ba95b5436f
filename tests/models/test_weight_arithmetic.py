"""Averages, interpolations and LoRA scales of weights, by hand."""

import pytest
import torch

from trl_diffusion_sdpo.models.adapters import lora_scaling
from trl_diffusion_sdpo.models.ema import ema_decay
from trl_diffusion_sdpo.tools.guidance.arithmetic import interpolate


@pytest.mark.parametrize(("step", "expected"), [(1, 2 / 11), (8, 0.5), (80, 0.9), (81, 0.9), (10**6, 0.9)])
def test_the_decay_rises_to_its_bound(step, expected):
    assert ema_decay(step, 0.9) == expected


def test_an_interpolation_keeps_its_ends_exactly_and_the_dtype():
    base, tuned = torch.tensor([0.1, 2.0]).bfloat16(), torch.tensor([0.7, 1.0]).bfloat16()
    assert torch.equal(interpolate(base, tuned, 0.0), base) and torch.equal(interpolate(base, tuned, 1.0), tuned)
    assert interpolate(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 1.0]), 0.25).tolist() == [1.0, 1.75]
    assert interpolate(base, tuned, 0.5).dtype == torch.bfloat16


def test_a_lora_is_scaled_by_its_rank_or_the_root_of_it():
    assert lora_scaling(32, 16, rank_stabilized=False) == 2.0
    assert lora_scaling(32, 16, rank_stabilized=True) == 8.0
