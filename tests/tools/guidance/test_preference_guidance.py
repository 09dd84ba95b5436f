"""The context manager around a pipeline: passes, restoring, other users of the denoiser, and bad input."""

import contextlib
import copy
import re
import warnings

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, LCMScheduler, StableDiffusionXLAutoBlocks
from peft import LoraConfig
from tiny_pipelines import case, quiet

from trl_diffusion_sdpo import preference_guidance

G = 3.0
SIZE = {"height": 16, "width": 16, "output_type": "latent"}


def add_lora(denoiser, name, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        targets = ["to_q", "to_k", "to_v"]
        lora = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, at a second adapter
            denoiser.add_adapter(lora, adapter_name=name)


@pytest.fixture(scope="module")
def built():
    return quiet(case("stable_diffusion").build())


@pytest.fixture(scope="module")
def shared(built):
    """A pipeline with the adapters `negative` and `tuned`."""
    pipeline = copy.deepcopy(built)
    add_lora(pipeline.unet, "negative", seed=1)
    add_lora(pipeline.unet, "tuned", seed=2)
    return pipeline


@pytest.fixture
def pipeline(shared):
    """The shared pipeline with `tuned` active. Tests may switch adapters. Other changes need a copy."""
    shared.unet.set_adapter("tuned")
    shared.enable_lora()
    return shared


@pytest.fixture
def own(pipeline):
    """A copy that the test may change."""
    return copy.deepcopy(pipeline)


@contextlib.contextmanager
def counted(pipeline):
    """The rows of every forward pass of the denoiser within the context."""
    rows = []
    handle = pipeline.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def draw(pipeline, guidance_scale=1.0, steps=2, **options):
    generator = torch.Generator().manual_seed(0)
    call = {"guidance_scale": guidance_scale, "num_inference_steps": steps, "generator": generator, **SIZE}
    return pipeline(["red", "a blue square"], **{**call, **options})[0]


def denoiser_state(denoiser):
    layers = [m for m in denoiser.modules() if hasattr(m, "active_adapter")]
    adapters = [(layer.active_adapter, layer.disable_adapters, dict(layer.scaling)) for layer in layers]
    hooks = [len(m._forward_pre_hooks) for m in denoiser.modules()]
    hooks += [len(m._forward_hooks) for m in denoiser.modules()]
    grads = [p.requires_grad for p in denoiser.parameters()]
    return type(denoiser), sorted(vars(denoiser)), denoiser.forward, adapters, hooks, grads


# ---- Passes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "guidance", "expected"),
    [
        ({"scale": 1.0}, G, [4]),
        ({}, G, [4, 2]),  # the reference for the prompts only
        ({"form": "npo"}, G, [4, 2]),
        ({"interval": (0.0, 0.001)}, G, [4]),
    ],
    ids=str,
)
def test_a_step_costs_as_many_passes_as_stated(pipeline, options, guidance, expected):
    with preference_guidance(pipeline, **options), counted(pipeline) as rows:
        draw(pipeline, guidance, steps=1)
    assert sorted(rows) == sorted(expected)


def test_outside_the_interval_a_step_is_plain(pipeline):
    levels, steps = [], 6
    with preference_guidance(pipeline, 2.0, interval=(0.3, 0.7)), counted(pipeline) as seen:
        draw(pipeline, steps=steps, callback_on_step_end=lambda p, i, t, kw: (levels.append(int(t)), kw)[1])
    alphas = pipeline.scheduler.alphas_cumprod[levels].double()
    level = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())
    inside = int(((level >= 0.3) & (level <= 0.7)).sum())
    assert 0 < inside < steps and len(seen) == steps + inside


def test_the_lora_scale_of_a_call_is_the_policys(pipeline):
    pipeline.unet.set_adapter("negative")
    negative = draw(pipeline)
    pipeline.unet.set_adapter("tuned")
    with preference_guidance(pipeline, 0.0, reference="negative"):
        given = draw(pipeline, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(given, negative, rtol=0, atol=1e-5)


def test_a_second_call_with_the_same_latents_is_not_taken_for_the_unconditional_branch():
    """In this pipeline, each branch of classifier-free guidance is a call of the denoiser."""
    module = case("cogview4")
    pipeline = quiet(module.build())
    add_lora(pipeline.transformer, "tuned")
    size = {"height": module.RESOLUTION, "width": module.RESOLUTION, "output_type": "latent"}
    call = {"guidance_scale": 1.0, "num_inference_steps": 1, **size}
    latents = pipeline(prompt="red", generator=torch.Generator().manual_seed(0), **call)[0]
    with preference_guidance(pipeline, 2.0):
        expected = pipeline(prompt="a blue square", latents=latents, **call)[0]
    with preference_guidance(pipeline, 2.0):
        pipeline(prompt="red", latents=latents, **call)
        assert torch.equal(pipeline(prompt="a blue square", latents=latents, **call)[0], expected)


def test_policy_and_reference_do_not_share_the_prompts_keys_and_values():
    module = case("qwen_image_21")
    pipeline = quiet(module.build())
    add_lora(pipeline.transformer, "tuned")
    call = {"num_inference_steps": 2, "height": module.RESOLUTION, "width": module.RESOLUTION, "output_type": "latent"}
    drawn = []
    for cached in (False, True):
        with preference_guidance(pipeline, 2.0):
            noise = torch.Generator().manual_seed(0)
            drawn.append(pipeline(prompt="red", use_kv_cache=cached, generator=noise, **call)[0])
    torch.testing.assert_close(*drawn)


# ---- Restoring -----------------------------------------------------------------------------------------------------


def test_everything_is_as_before_also_after_an_error(pipeline):
    before, plain = denoiser_state(pipeline.unet), draw(pipeline, G)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), preference_guidance(pipeline, reference="negative"):
        handle = pipeline.unet.mid_block.register_forward_pre_hook(stop)
        try:
            draw(pipeline, G)
        finally:
            handle.remove()
    assert denoiser_state(pipeline.unet) == before
    assert torch.equal(draw(pipeline, G), plain)


def test_a_guided_pipeline_is_moved_described_and_saved_as_ever(own, tmp_path):
    unguided = own.unet
    with preference_guidance(own, 2.0) as given:
        assert given is own and own.unet is unguided
        assert own.to("cpu").device.type == "cpu" and own.unet.config.in_channels == 4
        with pytest.raises(ValueError, match="already guided"), preference_guidance(own, 2.0):
            pass
        own.unload_lora_weights()
        own.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path).unet) is type(unguided)


def test_a_second_model_is_the_reference_and_needs_no_lora(built):
    tuned, base = copy.deepcopy(built), copy.deepcopy(built.unet)
    with torch.no_grad():
        for weight in tuned.unet.parameters():
            weight *= 1.01
    at_zero = copy.copy(tuned)
    at_zero.unet = base
    expected = draw(at_zero)
    with preference_guidance(tuned, 0.0, reference=base):
        assert torch.equal(draw(tuned), expected)
    with preference_guidance(tuned, 3.0, reference=base):
        assert not torch.equal(draw(tuned), expected)


# ---- Others that change the denoiser's calls -----------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_denoiser_is_guided_outside_of_its_graphs(own, way):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with preference_guidance(own, 2.0):
        expected = draw(own, G)
    plain = draw(own, G)
    if way == "wrapped":
        own.unet = torch.compile(own.unet, backend=backend, fullgraph=True)
    else:
        own.unet.compile(backend=backend, fullgraph=True)
    with preference_guidance(own, 2.0):
        torch.testing.assert_close(draw(own, G), expected, rtol=0, atol=1e-5)
    assert len(graphs) == 2  # policy and reference
    torch.testing.assert_close(draw(own, G), plain, rtol=0, atol=1e-5)
    assert len(graphs) == 2


def test_offloading_that_takes_its_hooks_off_after_every_call(own):
    with preference_guidance(own, 2.0):
        expected = draw(own)
    own.enable_model_cpu_offload(device="cpu")
    assert own.unet._hf_hook is not None
    with preference_guidance(own, 2.0):
        assert torch.equal(draw(own), expected)
        assert torch.equal(draw(own), expected)


def test_a_modular_pipeline_with_a_guider_of_diffusers():
    """Its scheduler gets `u + g (c - u)`, by two calls of the denoiser for the same latents."""
    plain = quiet(case("stable_diffusion_xl").build())
    add_lora(plain.unet, "tuned")
    modular = StableDiffusionXLAutoBlocks().init_pipeline()
    modular.update_components(**{name: plain.components[name] for name in plain.components if plain.components[name]})

    def first_step(guidance_scale):
        modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
        modular.set_progress_bar_config(disable=True)
        met, step = [], type(modular.scheduler).step

        def noted(scheduler, prediction, *args, **kwargs):
            met.append(prediction.double())
            return step(scheduler, prediction, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(modular.scheduler), "step", noted)
            generator = torch.Generator().manual_seed(0)
            modular(prompt="red", num_inference_steps=2, height=16, width=16, output="latents", generator=generator)
        return met[0]

    c, m = first_step(1.0), first_step(G)
    plain.disable_lora()
    c_r = first_step(1.0)
    plain.enable_lora()
    with preference_guidance(modular, 2.5):
        guided = first_step(G)
    torch.testing.assert_close(guided, m + 1.5 * (c - c_r), rtol=0, atol=1e-5)


# ---- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "`scale`.*nan"),
        ({"form": "mixture"}, "`form`"),
        ({"form": "both"}, "conditional.*'both'"),
        ({"form": "npo", "scale": 2.0}, "`scale`"),
        ({"interval": (0.5, 0.5)}, "0.5"),
        ({"reference": "missing"}, "negative, tuned.*'missing'"),
        ({"reference": "tuned"}, "`reference`.*'tuned'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message), preference_guidance(pipeline, **options):
        pass


def test_without_an_active_lora_a_reference_is_needed(own, built):
    with pytest.raises(ValueError, match="No LoRA is active.*none"), preference_guidance(copy.copy(built)):
        pass
    own.disable_lora()
    with pytest.raises(ValueError, match="negative, tuned"), preference_guidance(own):
        pass
    own.enable_lora()
    own.fuse_lora(adapter_names=["tuned"])
    with pytest.raises(ValueError, match="unfuse_lora"), preference_guidance(own):
        pass


def test_models_that_are_distilled_to_few_steps_are_guided_only_where_that_is_asked_for(own):
    own.scheduler = LCMScheduler.from_config(own.scheduler.config)
    schnell = quiet(case("flux_schnell").build())
    add_lora(schnell.transformer, "tuned")
    for pipeline, said in ((own, "(LCMScheduler)"), (schnell, "FLUX.1")):
        refused = pytest.raises(ValueError, match=re.escape(said) + ".*`allow_distilled=True`")
        with refused, preference_guidance(pipeline, scale=1.5):
            pass
        for options in ({"scale": 1.0}, {"scale": 3.0, "allow_distilled": True}):
            with preference_guidance(pipeline, **options):
                pass


def test_a_pipeline_without_vae_and_text_encoders_is_guided_and_its_kind_is_known():
    whole = quiet(case("flux_schnell").build())
    add_lora(whole.transformer, "tuned")
    kept = {"scheduler": whole.scheduler, "transformer": whole.transformer}
    pipeline = quiet(type(whole)(**{name: kept.get(name) for name in whole.components}))
    with pytest.raises(ValueError, match="FLUX.1"), preference_guidance(pipeline, scale=2.0):
        pass
    config = pipeline.transformer.config
    embeds = {
        "prompt_embeds": torch.ones(1, 7, config.joint_attention_dim),
        "pooled_prompt_embeds": torch.ones(1, config.pooled_projection_dim),
    }

    def drawn():
        return pipeline(**embeds, num_inference_steps=1, generator=torch.Generator().manual_seed(0), **SIZE)[0]

    with preference_guidance(pipeline, 0.0):
        guided = drawn()
    assert not torch.equal(guided, drawn())
    pipeline.disable_lora()
    assert torch.equal(guided, drawn())
