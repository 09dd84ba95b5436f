"""Noise by inversion: the published loops written out in float64, diffusers' own schedulers, and values by hand."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from trl_diffusion_sdpo.families.cogview4 import CogView4Process
from trl_diffusion_sdpo.families.inversion import KINDS, InversionSettings, inversion_of
from trl_diffusion_sdpo.families.noise import DDPMProcess, FlowMatchingProcess

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
STABLE_DIFFUSION = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}
T = torch.tensor([0, 1, 2, 199, 201, 202, 650, 801, 998, 999])
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def ddpm(**overrides):
    return DDPMProcess(DDIMScheduler(**{**STABLE_DIFFUSION, **overrides}).config)


def flow(**config):
    return FlowMatchingProcess(FlowMatchEulerDiscreteScheduler(**config).config)


def latents(rows=10):
    return torch.randn(rows, 4, 3, 3, generator=torch.Generator().manual_seed(0))


WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2


def column(values):
    return values.view(-1, 1, 1, 1)


def epsilon(noisy, timesteps):
    """A denoiser that is not linear and knows the time, in the dtype of its input."""
    mixed = torch.einsum("ij,njhw->nihw", WEIGHT.to(noisy.dtype), noisy)
    return torch.tanh(mixed + column(timesteps.to(noisy.dtype)) / 1000)


def published(clean, timestep, grid, *, kind, first, last_step, added=()):
    """The noise of one image, by the published loop on its latents, in float64. `grid` are all timesteps, `first` is
    alpha of the clean latents, and `last_step` adds the one that the published loop has not."""
    clean = clean.double()
    x, before, added = clean, first, list(added)
    for t in [t for t in grid if t < timestep] + ([timestep] if last_step else []):
        told, after = torch.tensor([t]), ALPHAS[t]

        def moved(e, x=x, before=before, after=after):
            return after.sqrt() * (x - (1 - before) ** 0.5 * e) / before**0.5 + (1 - after).sqrt() * e

        e = epsilon(x, told)
        if kind == "renoise":
            e = (e + epsilon(moved(e), told)) / 2
        above = ALPHAS[min(t + 1000 // len(grid), 999)]
        variance = (1 - after) / (1 - above) * (1 - above / after)  # DDIM's, from the next step of the grid down to t
        x, before = moved(e) + (added.pop(0) * variance**0.5 if added else 0), after
    a = ALPHAS[timestep]
    return (x - a.sqrt() * clean) / (1 - a).sqrt()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("config", "grid", "first"),
    [
        ({}, [1, 201, 401, 601, 801], ALPHAS[0]),
        ({"set_alpha_to_one": True, "steps_offset": 0}, [0, 200, 400, 600, 800], 1.0),
        ({"timestep_spacing": "linspace"}, [0, 250, 500, 749, 999], ALPHAS[0]),
    ],
)
def test_the_noise_is_that_of_the_published_loop(kind, config, grid, first):
    clean, inversion = latents(), inversion_of(ddpm(**config))
    for end in ("grid", "exact"):
        ours = inversion.noise(epsilon, clean, T, InversionSettings(kind, 5, end))
        loop = {"kind": kind, "first": first if end == "grid" else 1.0, "last_step": end == "exact"}
        expected = [published(row[None], int(t), grid, **loop) for row, t in zip(clean, T, strict=True)]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), torch.cat(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["grid", "exact"])
def test_added_noise_is_that_of_the_published_loop(kind, end):
    """Noise is added after every step, also the first: 0.1 times the deviation of DDIM's next step."""
    clean, inversion, drawn = latents(), inversion_of(ddpm()), []

    def draw():
        drawn.append(torch.randn(clean.shape, generator=torch.Generator().manual_seed(len(drawn))))
        return drawn[-1]

    ours = inversion.noise(epsilon, clean, T, InversionSettings(kind, 5, end, 0.1), draw=draw)
    loop = {"kind": kind, "first": ALPHAS[0] if end == "grid" else 1.0, "last_step": end == "exact"}
    grid, expected = [1, 201, 401, 601, 801], []
    for row, t in enumerate(T):
        below = sum(step < t for step in grid)
        of_row = [0.1 * each[row : row + 1].double() for each in drawn]
        added = of_row[:below] + ([of_row[below]] if end == "exact" else [])
        expected.append(published(clean[row : row + 1], int(t), grid, added=added, **loop))
    assert len(drawn) == (5 if end == "grid" else 6)
    torch.testing.assert_close(ours.double(), torch.cat(expected), rtol=1e-4, atol=3e-5)


def test_the_published_walk_is_that_of_diffusers_inverse_scheduler():
    """All steps are taken, because the timestep is above the grid."""
    clean, scheduler = latents(1).double(), DDIMInverseScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(10)
    x = clean
    for t in scheduler.timesteps:
        x = scheduler.step(epsilon(x, t[None]), int(t), x).prev_sample
    a = ALPHAS[950]
    ours = inversion_of(ddpm()).noise(epsilon, clean, torch.tensor([950]), InversionSettings(end="grid"))
    torch.testing.assert_close(a.sqrt() * clean + (1 - a).sqrt() * ours, x, rtol=1e-4, atol=1e-5)


def test_a_linear_denoiser_by_hand():
    """Epsilon is half of the latents. One step from clean latents to T: n = e = x / 2 with one call; with two, the
    second is half of `y = a x + b x / 2`."""
    clean, t = torch.full((1, 1, 1, 1), 2.0), torch.tensor([500])
    a, b = float(ALPHAS[500].sqrt()), float((1 - ALPHAS[500]).sqrt())
    one = InversionSettings("ddim", 1)
    inversion = inversion_of(ddpm(timestep_spacing="trailing"))  # of one step: 999, so that 500 is reached at once
    assert float(inversion.noise(lambda x, t: x / 2, clean, t, one)) == 1.0
    y = a * 2.0 + b * 1.0
    found = float(inversion.noise(lambda x, t: x / 2, clean, t, InversionSettings("renoise", 1)))
    assert found == pytest.approx((1.0 + y / 2) / 2)
    # A flow of velocity x / 2, to sigma 0.5 over 0.25: x = 2, 2.25, then n = (x - 0.5 * 2) / 0.5.
    x = 2 + 0.25 * 1.0
    x += 0.25 * x / 2
    found = float(
        inversion_of(flow()).noise(lambda x, t: x / 2, clean, torch.tensor([500.0]), InversionSettings("ddim", 4))
    )
    assert found == pytest.approx((x - 0.5 * 2) / 0.5)


def as_prediction(prediction_type):
    """The denoiser above as a network of another prediction type: by `v = a e - b x0` and `x = a x0 + b e`."""

    def predict(noisy, timesteps):
        a = column(ALPHAS[timesteps].to(noisy.dtype))
        e = epsilon(noisy, timesteps)
        clean = (noisy - (1 - a).sqrt() * e) / a.sqrt()
        velocity = a.sqrt() * e - (1 - a).sqrt() * clean
        return {"epsilon": e, "v_prediction": velocity, "sample": clean}[prediction_type]

    return predict


def test_a_network_has_the_same_inversion_whatever_it_predicts():
    clean, settings = latents(), InversionSettings("renoise", 5)
    expected = inversion_of(ddpm()).noise(epsilon, clean, T, settings)
    for name in ("v_prediction", "sample"):
        ours = inversion_of(ddpm(prediction_type=name)).noise(as_prediction(name), clean, T, settings)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_a_flow_without_noise_has_the_noise_that_its_velocity_points_to():
    clean, t = latents(4), torch.tensor([0.0, 1e-30, 1e-4, 1000.0])
    exact = inversion_of(flow()).noise(epsilon, clean, t, InversionSettings(steps=4))
    torch.testing.assert_close(exact[:3], (clean + epsilon(clean, t))[:3])
    grid = inversion_of(flow()).noise(epsilon, clean, t, InversionSettings(steps=4, end="grid"))
    assert torch.equal(grid[0], torch.zeros_like(clean[0]))
    assert exact.isfinite().all() and grid.isfinite().all()


def test_timesteps_before_the_shift_have_the_levels_after_it():
    """A velocity of `1 + x` from clean latents of 0: Euler's steps by hand. The factor of the shift is
    `0.25 + 0.75 sqrt(16 / 256) = 0.4375` for 16 tokens."""
    config = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    process = CogView4Process(FlowMatchEulerDiscreteScheduler(**config).config)
    told = []

    def predict(noisy, timesteps):
        told.append(timesteps.tolist())
        return 1 + noisy

    clean, t = torch.zeros(1, 4, 8, 8), torch.tensor([600.0])
    noise = inversion_of(process).noise(predict, clean, t, InversionSettings(steps=4), image_seq_len=16)
    sigmas, x = [0.4375 * level / (1 - 0.5625 * level) for level in (0, 0.25, 0.5, 0.6)], 0.0
    for start, end in zip(sigmas, sigmas[1:], strict=False):
        x += (end - start) * (1 + x)
    torch.testing.assert_close(noise, torch.full_like(noise, x / sigmas[-1]))
    assert told == [[250.0], [500.0], [600.0], [600.0]]
