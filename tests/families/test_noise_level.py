"""The share of noise at a timestep: from the betas in float64 under DDPM, and sigma itself under flow matching."""

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from trl_diffusion_sdpo.families.cogview4 import CogView4Process
from trl_diffusion_sdpo.families.noise import DDPMProcess, FlowMatchingProcess

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EVERY = torch.arange(1000)


def ddpm(**overrides):
    return DDPMProcess(DDPMScheduler(**{**BETAS, **overrides}).config)


def flow(**overrides):
    return FlowMatchingProcess(FlowMatchEulerDiscreteScheduler(**overrides).config)


def alphas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def levels_by_hand():
    a = alphas()
    return (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())


def test_under_ddpm_it_follows_from_the_betas():
    levels = ddpm().noise_level(EVERY)
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels.double(), levels_by_hand(), rtol=2e-4, atol=0)


def test_without_any_signal_it_is_one():
    process = DDPMProcess(EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True).config)
    assert process.noise_level(torch.tensor([999])) == 1


def test_under_flow_matching_it_is_sigma_whatever_the_shift():
    timesteps = torch.tensor([0.0, 1.0, 250.0, 333.25, 1000.0])
    for process in (flow(), flow(shift=3.0), flow(use_dynamic_shifting=True)):
        assert process.noise_level(timesteps).tolist() == pytest.approx([0, 0.001, 0.25, 0.33325, 1], rel=1e-6)


def test_where_timesteps_are_those_before_the_shift_it_is_that_after():
    process = CogView4Process(
        FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            time_shift_type="linear",
        ).config
    )
    # mu = 0.25 + 0.75 sqrt(1024 / 256) = 1.75, and a half becomes 1.75 * 0.5 / (1 + 0.75 * 0.5).
    assert float(process.noise_level(torch.tensor([500.0]), 1024)) == pytest.approx(0.875 / 1.375, rel=1e-6)
    # Level 0.7 is t = 0.7 / (1.75 - 0.75 * 0.7) = 0.5714..., and 572 is the first timestep above it.
    low, high = process.timestep_bounds(0.7, 1.0, 1024)
    assert (low, high) == (572.0, 999.0)
    with pytest.raises(ValueError, match="`image_seq_len`"):
        process.noise_level(torch.tensor([500.0]))


@pytest.mark.parametrize(("low", "high"), [(0.62, 1.0), (0.3, 0.4)])
def test_timesteps_within_levels_are_found_by_hand(low, high):
    levels = levels_by_hand()
    inside = [step for step in range(1000) if low <= levels[step] <= high]
    assert ddpm().timestep_bounds(low, high) == (inside[0], inside[-1])


def test_no_timestep_is_within_levels_that_the_schedule_does_not_visit():
    assert levels_by_hand().max() < 0.94
    assert ddpm().timestep_bounds(0.95, 1.0) is None
    assert ddpm().timestep_bounds(0.0, 0.02) is None
