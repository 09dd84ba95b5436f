"""Compiled blocks and attention back ends walk the trajectory of a run without them."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from peft import LoraConfig
from tiny_pipelines import case
from torch._dynamo.utils import counters

from trl_diffusion_sdpo.models.frozen_components import _assign, _own
from trl_diffusion_sdpo.models.kernels import is_mostly_blocks
from trl_diffusion_sdpo.utils._compat import attention_backends


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
@pytest.mark.parametrize("family", ["flux"])
def test_compiled_blocks_walk_like_plain_ones_and_are_compiled_once_for_each_kind(walk, family, monkeypatch):
    plain = walk(family)
    by_block, graphs, operations = compiled(walk, family)
    monkeypatch.setattr(type(plain.denoiser), "_repeated_blocks", None)  # as in a model without a list
    whole, _, more = compiled(walk, family)
    for trainer in (by_block, whole):
        torch.testing.assert_close(trained(trainer), trained(plain), rtol=1e-5, atol=1e-6)
        assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert 0 < graphs <= 7  # of two kinds at most, for policy and reference; of the VAE and two text encoders
    assert operations < more


SIZES = ((16, 16), (32, 16), (16, 32), (48, 32), (32, 32))  # buckets
CAPTIONS = (["a red circle", "b"], ["", ""], ["a big square and a dog", "c"], ["a"], ["", "a cat in a hat"])


def encodings(trainer):
    """Moments of images of `SIZES` and embeddings of `CAPTIONS`, and the number of graphs after each."""
    found, graphs = [], []
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for size in SIZES:
            pixels = torch.rand(3, 3, *size, generator=draw) * 2 - 1
            with trainer.frozen_components.in_use() as family:
                found.append(family.image_moments(pixels))
            graphs.append(counters["stats"]["unique_graphs"])
        for captions in CAPTIONS:
            with trainer.frozen_components.in_use() as family:
                found += family.encode_prompts(captions).values()
            graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("stable_diffusion_xl", {}),
        ("lumina2", {"torch_compile_mode": "reduce-overhead"}),  # prompts of any length
    ],
)
def test_encoders_of_live_pairs_are_compiled_for_all_sizes_and_captions(make_trainer, family_folder, family, settings):
    kept = {"model": family_folder(family), "resolution": 16, "vae_encode_batch_size": 2}
    plain, _ = encodings(make_trainer(**kept))
    torch._dynamo.reset()
    counters.clear()
    trainer = make_trainer(**{**kept, "torch_compile": True, "torch_compile_backend": "aot_eager", **settings})
    found, graphs = encodings(trainer)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert graphs[2] == graphs[4] and graphs[-2] == graphs[-1], "Each size or length was compiled anew."
    assert 0 < graphs[4] < graphs[-1] and not counters["graph_break"]
    for part in (trainer.family.pipeline.vae, trainer.family.pipeline.text_encoder):
        for module in part.modules():
            for name, tensor in _own(module):
                _assign(module, name, tensor.clone())  # as `offload_frozen_components` does at each use
    assert encodings(trainer)[1][-1] == graphs[-1]
    assert not any(
        "_orig_mod" in name
        for part in trainer.family.pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for name in part.state_dict()
    )


def test_encoders_that_fill_a_cache_are_not_compiled(make_trainer, tmp_path):
    """They run once, before training."""
    trainer = make_trainer(torch_compile=True, precompute_latents=True, precompute_dir=str(tmp_path / "cache"))
    parts = (trainer.family.pipeline.vae.encoder, trainer.family.pipeline.text_encoder)
    assert all(part._compiled_call_impl is None for part in parts)


def test_a_network_is_compiled_by_block_if_the_blocks_are_most_of_it():
    """In a UNet of the size of SD 1.5, the blocks hold 28 % of the weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel()
        transformer = FluxTransformer2DModel(num_layers=2, num_single_layers=2)
    assert is_mostly_blocks(transformer) and not is_mostly_blocks(unet)


def test_a_whole_model_is_not_compiled_after_its_reference_has_predicted(make_trainer, sd_folder, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "_repeated_blocks", None)
    with pytest.raises(ValueError, match="`precompute_ref_errors=True`.*UNet2DConditionModel"):
        make_trainer(sd_folder, precompute_ref_errors=True, torch_compile=True)


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [
        ({}, True),  # with inductor, which fuses
        ({"torch_compile_backend": "eager"}, False),
        ({"loss_type": "sft"}, False),
    ],
)
def test_a_compiler_that_may_round_policy_and_reference_apart_is_a_warning(make_trainer, caplog, settings, is_said):
    make_trainer(torch_compile=True, **settings)
    assert ("rewards/margins" in caplog.text) == is_said


def test_the_attention_back_end_of_diffusers_acts_and_rounds_policy_and_reference_alike(walk, monkeypatch):
    plain = walk("flux")
    called, forward = [], _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    counting = {
        AttentionBackendName._NATIVE_MATH: lambda *given, **named: called.append(1) or forward(*given, **named)
    }
    monkeypatch.setattr(_AttentionBackendRegistry, "_backends", {**_AttentionBackendRegistry._backends, **counting})
    with attention_backend("_native_math"):  # what DIFFUSERS_ATTN_BACKEND sets for a process
        chosen = walk("flux")
        assert attention_backends(chosen.denoiser) == ["_native_math"]
    assert called and chosen.state.log_history[0]["rewards/margins"] == 0
    torch.testing.assert_close(trained(chosen), trained(plain), rtol=1e-3, atol=1e-4)


def test_an_attention_back_end_without_a_backward_pass_is_refused(make_trainer, family_folder, monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.SAGE)
    with pytest.raises(ValueError, match="sage"):
        make_trainer(family_folder("flux"))
