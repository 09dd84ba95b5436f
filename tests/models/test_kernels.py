"""Compiled blocks and attention back ends walk the trajectory of a run without them."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
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
        ("flux", "sage", "sage"),
        ("flux", "xformers", "`attention_backend='xformers'` cannot be used here: .*install"),
        ("stable_diffusion", "native", "no effect on UNet2DConditionModel"),
    ],
)
def test_attention_back_ends_that_cannot_act_are_refused(make_trainer, family_folder, family, name, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(family_folder(family), attention_backend=name)
