"""Which reference is chosen, and how it moves."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from trl_diffusion_sdpo.models.adapters import adapter_state


def test_each_set_up_recovers_the_old_policy_in_its_own_way(make_trainer, sd_folder):
    assert make_trainer().reference.kind == "frozen"
    assert make_trainer(ref_model=sd_folder).reference.kind == "frozen"
    assert make_trainer(peft_config=LoraConfig(r=4)).reference.kind == "adapter_off"
    assert make_trainer(peft_config=LoraConfig(r=4), sync_ref_model=True).reference.kind == "ref_adapter"
    assert make_trainer(loss_type="sft").reference.kind == "none"
    assert make_trainer(loss_type="mapo", peft_config=LoraConfig(r=4)).reference.kind == "none"


def test_the_reference_stays_while_the_policy_moves(make_trainer, sd_folder):
    for tuning in ({}, {"peft_config": LoraConfig(r=4)}):
        trainer = make_trainer(max_steps=3, **tuning)
        base = StableDiffusionPipeline.from_pretrained(sd_folder).unet
        inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 16, 32)
        trainer.train()
        with torch.no_grad(), trainer.reference.active(trainer.model) as reference:
            torch.testing.assert_close(reference(*inputs).sample, base(*inputs).sample, rtol=0, atol=1e-6)
        with torch.no_grad():
            assert not torch.allclose(trainer.denoiser(*inputs).sample, base(*inputs).sample, atol=1e-4)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_synchronised_reference_moves_by_the_mixing_rule(make_trainer, tuning):
    """A reference of full tuning weight by weight, one of LoRA factor by factor."""
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    trainer = make_trainer(max_steps=3, **sync, peft_config=LoraConfig(r=4) if tuning == "lora" else None)

    def weights(adapter):
        if tuning == "lora":
            return adapter_state(trainer.denoiser, adapter)
        return (trainer.denoiser if adapter == "default" else trainer.reference.module).state_dict()

    start, kept = copy.deepcopy(weights("default")), []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(copy.deepcopy(weights("default")))

    trainer.add_callback(Keep())
    trainer.train()
    for name, value in weights("ref").items():
        torch.testing.assert_close(value, 0.25 * kept[1][name] + 0.75 * start[name])  # once, after the second step


def test_model_and_reference_must_be_two_objects(make_trainer, sd_pipeline):
    with pytest.raises(ValueError, match="two objects"):
        make_trainer(sd_pipeline, sd_pipeline)
    with pytest.raises(ValueError, match="two objects"):
        make_trainer(sd_pipeline, sd_pipeline.unet)


def test_a_reference_of_another_architecture_is_refused(make_trainer, make_sd_pipeline, sdxl_folder):
    with pytest.raises(ValueError, match="must have the architecture of `model`"):
        make_trainer(ref_model=make_sd_pipeline(block_out_channels=(16, 16)))
    with pytest.raises(ValueError, match="must have the architecture of `model`"):
        make_trainer(ref_model=sdxl_folder)


def test_a_reference_with_an_adapter_stands_for_a_policy_with_another(make_trainer, sd_folder):
    given = StableDiffusionPipeline.from_pretrained(sd_folder)
    given.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    trainer = make_trainer(ref_model=given, peft_config=LoraConfig(r=4))
    trainer.train()
    assert not any(p.requires_grad for p in trainer.reference.module.parameters())
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_a_synchronised_reference_cannot_be_a_given_model_under_lora(make_trainer, sd_folder):
    with pytest.raises(ValueError, match="Leave `ref_model` out"):
        make_trainer(ref_model=sd_folder, peft_config=LoraConfig(r=4), sync_ref_model=True)
