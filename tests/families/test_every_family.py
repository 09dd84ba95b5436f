"""What a family predicts, adds and encodes is what the real pipeline's own call does, for every kind of model."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny_pipelines import CASES, case, quiet

from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.families.noise import FlowMatchingProcess, generators_of
from trl_diffusion_sdpo.models.pipelines import load_pipeline

PROMPTS = ["red circle", "a much longer blue square", ""]
STEPS = 4


def unchanged(tensor):
    return tensor


@pytest.fixture(params=CASES, scope="module")
def model(request, family_folder):
    """One kind of model: its pipeline, loaded as a user's is, its family, and how the pipeline lays out latents."""
    module = case(request.param)
    pipeline = quiet(load_pipeline(family_folder(request.param)))
    layout = {name: vars(module).get(name, unchanged) for name in ("to_pipeline", "from_pipeline")}
    return SimpleNamespace(module=module, pipeline=pipeline, family=find_family(pipeline), **layout)


def recording(scheduler, replace):
    """Return a copy of the scheduler that records its steps. Every step returns `replace`, if this is not `None`."""
    steps = []

    class Recording(type(scheduler)):
        @functools.wraps(type(scheduler).set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            self.mu = kwargs.get("mu")
            super().set_timesteps(*args, **kwargs)

        @functools.wraps(type(scheduler).step)
        def step(self, model_output, timestep, sample, **kwargs):
            result = super().step(model_output, timestep, sample, **{**kwargs, "return_dict": True})
            steps.append(SimpleNamespace(prediction=model_output, timestep=timestep, noisy=sample, result=result))
            return result if replace is None else type(result)(prev_sample=replace)

    return Recording.from_config(scheduler.config), steps


def run(model, prompts, replace=None, **options):
    """One call of the pipeline without guidance; what its scheduler met, and the result."""
    own = model.pipeline.scheduler
    model.pipeline.scheduler, steps = recording(own, replace)
    size = {"height": model.module.RESOLUTION, "width": model.module.RESOLUTION}
    call = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), **size, **model.module.CALL}
    try:
        with torch.no_grad():
            result = model.pipeline(prompt=list(prompts), **{**call, **options}, return_dict=False)[0]
    finally:
        scheduler, model.pipeline.scheduler = model.pipeline.scheduler, own
    return result, steps, scheduler


def conditioning_of(model, prompts):
    side = model.module.RESOLUTION
    sizes = torch.full((len(prompts), 2), side)
    with torch.no_grad():
        encoded = model.family.encode_prompts(prompts)
    return {**encoded, **model.family.size_conditioning(sizes, torch.zeros_like(sizes), (side, side))}


def latents_of(model, rows, seed=1):
    side = model.module.RESOLUTION
    pixels = torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        return pixels, model.family.encode_images(pixels)


def predict(model, latents, timesteps, conditioning):
    with torch.no_grad():
        return model.family.predict(model.family.denoiser, latents, timesteps, conditioning)


@pytest.fixture(scope="module")
def called(model):
    """The recorded steps of one call of the pipeline, and its scheduler."""
    _, steps, scheduler = run(model, PROMPTS, output_type="latent")
    return steps, scheduler


def test_predict_reproduces_what_the_pipeline_hands_to_its_scheduler(model, called):
    steps, scheduler = called
    conditioning = conditioning_of(model, PROMPTS)
    assert len(steps) == STEPS
    for index, step in enumerate(steps):
        noisy = model.from_pipeline(step.noisy)
        if isinstance(scheduler, EulerDiscreteScheduler):
            noisy = noisy / (scheduler.sigmas[index] ** 2 + 1) ** 0.5  # what Euler's steps hold is not scaled yet
        timesteps = torch.as_tensor(step.timestep).expand(len(PROMPTS))
        prediction = predict(model, noisy, timesteps, conditioning)
        torch.testing.assert_close(prediction, model.from_pipeline(step.prediction), rtol=1e-5, atol=1e-5)


def test_a_seed_draws_the_noise_that_the_pipeline_starts_from(model):
    """`noise_source="generated"` draws the noise of an image again from its seed."""
    seeds = [5, 6, 7]
    given = {"output_type": "latent", "num_inference_steps": STEPS, "generator": generators_of(seeds)}
    _, steps, scheduler = run(model, PROMPTS, **given)
    start = model.from_pipeline(steps[0].noisy)
    drawn = model.family.noise_of(seeds, start.float())
    torch.testing.assert_close(start, drawn * float(getattr(scheduler, "init_noise_sigma", 1)))


def test_the_noise_process_is_the_schedulers_own(model, called):
    process, own = model.family.noise_process, model.pipeline.scheduler
    if isinstance(process, FlowMatchingProcess):
        check_flow(model, process, *called)
    else:
        # Noisy latents and targets follow from these two. test_noise.py has the formulas.
        torch.testing.assert_close(process.scheduler.alphas_cumprod, own.alphas_cumprod, rtol=1e-6, atol=0)
        assert process.prediction_type == own.config.prediction_type


def check_flow(model, process, steps, scheduler):
    sigmas = [float(sigma) for sigma in scheduler.sigmas[:STEPS]]
    tokens = model.family.image_seq_len(model.from_pipeline(steps[0].noisy))
    for step, sigma in zip(steps, sigmas, strict=True):
        # Samplers that round their timesteps to whole numbers differ from sigma by as much.
        assert float(process.sigmas(torch.as_tensor(step.timestep), tokens)) == pytest.approx(sigma, abs=1.001e-3)
    # The shift of FLUX.2's call also depends on the number of its steps.
    if scheduler.mu is not None and process.dynamic and "flux2" not in model.module.__name__:
        assert process.shift_of(tokens) == pytest.approx(scheduler.mu, rel=1e-6)
    last = steps[-1]  # to sigma 0: what it gives are the scheduler's clean latents
    noisy, prediction, clean = (
        model.from_pipeline(value) for value in (last.noisy, last.prediction, last.result.prev_sample)
    )
    sigma = process.sigmas(torch.as_tensor(last.timestep), tokens)
    rounded = not torch.is_floating_point(torch.as_tensor(last.timestep))
    slack = 1.001e-3 * prediction.abs().max() if rounded else 1e-4
    torch.testing.assert_close(clean, noisy - sigma * prediction, rtol=0, atol=float(slack))
    noise, timesteps = torch.randn_like(clean), torch.as_tensor(last.timestep).expand(len(PROMPTS))
    again, velocity = process.add_noise(clean, noise, timesteps), process.target(clean, noise, timesteps)
    torch.testing.assert_close(again - sigma * velocity, clean, rtol=1e-4, atol=1e-4)


def test_the_pipeline_decodes_encoded_images_to_what_the_vae_alone_gives(model):
    pixels, latents = latents_of(model, 2)
    steps = 1 if "hidream" in model.module.__name__ else STEPS
    replaced = {"replace": model.to_pipeline(latents), "num_inference_steps": steps}
    images, _, _ = run(model, ["red", "blue"], **replaced, output_type="pt")
    torch.testing.assert_close(
        images.flatten(), through_vae(model.pipeline.vae, pixels).flatten(), rtol=1e-4, atol=1e-4
    )
    assert latents.dtype == torch.float32


def through_vae(vae, pixels):
    """Images as the VAE alone gives them back."""
    with torch.no_grad():
        code = vae.encode(as_vae_takes(vae, pixels))
        latent = code.latent if "latent" in code else code.latent_dist.mode()
        return (vae.decode(latent, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


def test_prompt_timestep_and_latents_change_the_prediction(model):
    _, latents = latents_of(model, 1)
    conditioning = conditioning_of(model, PROMPTS)
    same = torch.cat([latents] * 3)
    high = torch.full((3,), 700).to(torch.as_tensor(model.pipeline.scheduler.timesteps[0]).dtype)
    prediction = predict(model, same, high, conditioning)
    assert prediction.shape == same.shape
    assert (prediction[0] - prediction[1]).abs().mean() > 1e-4
    assert (prediction[0] - prediction[2]).abs().mean() > 1e-4
    assert (prediction - predict(model, same, high // 10, conditioning)).abs().mean() > 1e-4
    assert (prediction - predict(model, same + 1, high, conditioning)).abs().mean() > 1e-4


def test_rows_are_predicted_alike_alone_and_together(model):
    _, latents = latents_of(model, 3)
    timesteps = torch.tensor([3, 420, 990])
    conditioning = conditioning_of(model, PROMPTS)
    assert all(len(value) == 3 for value in conditioning.values())
    together = predict(model, latents, timesteps, conditioning)
    for i in range(3):
        row = {name: value[i : i + 1] for name, value in conditioning.items()}
        alone = predict(model, latents[i : i + 1], timesteps[i : i + 1], row)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_denoiser_cast_to_bfloat16_predicts_nearly_the_same(model):
    """Timesteps that bfloat16 holds exactly, because some denoisers round them."""
    _, latents = latents_of(model, 2)
    timesteps, conditioning = torch.tensor([250, 500]), conditioning_of(model, PROMPTS[:2])
    exact = predict(model, latents, timesteps, conditioning)
    rounded = copy.copy(model.pipeline)
    name = model.family.denoiser_name
    setattr(rounded, name, copy.deepcopy(model.family.denoiser).to(torch.bfloat16))
    twin = SimpleNamespace(family=type(model.family)(rounded))
    twin.family.prepare_denoiser(twin.family.denoiser)
    difference = predict(twin, latents, timesteps, conditioning).float() - exact
    assert difference.square().mean() < 0.05**2 * exact.square().mean()


def test_images_of_another_shape_are_predicted_and_counted_in_tokens(model):
    unit = model.family.vae_scale_factor * model.family.patch_size
    tall, wide = 4 * unit, 2 * unit
    pixels = torch.rand(1, 3, tall, wide, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        latents = model.family.encode_images(pixels)
    assert latents.shape[-2:] == (tall // model.family.vae_scale_factor, wide // model.family.vae_scale_factor)
    assert model.family.image_seq_len(latents) == 8
    sizes = torch.tensor([[tall, wide]])
    conditioning = conditioning_of(model, PROMPTS[:1])
    conditioning |= model.family.size_conditioning(sizes, torch.zeros_like(sizes), (tall, wide))
    assert predict(model, latents, torch.tensor([500]), conditioning).shape == latents.shape


def test_frozen_components_and_denoiser_are_all_the_pipelines_networks(model):
    networks = {name for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert {model.family.denoiser_name, *model.family.frozen_components} == networks


def test_moments_give_the_latents_of_the_vaes_own_posterior(model):
    """Sampled and as modes; then without the VAE's weights, which are not read again."""
    pixels, _ = latents_of(model, 3)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]

    with torch.no_grad():
        encoded = model.pipeline.vae.encode(as_vae_takes(model.pipeline.vae, pixels))
        posterior = getattr(encoded, "latent_dist", None)
        expected = [encoded.latent] * 2 if posterior is None else [posterior.mode(), posterior.sample(generators())]
        moments, statistics = model.family.image_moments(pixels), model.family.latent_statistics()
        without = type(model.family)(copy.copy(model.pipeline))
        without.pipeline.vae = copy.deepcopy(model.pipeline.vae).to("meta")
        without.keep_statistics(statistics)
        for wanted, streams in zip(expected, (None, generators), strict=True):
            given = streams and streams()
            assert torch.equal(model.family.sample_moments(moments, given).flatten(), wanted.flatten())
            latents = without.latents_of(moments, streams and streams())
            assert torch.equal(latents, model.family.encode_images(pixels, streams and streams()))


def as_vae_takes(vae, pixels):
    """Opaque, if the VAE has an alpha channel, and with a dimension of frames, if it is for clips."""
    if vae.config.get("in_channels") == 4:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    videos = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21")
    return pixels.unsqueeze(2) if type(vae).__name__ in videos else pixels


def test_encoding_ignores_autocast(model):
    pixels, latents = latents_of(model, 1)
    conditioning = conditioning_of(model, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(model.family.encode_images(pixels), latents)
        again = conditioning_of(model, PROMPTS)
    assert all(torch.equal(again[name], value) for name, value in conditioning.items())
