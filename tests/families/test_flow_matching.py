"""Flow matching and the densities of noise levels, against their papers' formulas and diffusers' own scheduler."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from trl_diffusion_sdpo.families.noise import DDPMProcess, FlowMatchingProcess, TimestepSampling

DRAWS = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 2**-24])
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def process(**config):
    return FlowMatchingProcess(FlowMatchEulerDiscreteScheduler(**config).config)


def test_noisy_latents_and_target_follow_the_formula():
    # sigma = 250 / 1000: 0.75 * 4 + 0.25 * 8 = 5; velocity 8 - 4.
    latents, noise = torch.full((2, 1, 2, 2), 4.0), torch.full((2, 1, 2, 2), 8.0)
    timesteps = torch.tensor([250.0, 1000.0])
    noisy = process().add_noise(latents, noise, timesteps)
    assert noisy[0].unique().tolist() == [5.0]
    assert noisy[1].unique().tolist() == [8.0]
    assert process().target(latents, noise, timesteps).unique().tolist() == [4.0]


def test_uniform_draws_are_shifted_as_the_scheduler_shifts_its_sigmas():
    # Equation 23 of arXiv 2403.03206 with shift 3: 3 t / (1 + 2 t); at 1/2 it is 3/4.
    timesteps = process(shift=3.0).timesteps(DRAWS)
    assert timesteps[3] == 750.0
    torch.testing.assert_close(timesteps, 1000 * 3 * DRAWS / (1 + 2 * DRAWS))
    assert timesteps.dtype == torch.float32


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (2176, 0.825)])
def test_dynamic_shift_follows_the_number_of_tokens(kind, tokens, mu):
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type=kind)
    expected = 1000 * scheduler.time_shift(mu, 1.0, DRAWS[1:])
    ours = FlowMatchingProcess(scheduler.config).timesteps(DRAWS[1:], image_seq_len=tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_logit_normal_draws_have_the_normals_quantiles_on_the_logit_scale():
    sampling = TimestepSampling("logit_normal", logit_mean=0.5, logit_std=2.0)
    # The normal's quantile at 0.5 is 0 and at 0.975 is 1.95996 (tables).
    draws = torch.tensor([0.5, 0.975, 0.025])
    expected = torch.tensor([0.5, 0.5 + 2 * 1.959964, 0.5 - 2 * 1.959964]).sigmoid() * 1000
    torch.testing.assert_close(process().timesteps(draws, sampling=sampling), expected, rtol=1e-4, atol=1e-2)


def test_mode_draws_are_the_papers_at_one_minus_the_draw():
    # Equation 20: f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u).
    u = 1 - DRAWS.double()
    expected = 1 - u - 1.29 * ((math.pi * u / 2).cos() ** 2 - 1 + u)
    ours = process().timesteps(DRAWS, sampling=TimestepSampling("mode", mode_scale=1.29))
    torch.testing.assert_close(ours.double(), 1000 * expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("scheme", "config"), [("none", {"shift": 3.0}), ("logit_normal", DYNAMIC), ("mode", {})])
def test_a_timestep_range_is_the_density_cut_to_it(scheme, config):
    """Draws of the whole density that fall into the range have the quantiles of the cut one."""
    flow, sampling = process(**config), TimestepSampling(scheme)
    shares = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:-1]
    every = flow.timesteps(shares.float(), sampling=sampling, image_seq_len=1024)
    inside = every[(every >= 300) & (every < 600)]
    draws = torch.tensor([0.0, 0.2, 0.5, 0.8, 1 - 2**-24])
    cut = flow.timesteps(draws, sampling=sampling, image_seq_len=1024, timestep_range=(300, 600))
    expected = inside[(draws * (len(inside) - 1)).long()]
    torch.testing.assert_close(cut, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_discrete_timesteps_know_the_same_densities(scheme):
    config = DDPMScheduler(beta_schedule="scaled_linear").config
    sampling = TimestepSampling(scheme)
    discrete = DDPMProcess(config).timesteps(DRAWS, sampling=sampling)
    continuous = process().timesteps(DRAWS, sampling=sampling)
    assert discrete.dtype == torch.int64
    assert torch.equal(discrete, continuous.floor().long().clamp(0, 999))
    cut = DDPMProcess(config).timesteps(DRAWS, sampling=sampling, timestep_range=(500, 510))
    assert (cut[0], cut[-1]) == (500, 509)


def test_snr_and_the_weights_of_a_flow():
    timesteps = torch.tensor([200.0, 500.0, 1000.0])
    torch.testing.assert_close(process().snr(timesteps), torch.tensor([16.0, 1.0, 0.0]))
    weights = process().weights(timesteps, weighting="one_minus_t_squared")
    torch.testing.assert_close(weights, torch.tensor([0.64, 0.25, 0.0]))
    assert process().weights(timesteps) is None


def test_given_timesteps_are_drawn_alone_and_equally_often():
    draws = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.75, 1 - 2**-24, 1.0])
    ddpm = DDPMProcess(DDPMScheduler(beta_schedule="scaled_linear").config)
    assert ddpm.timesteps(draws, only=(999, 749, 499, 249)).tolist() == [999, 999, 749, 499, 249, 249, 249]
    assert process(**DYNAMIC).timesteps(draws[:2], only=(1000.0, 512.5)).tolist() == [1000.0, 1000.0]
