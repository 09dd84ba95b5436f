"""Storage of a frozen base in 8 bits and on the CPU, compiled blocks, attention back ends: each walks the trajectory of
a run without it, and nothing of it is in what is saved."""

import math
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import case
from torch._dynamo.utils import counters

from trl_diffusion_sdpo.families import find_family, load_pipeline
from trl_diffusion_sdpo.models.adapters import add_lora
from trl_diffusion_sdpo.models.memory import StoredBase

E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")
EMA = {"ema_decay": 0.5, "safeguard": "parameter", "safeguard_diagnostics_steps": 1}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "sample_prompts": ["a cat"], "sample_inference_steps": 2}
CHECKPOINTED = {"activation_checkpointing": True}
OWN = ("layerwise_casting", "group_offload", "group_offload_blocks")


@pytest.fixture
def walk(make_trainer, make_pairs, family_folder, tmp_path):
    """`walk(family, folder=None, resume=None, **settings)`: a trainer after a training of a LoRA."""

    def train(family, folder=None, resume=None, **settings):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* has no effect without an accelerator")
            trainer = make_trainer(
                model=folder or family_folder(family),
                peft_config=LoraConfig(r=4),
                eval_dataset=make_pairs(3) if "eval_strategy" in settings else None,
                resolution=case(family).RESOLUTION,
                **{"beta": 100.0, "output_dir": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"), **settings},
            )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def trained(trainer):
    return {name: p.detach() for name, p in trainer.denoiser.named_parameters() if p.requires_grad}


def logs(trainer):
    timed = ("runtime", "per_second", "_time")
    return [
        {name: value for name, value in log.items() if not any(word in name for word in timed)}
        for log in trainer.state.log_history
    ]


def base_elements(trainer):
    return sum(p.numel() for name, p in trainer.denoiser.named_parameters() if "lora_" not in name)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("flux", {"group_offload": "block", **EVALUATED}),
        pytest.param(
            *("flux", {"group_offload": "leaf", "safeguard": "parameter", "bf16": True}), marks=pytest.mark.matrix
        ),
        ("stable_diffusion", {"group_offload": "block", "group_offload_blocks": 2, **CHECKPOINTED, **EMA}),
    ],
)
def test_an_offloaded_base_walks_the_same_trajectory(walk, family, settings):
    offloaded = walk(family, **settings)
    plain = walk(family, **{name: value for name, value in settings.items() if name not in OWN})
    assert equal(trained(offloaded), trained(plain))
    assert logs(offloaded) == logs(plain)
    assert base_elements(offloaded) < 0.7 * base_elements(plain)
    assert equal(offloaded.denoiser.state_dict(), plain.denoiser.state_dict())


@pytest.fixture
def rounded(family_folder, tmp_path):
    """`rounded(family)`: a copy of a pipeline whose weights are rounded as layerwise casting rounds them."""

    def build(name):
        family = find_family(load_pipeline(family_folder(name)))
        StoredBase(family.denoiser.requires_grad_(False), device=CPU, casting=E4M3)
        state = family.denoiser.state_dict()
        assert {value.dtype for value in state.values()} >= {E4M3, torch.float32}
        whole = load_pipeline(family_folder(name))
        getattr(whole, family.denoiser_name).load_state_dict({name: value.float() for name, value in state.items()})
        whole.save_pretrained(tmp_path / "rounded")
        return str(tmp_path / "rounded")

    return build


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("stable_diffusion", {**EMA, "group_offload": "block"}),  # convolutions
        pytest.param("flux", {"bf16": True, **CHECKPOINTED, **EVALUATED}, marks=pytest.mark.matrix),
    ],
)
def test_a_base_in_8_bits_trains_as_one_that_was_rounded_before(walk, rounded, family, settings):
    saving = {"save_strategy": "steps", "save_steps": 1}
    stored = walk(family, layerwise_casting="float8_e4m3fn", **settings, **saving)
    plain = {name: value for name, value in settings.items() if name not in OWN}
    expected = walk(family, folder=rounded(family), **plain, **saving)
    assert equal(trained(stored), trained(expected))
    assert logs(stored) == logs(expected)
    assert stored.state.log_history[0]["rewards/margins"] == 0
    files = [
        Path(trainer.args.output_dir) / "checkpoint-2" / "adapter_model.safetensors" for trainer in (stored, expected)
    ]
    assert equal(*map(load_file, files))
    assert {value.dtype for value in load_file(files[0]).values()} == {torch.float32}

    resumed = walk(
        family,
        resume=f"{stored.args.output_dir}/checkpoint-1",
        layerwise_casting="float8_e4m3fn",
        **settings,
    )
    assert equal(trained(resumed), trained(stored))


@pytest.fixture
def lora(family_folder):
    """`lora(family)`: a family whose denoiser has a new LoRA."""

    def build(name):
        family = find_family(load_pipeline(family_folder(name)))
        add_lora(family.denoiser, LoraConfig(r=2), family.lora_target_modules, seed=0)
        return family

    return build


@torch.no_grad()
def batch(family, side):
    latents = family.encode_images(torch.zeros(2, 3, side, side))
    sizes = family.size_conditioning(torch.full((2, 2), side), torch.zeros(2, 2, dtype=torch.long), (side, side))
    timesteps = torch.tensor([500, 200]).to(family.noise_process.timestep_dtype)
    return latents, timesteps, family.encode_prompts(["a cat", "a dog"]) | sizes


@pytest.mark.parametrize("stored", [{"offload": "leaf"}, {"casting": E4M3}])
def test_the_graph_holds_no_weight_that_can_be_brought_again(lora, stored):
    family = lora("stable_diffusion")
    family.settle_dtype()
    inputs = batch(family, 16)
    StoredBase(family.denoiser, device=CPU, **stored)
    seen = []
    for layer in (family.denoiser.conv_out, family.denoiser.up_blocks[0].resnets[0].conv1):
        layer.register_forward_pre_hook(lambda layer, _: seen.append(weakref.ref(layer.weight)))
    prediction = family.predict(family.denoiser, *inputs)
    assert len(seen) == 2 and prediction.requires_grad
    assert all(weight() is None for weight in seen)
    prediction.square().mean().backward()
    assert any(weight.grad.abs().sum() > 0 for weight in family.denoiser.parameters() if weight.requires_grad)


def held_by_a_prediction(family, inputs):
    """Bytes that are allocated and not freed by a prediction under autocast, by PyTorch's profiler."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler, torch.autocast("cpu"):
        prediction = family.predict(family.denoiser, *inputs)
    assert prediction.requires_grad
    return sum(event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")


def test_the_graph_holds_no_weight_that_autocast_has_cast(lora):
    family = lora("flux")
    family.settle_dtype()
    inputs = batch(family, case("flux").RESOLUTION)
    saved = {}  # by layer: autograd needs a weight for the gradient of its layer's input
    for name, layer in family.denoiser.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lora_" not in name:
            layer.register_forward_pre_hook(
                lambda layer, args: saved.update({layer: layer.weight.numel() * args[0].requires_grad})
            )
    plain = held_by_a_prediction(family, inputs)
    cast = 2 * sum(saved.values())  # bytes
    alone = family.predict(family.denoiser, *inputs)
    StoredBase(family.denoiser, device=CPU, offload="leaf", half_dtype=torch.bfloat16)
    assert cast > 50_000 and plain - held_by_a_prediction(family, inputs) > 0.9 * cast
    assert torch.equal(family.predict(family.denoiser, *inputs), alone)  # in full precision outside autocast


def test_blocks_are_on_the_device_one_after_the_other(lora):
    family = lora("flux")
    blocks = [*family.denoiser.transformer_blocks, *family.denoiser.single_transformer_blocks]
    inputs = batch(family, case("flux").RESOLUTION)
    family.settle_dtype()
    StoredBase(family.denoiser, device=CPU, offload="block")
    there = []

    def note(*_):
        there.append([any("base" in name and p.numel() for name, p in block.named_parameters()) for block in blocks])

    for block in blocks:
        block.register_forward_hook(note)
    family.predict(family.denoiser, *inputs)
    assert there == [[number == at for number in range(len(blocks))] for at in range(len(blocks))]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layerwise_casting": "float8"}, "must be one of float8_e4m3fn, float8_e5m2; got 'float8'"),
        ({"layerwise_casting": "float8_e5m2", "torch_compile": True}, "compiled code cannot follow"),
        ({"group_offload": "block", "torch_compile": True}, "compiled code cannot follow"),
        ({"group_offload_blocks": 0}, "must be at least 1, got 0"),
    ],
)
def test_settings_of_memory_that_cannot_act_are_refused(make_args, settings, match):
    with pytest.raises(ValueError, match=match):
        make_args(**settings)


@pytest.mark.parametrize("setting", [{"layerwise_casting": "float8_e4m3fn"}, {"group_offload": "leaf"}])
@pytest.mark.filterwarnings("ignore:.* has no effect without an accelerator")
def test_weights_that_train_are_not_stored_elsewhere(make_trainer, setting):
    with pytest.raises(ValueError, match="is for the frozen base of a LoRA"):
        make_trainer(**setting)


@pytest.mark.parametrize("precomputed", [False, True])
def test_a_reference_of_its_own_would_not_be_rounded(make_trainer, sd_folder, precomputed):
    given = {"peft_config": LoraConfig(r=2), "precompute_ref_errors": precomputed}
    with pytest.raises(ValueError, match="a `ref_model` of its own would not be rounded"):
        make_trainer(ref_model=sd_folder, layerwise_casting="float8_e4m3fn", **given)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layerwise_casting": "float8_e4m3fn"}, "cannot act under DeepSpeed and FSDP"),
        ({"torch_compile": True, "torch_compile_regional": True}, "is for one process and for DDP"),
    ],
)
def test_engines_that_shard_leave_no_weights_to_store_and_no_blocks_to_compile(
    make_trainer, monkeypatch, settings, match
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=match):
        make_trainer(peft_config=LoraConfig(r=2), **settings)


def test_a_model_that_reads_weights_of_layers_it_does_not_call_is_not_offloaded_by_layer(lora):
    with pytest.raises(ValueError, match="HunyuanDiT2DModel reads weights of layers that it does not call"):
        StoredBase(lora("hunyuan_dit").denoiser, device=CPU, offload="leaf")


def test_weights_that_cannot_be_stored_are_refused(sd_pipeline):
    unet = sd_pipeline.unet.requires_grad_(False)
    unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = 500
    with pytest.raises(ValueError, match="holds numbers up to 448, and mid_block.resnets.0.conv1.weight has larger"):
        StoredBase(unet, device=CPU, casting=E4M3)
    quantized = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    unet.conv_in.weight = quantized
    with pytest.raises(ValueError, match="need weights that are not quantized.*conv_in.weight is a Parameter of"):
        StoredBase(unet, device=CPU, offload="leaf")


def test_settings_of_memory_without_effect_say_so(make_args):
    with pytest.warns(UserWarning, match="`group_offload_blocks` has no effect without `group_offload='block'`"):
        make_args(group_offload_blocks=2)
    with pytest.warns(UserWarning, match="`torch_compile_regional` has no effect without `torch_compile`"):
        make_args(torch_compile_regional=True)
    with pytest.warns(UserWarning, match="`offload_frozen_components` has no effect without an accelerator"):
        make_args(offload_frozen_components=True)


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
