"""The study of step pairs: its steps are diffusers' DDIM steps, and its gradients those of the written formulas."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "studies"), str(ROOT / "benchmarks")]

from diffusers import DDIMScheduler  # noqa: E402
from step_pairs import STEPS, Sampler, Settings, StepPairs, draw_pairs, gradients  # noqa: E402

from trl_diffusion_sdpo.tools.demo.pipeline import load_base_pipeline  # noqa: E402


@pytest.fixture(scope="module")
def sampler():
    return Sampler(load_base_pipeline(), ["a red circle on white", "a blue square on black"])


def latents(seed, count=4):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", [0, 5, STEPS - 2])
def test_a_step_is_that_of_diffusers(sampler, level):
    scheduler = DDIMScheduler.from_config(sampler.pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    states, noise, drawn = latents(0), latents(1), latents(2)
    theirs = scheduler.step(noise, sampler.timesteps[level], states, eta=1.0, variance_noise=drawn).prev_sample
    of_state, of_noise, variance = sampler.step(level)
    torch.testing.assert_close(of_state * states + of_noise * noise + variance**0.5 * drawn, theirs)


def test_the_targets_of_a_pair_lead_to_its_continuations(sampler):
    drawn = draw_pairs(sampler, sampler.pipeline.unet, Settings(1, prompts=3, gap=-1.0), generator(), None)
    assert [pairs.level for pairs in drawn] == list(range(8))
    of_state, of_noise, variance = sampler.step(0)
    noise = sampler.noise_at(sampler.pipeline.unet, 0, drawn[0].states, drawn[0].prompts)
    step = (of_noise * (drawn[0].winner - noise)) / variance**0.5  # the noise that was drawn
    assert step.std().item() == pytest.approx(1, abs=0.1)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("weights", ["even", "published"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_two_gradients_are_those_of_the_loss(sampler, weights, clip):
    policy, reference = load_base_pipeline().unet, sampler.pipeline.unet
    pairs = StepPairs(3, latents(0), torch.tensor([0, 1, 0, 1]), latents(1), latents(2))
    online = Settings(1, weights=weights, clip=clip, beta=2.0)
    shifted = [policy.conv_out.bias]
    with torch.no_grad():
        policy.conv_out.bias += 0.01
    winner, loser = gradients(sampler, policy, reference, pairs, online, shifted)

    _, of_noise, variance = sampler.step(3)
    noise = sampler.noise_at(policy, 3, pairs.states, pairs.prompts)
    before = sampler.noise_at(reference, 3, pairs.states, pairs.prompts).detach()
    factor = 0.5 if weights == "even" else of_noise**2 / (2 * variance)
    logs = [
        factor * ((before - target).square() - (noise - target).square()).mean((1, 2, 3))
        for target in (pairs.winner, pairs.loser)
    ]
    ratios = logs if clip is None else [log.exp().clamp(1 - clip, 1 + clip) for log in logs]
    loss = -logsigmoid(online.beta * (ratios[0] - ratios[1])).mean()
    torch.testing.assert_close(winner[0] - loser[0], torch.autograd.grad(loss, shifted)[0])
