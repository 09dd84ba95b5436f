"""Before the first step, policy and reference are one model: they must agree bit for bit in every precision, or beta
multiplies rounding into a preference."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

LORA = {"r": 4, "lora_alpha": 8}
PRECISIONS = [pytest.param(False, marks=pytest.mark.matrix), True]


def lora() -> LoraConfig:
    return LoraConfig(**LORA)


def assert_neutral(trainer) -> None:
    """Take the first step, on a prepared model in training mode, and check that it is neutral."""
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0
    assert first["errors/winner_change"] == first["errors/loser_change"] == 0
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("bf16", PRECISIONS)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("family", ["sd_folder", "sdxl_folder"])
def test_policy_and_reference_agree_bit_for_bit(request, make_trainer, family, tuning, bf16):
    folder = request.getfixturevalue(family)
    assert_neutral(make_trainer(folder, bf16=bf16, max_steps=1, peft_config=lora() if tuning == "lora" else None))


@pytest.mark.parametrize("bf16", PRECISIONS)
def test_a_policy_that_starts_from_a_trained_adapter_agrees_with_its_ref_adapter(make_trainer, sd_pipeline, bf16):
    model = get_peft_model(
        sd_pipeline.unet, LoraConfig(**LORA, init_lora_weights=False, target_modules=["to_q", "conv1"])
    )
    trainer = make_trainer(model, processing_class=sd_pipeline, bf16=bf16, max_steps=1)
    assert trainer.reference.kind == "ref_adapter"
    assert_neutral(trainer)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_given_reference_agrees_in_the_precision_of_autocast(make_trainer, sd_folder, bf16):
    trainer = make_trainer(ref_model=sd_folder, bf16=bf16, max_steps=1)
    conv, norm = trainer.reference.module.conv_in, trainer.reference.module.conv_norm_out
    assert conv.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert norm.weight.dtype == torch.float32
    assert_neutral(trainer)


def test_a_synchronised_reference_starts_neutral(make_trainer):
    assert_neutral(make_trainer(sync_ref_model=True, max_steps=1, bf16=True, peft_config=lora()))


def test_activation_checkpointing_leaves_the_start_neutral(make_trainer):
    assert_neutral(make_trainer(activation_checkpointing=True, max_steps=1, bf16=True))


def test_dropout_is_off_in_policy_and_reference(make_trainer, make_sd_pipeline):
    assert_neutral(make_trainer(make_sd_pipeline(dropout=0.5), max_steps=1))
    assert_neutral(make_trainer(peft_config=LoraConfig(**LORA, lora_dropout=0.5), max_steps=1))


def test_a_base_in_half_precision_is_neutral_under_lora(make_trainer):
    trainer = make_trainer(model_init_kwargs={"dtype": "bfloat16"}, bf16=True, max_steps=1, peft_config=lora())
    assert trainer.denoiser.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.denoiser.parameters() if p.requires_grad} == {torch.float32}
    assert_neutral(trainer)
