"""The scale of a saved LoRA, compared with PEFT's layers and with numbers by hand."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import CASES, case

from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.models.adapters import adapter_layers, adapter_state, add_lora
from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.saving.weights import public_settings, save_adapter, scaling
from trl_diffusion_sdpo.utils._compat import loads_lora

EVERY_KIND = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "time_emb_proj"]
CONFIGS = {
    "default of the command line": LoraConfig(r=16, lora_alpha=32, target_modules=EVERY_KIND),
    "no power of two": LoraConfig(r=3, lora_alpha=5, target_modules=EVERY_KIND),
    "rslora": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=EVERY_KIND),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=EVERY_KIND,
        rank_pattern={"attn1.to_q": 2, "down_blocks.*.conv1": 8},
        alpha_pattern={"to_k": 1, "attn1.to_q": 16},
    ),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=EVERY_KIND),
    "bias": LoraConfig(r=4, lora_alpha=2, lora_bias=True, target_modules=["to_q", "ff.net.0.proj"]),
}

IN_CI = ("rslora", "patterns", "dora")


@pytest.fixture
def tuned(sd_folder):
    """`tuned(config)`: a pipeline whose LoRA is not zero."""

    def build(config):
        pipeline = load_pipeline(sd_folder)
        pipeline.unet.add_adapter(config)
        generator = torch.Generator().manual_seed(0)
        for name, weight in pipeline.unet.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
            elif "lora_magnitude" in name:
                weight.data *= 1.1
        return pipeline

    return build


@torch.no_grad()
def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 32, generator=generator)
    return unet.eval()(noisy, 500, encoder_hidden_states=text[..., : unet.config.cross_attention_dim]).sample


@pytest.mark.parametrize(
    "name",
    [name if name in IN_CI else pytest.param(name, marks=pytest.mark.matrix) for name in CONFIGS],
)
def test_what_is_saved_predicts_the_same_in_diffusers_and_peft(tuned, make_trainer, sd_folder, tmp_path, name):
    trainer = make_trainer(tuned(CONFIGS[name]), ref_model=sd_folder)
    trainer.save_model()
    trained = predict(trainer.denoiser)

    plain = load_pipeline(sd_folder)
    untuned = predict(plain.unet)
    plain.load_lora_weights(str(tmp_path / "run"))
    diffusers = predict(plain.unet)
    for layer in adapter_layers(plain.unet):
        assert set(layer.scaling.values()) == {1.0}
    peft = predict(PeftModel.from_pretrained(load_pipeline(sd_folder).unet, str(tmp_path / "run")).get_base_model())

    assert (trained - untuned).abs().max() > 1e-3
    for loaded in (diffusers, peft):  # matrix products round by where in memory the factors lie
        torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=3e-6)


def test_scales_by_hand():
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"to_q": 2}, alpha_pattern={"attn1.to_q": 6, "to_k": 1})
    assert scaling(config, "a.attn1.to_q", 2) == 3.0
    assert scaling(config, "a.attn2.to_q", 2) == 4.0
    assert scaling(config, "to_k", 4) == 0.25
    assert scaling(config, "a.not_to_k", 4) == 2.0
    assert scaling(LoraConfig(r=16, lora_alpha=8, use_rslora=True), "to_k", 16) == 2.0


def test_checkpoints_keep_the_weights_as_they_train(tuned, make_trainer, sd_folder, tmp_path):
    trainer = make_trainer(tuned(CONFIGS["no power of two"]), ref_model=sd_folder)
    trainer.save_model()
    stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): weight for name, weight in trainer.denoiser.named_parameters()}
    for key, value in stored.items():
        assert torch.equal(value, trained[key.removeprefix("base_model.model.")])
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 5)


@pytest.mark.parametrize("place", ["absolute", "~/home", "existing"])
def test_a_saved_lora_names_no_local_folder(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    base = str(tmp_path / "base") if place == "absolute" else place
    assert public_settings(LoraConfig(base_model_name_or_path=base))["base_model_name_or_path"] is None
    assert public_settings(LoraConfig(base_model_name_or_path="me/sd"))["base_model_name_or_path"] == "me/sd"


def test_equal_weights_are_equal_files(tuned, make_trainer, sd_folder, tmp_path):
    """Files that differ would be uploaded again."""
    trainer = make_trainer(tuned(CONFIGS["patterns"]), ref_model=sd_folder)
    files = []
    for number in range(4):
        trainer.save_model(str(tmp_path / str(number)))
        names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
        files.append([(tmp_path / str(number) / name).read_bytes() for name in names])
    assert all(other == files[0] for other in files)
    with safe_open(tmp_path / "0" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 4


@pytest.mark.parametrize("name", CASES)
def test_every_family_that_loads_loras_gets_both_factors_with_their_scale(name, tmp_path):
    pipeline, fresh = case(name).build(), case(name).build()
    family = find_family(pipeline)
    adapter = add_lora(family.denoiser, LoraConfig(r=16, lora_alpha=32), family.lora_target_modules, seed=0)
    generator = torch.Generator().manual_seed(0)
    state = adapter_state(family.denoiser, adapter)
    for weight in state.values():
        weight.data = torch.randn(weight.shape, generator=generator)
    config = family.denoiser.peft_config[adapter]
    save_adapter(state, config, type(pipeline), family.denoiser_name, tmp_path)

    if not loads_lora(type(pipeline)):
        assert name in ("hunyuan_dit", "longcat_image", "ovis_image", "pixart_alpha", "pixart_sigma")
        assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
        return
    fresh.load_lora_weights(str(tmp_path), adapter_name="read")
    read = adapter_state(find_family(fresh).denoiser, "read")
    assert read.keys() == state.keys()
    for key, weight in state.items():
        assert torch.equal(read[key], 2 * weight if "lora_B" in key else weight), key
    assert all(layer.scaling["read"] == 1 for layer in adapter_layers(find_family(fresh).denoiser))
