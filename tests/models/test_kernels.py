"""Compiled blocks and attention back ends walk the trajectory of a run without them."""

import math

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.autoencoders.vae import Encoder
from peft import LoraConfig
from tiny_pipelines import case
from torch._dynamo.utils import counters


@pytest.fixture
def walk(make_trainer, family_folder, tmp_path):
    """`walk(family, folder=None, **settings)`: a trainer after a training of a LoRA."""

    def train(family, folder=None, **settings):
        trainer = make_trainer(
            model=folder or family_folder(family),
            peft_config=LoraConfig(r=4),
            resolution=case(family).RESOLUTION,
            **{"beta": 100.0, "output_dir": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"), **settings},
        )
        trainer.train()
        return trainer

    return train


def trained(trainer):
    return {name: p.detach() for name, p in trainer.denoiser.named_parameters() if p.requires_grad}


# ---- Compiled blocks, attention --------------------------------------------------------------------------------------


def compiled(walk, family, **settings):
    """A trained trainer, and the numbers of graphs and of operations that were compiled for it."""
    torch._dynamo.reset()
    counters.clear()
    trainer = walk(family, **{"torch_compile": True, "torch_compile_backend": "eager", **settings})
    return trainer, counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"]


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["flux", "stable_diffusion"])
def test_compiled_blocks_walk_like_plain_ones_and_are_compiled_once_for_each_kind(walk, family):
    plain = walk(family)
    regional, graphs, operations = compiled(walk, family, torch_compile_regional=True)
    whole, _, more = compiled(walk, family)
    for trainer in (regional, whole):
        torch.testing.assert_close(trained(trainer), trained(plain), rtol=1e-5, atol=1e-6)
        assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert 0 < graphs <= 4  # of two kinds at most, for policy and reference
    assert operations < more


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"torch_compile": True, "torch_compile_mode": "default"}, ["default"]),
        ({"torch_compile": True, "torch_compile_mode": "reduce-overhead"}, [None]),  # no CUDA graphs
        ({"torch_compile": True, "precompute_latents": True}, []),
        ({}, []),
    ],
)
def test_the_encoder_of_live_images_is_compiled_by_the_settings_of_the_policy(
    make_trainer, monkeypatch, tmp_path, settings, modes
):
    compiled = []
    monkeypatch.setattr(Encoder, "compile", lambda _, backend, mode: compiled.append((backend, mode)))
    if "torch_compile" in settings:
        settings = {**settings, "torch_compile_backend": "eager"}
    if "precompute_latents" in settings:
        settings = {**settings, "precompute_dir": str(tmp_path / "cache")}
    make_trainer(**settings)
    assert compiled == [("eager", mode) for mode in modes]


def test_a_compiled_encoder_encodes_what_a_plain_one_does(make_trainer):
    torch._dynamo.reset()
    counters.clear()
    pixels = torch.rand(5, 3, 16, 16) * 2 - 1
    moments = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        family = make_trainer(vae_encode_batch_size=2, **settings).frozen_components.family
        with torch.no_grad():
            moments.append(family.image_moments(pixels))
    assert torch.equal(*moments)
    assert 0 < counters["stats"]["unique_graphs"] <= 2  # the last part is smaller
    assert not counters["graph_break"]


@pytest.mark.matrix
@pytest.mark.parametrize("given", [False, True])
def test_errors_of_the_reference_are_computed_by_compiled_blocks(walk, family_folder, given):
    reference = {"ref_model": family_folder("flux")} if given else {}
    trainer, graphs, _ = compiled(
        walk, "flux", torch_compile_regional=True, precompute_ref_errors=True, max_steps=1, **reference
    )
    assert graphs > 0 and trainer.state.log_history[0]["rewards/margins"] == 0


@pytest.mark.matrix
def test_stored_errors_are_those_of_blocks_that_inductor_compiled_for_training(walk):
    """Graphs with and without gradients fuse differently, and may round differently in float32."""
    settings = {"torch_compile_regional": True, "torch_compile_backend": "inductor", "max_steps": 1}
    stored = compiled(walk, "stable_diffusion", **settings, precompute_ref_errors=True)[0]
    first = stored.state.log_history[0]
    assert abs(first["rewards/margins"]) < 1e-5  # with beta 100; the errors are about 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.matrix
def test_one_kind_of_block_is_compiled_once_however_many_there_are(walk):
    """The first block has inputs without a gradient, and a graph of its own."""

    def graphs(layers):
        pipeline = case("flux").build()
        config = {**pipeline.transformer.config, "num_layers": layers, "num_single_layers": layers}
        pipeline.register_modules(transformer=type(pipeline.transformer).from_config(config))
        return compiled(walk, "flux", folder=pipeline, torch_compile_regional=True, max_steps=1)[1]

    assert graphs(4) == graphs(2) > 0


def test_engines_that_shard_leave_no_blocks_to_compile(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`torch_compile_regional`"):
        make_trainer(peft_config=LoraConfig(r=2), torch_compile=True, torch_compile_regional=True)


def test_settings_without_effect_say_so(make_args):
    with pytest.warns(UserWarning, match="`torch_compile_regional`"):
        make_args(torch_compile_regional=True)
    with pytest.warns(UserWarning, match="`offload_frozen_components`"):
        make_args(offload_frozen_components=True)


def test_compiling_blocks_is_refused_where_there_are_none(make_trainer, family_folder):
    with pytest.raises(ValueError, match="diffusers names none of SD3Transformer2DModel. Leave it off"):
        make_trainer(family_folder("stable_diffusion_3"), torch_compile=True, torch_compile_regional=True)


@pytest.fixture
def native_attention():
    """The choice of an attention back end holds for the process."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


def test_an_attention_back_end_acts_and_rounds_policy_and_reference_alike(walk, native_attention):
    plain, chosen = walk("flux"), walk("flux", attention_backend="_native_math")
    names = {
        module.processor._attention_backend for module in chosen.denoiser.modules() if hasattr(module, "processor")
    }
    assert {name.value for name in names} == {"_native_math"}
    assert chosen.state.log_history[0]["rewards/margins"] == 0
    torch.testing.assert_close(trained(chosen), trained(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name", "match"),
    [
        ("flux", "flash_hubb", "must be one of .*; got 'flash_hubb'. Did you mean `flash_hub`"),
        ("flux", "sage", "has no backward pass"),
        ("flux", "xformers", "`attention_backend='xformers'` cannot be used here: .*install"),
        ("stable_diffusion", "native", "diffusers' UNet2DConditionModel calls PyTorch's own attention"),
    ],
)
def test_attention_back_ends_that_cannot_act_are_refused(make_trainer, family_folder, family, name, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(family_folder(family), attention_backend=name)
