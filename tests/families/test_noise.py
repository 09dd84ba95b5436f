"""The DDPM noise process against the formulas of its papers in float64, and the noise levels of all processes."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from trl_diffusion_sdpo.families.cogview4 import CogView4Process
from trl_diffusion_sdpo.families.noise import DDPMProcess, FlowMatchingProcess
from trl_diffusion_sdpo.utils.errors import UserError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 500, 998, 999])


def process(**overrides):
    return DDPMProcess(DDPMScheduler(**{**BETAS, **overrides}).config)


EVERY_ALPHA = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
ALPHAS = EVERY_ALPHA[T]
LEVELS = (1 - EVERY_ALPHA).sqrt() / (EVERY_ALPHA.sqrt() + (1 - EVERY_ALPHA).sqrt())


def latents_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, len(T), 4, 3, 3, generator=generator).unbind()


def column(values):
    return values.view(-1, 1, 1, 1)


def test_noisy_latents_follow_the_formula():
    latents, noise = latents_and_noise()
    a = column(ALPHAS)
    expected = a.sqrt() * latents.double() + (1 - a).sqrt() * noise.double()
    torch.testing.assert_close(process().add_noise(latents, noise, T).double(), expected, rtol=1e-4, atol=1e-5)


def test_targets_are_noise_velocity_and_clean_latents():
    latents, noise = latents_and_noise()
    a = column(ALPHAS)
    velocity = a.sqrt() * noise.double() - (1 - a).sqrt() * latents.double()
    assert torch.equal(process().target(latents, noise, T), noise)
    assert torch.equal(process(prediction_type="sample").target(latents, noise, T), latents)
    ours = process(prediction_type="v_prediction").target(latents, noise, T)
    torch.testing.assert_close(ours.double(), velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_follow_the_paper(prediction_type):
    a = ALPHAS
    snr = a / (1 - a)
    capped = snr.clamp(max=5.0)
    expected = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[prediction_type]
    weights = process(prediction_type=prediction_type).min_snr_weights(T, 5.0)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=1e-7)


def test_gamma_is_5_unless_given_and_only_min_snr_takes_one():
    ddpm = process()
    for given, used in ((None, 5.0), (1.0, 1.0)):
        weights = ddpm.weights(T, weighting="min_snr", snr_gamma=given)
        assert torch.equal(weights, ddpm.min_snr_weights(T, used))
    assert ddpm.weights(T) is None
    with pytest.raises(UserError, match="`snr_gamma`.*3.0.*'none'"):
        ddpm.weights(T, snr_gamma=3.0)


def test_min_snr_weight_of_pure_noise_is_finite():
    pure_noise = process(rescale_betas_zero_snr=True)
    last = torch.tensor([999])
    assert pure_noise.snr(last) == 0
    assert pure_noise.min_snr_weights(last, 5.0) == 1
    v = process(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert v.min_snr_weights(last, 5.0) == 0 and v.noise_level(last) == 1


def test_uniform_draws_reach_both_ends_and_nothing_beyond():
    draws = torch.tensor([0.0, 0.0009, 0.001001, 0.5, 0.999999, 1 - 2**-24])
    assert process().timesteps(draws).tolist() == [0, 0, 1, 500, 999, 999]
    assert process().timesteps(draws).dtype == torch.int64
    assert process().timesteps(torch.ones(1)) == 999


def test_timestep_range_includes_its_lower_end_and_excludes_its_upper_one():
    draws = torch.tensor([0.0, 0.3, 0.5, 0.999999, 1 - 2**-24])
    # Four timesteps 100 to 103: 0.3 * 4 = 1.2, 0.5 * 4 = 2.
    assert process().timesteps(draws, timestep_range=(100, 104)).tolist() == [100, 101, 102, 103, 103]
    assert process().timesteps(draws, timestep_range=(999, 1000)).tolist() == [999] * 5


def test_the_noise_level_follows_from_the_betas():
    levels = process().noise_level(torch.arange(1000))
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels.double(), LEVELS, rtol=2e-4, atol=0)


def test_the_noise_level_of_a_flow_is_sigma_whatever_the_shift():
    timesteps = torch.tensor([0.0, 1.0, 250.0, 333.25, 1000.0])
    for config in ({}, {"shift": 3.0}, {"use_dynamic_shifting": True}):
        flow = FlowMatchingProcess(FlowMatchEulerDiscreteScheduler(**config).config)
        assert flow.noise_level(timesteps).tolist() == pytest.approx([0, 0.001, 0.25, 0.33325, 1], rel=1e-6)


def test_the_noise_level_of_cogview4_is_that_after_the_shift():
    config = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    cogview = CogView4Process(FlowMatchEulerDiscreteScheduler(**config).config)
    # mu = 0.25 + 0.75 sqrt(1024 / 256) = 1.75, and a half becomes 1.75 * 0.5 / (1 + 0.75 * 0.5).
    assert float(cogview.noise_level(torch.tensor([500.0]), 1024)) == pytest.approx(0.875 / 1.375, rel=1e-6)
    with pytest.raises(ValueError, match="`image_seq_len`"):
        cogview.noise_level(torch.tensor([500.0]))


def test_a_scheduler_of_another_process_is_refused():
    with pytest.raises(ValueError, match="`beta_schedule`"):
        DDPMProcess(FlowMatchEulerDiscreteScheduler().config)
