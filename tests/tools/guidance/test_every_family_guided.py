"""Guidance in the real pipeline of every family, against what plain calls of that pipeline hand to its scheduler.

Plain calls of the tuned model and of the reference give c and `m = u + g (c - u)` of classifier-free guidance. The
predictions of guided calls follow from these in float64.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_pipelines import CASES, case, quiet

from trl_diffusion_sdpo import preference_guidance
from trl_diffusion_sdpo.families import find_family

PROMPTS = ["red circle", "a much longer blue square"]
SCALE, G = 2.5, 3.0
# How a pipeline's call is guided without a reference; nothing for those that have no such guidance.
GUIDED = {
    "flux": {"true_cfg_scale": G, "negative_prompt": "grey"},
    "flux2": {},
    "flux2_klein": {"guidance_scale": G},
    "qwen_image": {"true_cfg_scale": G, "negative_prompt": "grey"},
    "qwen_image_21": {"true_cfg_scale": G, "negative_prompt": "grey"},
    "lumina2": {"guidance_scale": G, "cfg_normalization": False},  # which is not linear
}
# One for each way that pipelines call their denoisers.
KINDS = ("stable_diffusion", "pixart_alpha", "z_image", "qwen_image")
MATRIX = [name for name in CASES if name not in (*KINDS, "flux_schnell")]  # distilled models refuse these scales
EVERY = [*KINDS, *(pytest.param(name, marks=pytest.mark.matrix) for name in MATRIX)]


@pytest.fixture(params=EVERY, scope="module")
def model(request):
    module = case(request.param)
    pipeline = quiet(module.build())
    family = find_family(pipeline)
    targets = [name for name in family.lora_target_modules if "single" not in name]
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(family.denoiser, PeftAdapterMixin):
            family.denoiser.add_adapter(lora)
        else:  # PEFT's own wrapper, where diffusers loads no LoRA
            setattr(pipeline, family.denoiser_name, get_peft_model(family.denoiser, lora).eval())
    return SimpleNamespace(name=request.param, module=module, pipeline=pipeline, family=family)


def run(model, *, guided=False, steps=2, prompts=PROMPTS, **options):
    """Return the predictions that the scheduler got in a call of the pipeline, and the final latents."""
    met, own = [], model.pipeline.scheduler

    class Recording(type(own)):
        @functools.wraps(type(own).step)
        def step(self, model_output, timestep, sample, **kwargs):
            met.append(model_output.double())
            return super().step(model_output, timestep, sample, **kwargs)

    model.pipeline.scheduler = Recording.from_config(own.config)
    side = model.module.RESOLUTION
    call = {"num_inference_steps": steps, "height": side, "width": side, "output_type": "latent", **model.module.CALL}
    extra = GUIDED.get(model.name, {"guidance_scale": G}) if guided else {}
    generator = torch.Generator().manual_seed(0)
    try:
        extra = {key: [text] * 2 if key == "negative_prompt" else text for key, text in extra.items()}
        result = model.pipeline(prompt=list(prompts), generator=generator, **{**call, **extra, **options})[0]
        schedule = model.pipeline.scheduler
    finally:
        model.pipeline.scheduler = own
    return SimpleNamespace(met=met, latents=result, schedule=schedule)


def off(model, **options):
    """A plain call of the reference."""
    layers = [module for module in model.family.denoiser.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        return run(model, **options)
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def plain(model):
    """Predictions of the first step by plain calls: of the tuned model and of the reference."""
    c, c_r = run(model).met[0], off(model).met[0]
    assert (c - c_r).abs().max() > 0.02 * c.abs().max(), "The LoRA must change the prediction."
    return SimpleNamespace(c=c, c_r=c_r)


def test_a_step_is_extrapolated_from_the_reference_as_by_hand(model, plain):
    with preference_guidance(model.pipeline, SCALE):
        guided = run(model).met[0]
    assert_near(guided, plain.c_r + SCALE * (plain.c - plain.c_r))


def test_scale_one_is_the_plain_pipeline_and_scale_zero_the_reference(model):
    tuned, reference = run(model, guided=True, steps=3), off(model, steps=3)
    with preference_guidance(model.pipeline, 1.0):
        assert torch.equal(run(model, guided=True, steps=3).latents, tuned.latents)
    with preference_guidance(model.pipeline, 0.0):
        assert torch.equal(run(model, steps=3).latents, reference.latents)
    assert torch.equal(run(model, guided=True, steps=3).latents, tuned.latents)


def test_with_classifier_free_guidance_each_branch_is_as_stated(model, plain):
    if not GUIDED.get(model.name, True):
        pytest.skip("Has no such guidance.")
    # Calls of these two add the scaled difference to the conditional prediction.
    g = 1 + G if model.name in ("krea2", "z_image") else G
    c, c_r = plain.c, plain.c_r
    if model.name == "qwen_image":  # u is the prediction for the negative prompt as a prompt
        u, u_r = (call(model, prompts=["grey"] * 2).met[0] for call in (run, off))
    else:
        u, u_r = ((call(model, guided=True).met[0] - g * own) / (1 - g) for call, own in ((run, c), (off, c_r)))
    shift = (SCALE - 1) * (c - c_r)
    branches = {
        "conditional": (c + shift, u + shift),
        "npo": (c, u_r),
    }
    if model.family.unconditional_name is not None:  # another network, which is not tuned
        del branches["npo"]
        with pytest.raises(ValueError, match="'npo'"), preference_guidance(model.pipeline, form="npo"):
            pass
    for form, (conditional, unconditional) in branches.items():
        expected = unconditional + g * (conditional - unconditional)
        if model.name == "qwen_image":  # its call gives the mixture the norm of the conditional prediction
            expected *= conditional.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
        with preference_guidance(model.pipeline, None if form == "npo" else SCALE, form=form):
            assert_near(run(model, guided=True).met[0], expected)


def test_the_noise_level_is_that_of_the_pipelines_own_scheduler(model):
    levels = []
    own = type(model.family).noise_level_of

    def noted(family, inputs):
        levels.append(float(own(family, inputs).flatten()[0]))
        return own(family, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.family), "noise_level_of", noted)
        with preference_guidance(model.pipeline, SCALE, interval=(0.0, 1.0)):
            ran = run(model, steps=4)
    schedule, flow = ran.schedule, model.family.noise_process.prediction_type.startswith("flow")
    if hasattr(schedule, "sigmas"):
        sigmas = [float(sigma) for sigma in schedule.sigmas[:4]]
    else:
        alphas = [float(schedule.alphas_cumprod[int(step)]) for step in schedule.timesteps[:4]]
        sigmas = [((1 - alpha) / alpha) ** 0.5 for alpha in alphas]
    # Samplers that round their timesteps to whole numbers differ from sigma by as much.
    assert levels == pytest.approx(sigmas if flow else [sigma / (1 + sigma) for sigma in sigmas], abs=2e-3)
