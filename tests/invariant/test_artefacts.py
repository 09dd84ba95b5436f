"""Saved weights load in plain diffusers and in PEFT, and give the same predictions and images."""

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel

EVERY_KIND = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "time_emb_proj"]


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.unet.eval()
    return torch.from_numpy(
        pipeline("a cat", latents=noise, num_inference_steps=3, guidance_scale=1.0, output_type="np").images
    )


@pytest.mark.parametrize("family", ["sd_folder", "sdxl_folder"])
def test_a_lora_loads_into_a_plain_pipeline(request, make_trainer, tmp_path, family):
    """Older file formats lose `lora_alpha != r`, convolutions and projections."""
    folder = request.getfixturevalue(family)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=EVERY_KIND)
    trainer = make_trainer(folder, peft_config=config, learning_rate=1e-2, max_steps=3)
    trainer.train()
    trainer.save_model()
    tuned = draw(trainer.pipeline)

    fresh = DiffusionPipeline.from_pretrained(folder)
    base = draw(fresh)
    fresh.load_lora_weights(str(tmp_path / "run"))

    assert not torch.allclose(base, tuned, atol=1e-3)
    torch.testing.assert_close(draw(fresh), tuned, rtol=0, atol=1e-5)


def test_a_lora_loads_into_peft(make_trainer, sd_folder, tmp_path):
    config = LoraConfig(r=4, lora_alpha=16, target_modules=EVERY_KIND)
    trainer = make_trainer(peft_config=config, learning_rate=1e-2, max_steps=3)
    trainer.train()
    trainer.save_model()
    tuned = draw(trainer.pipeline)

    fresh = DiffusionPipeline.from_pretrained(sd_folder)
    fresh.unet = PeftModel.from_pretrained(fresh.unet, str(tmp_path / "run")).get_base_model()

    torch.testing.assert_close(draw(fresh), tuned, rtol=0, atol=1e-5)


def test_full_weights_load_as_the_denoisers_folder(make_trainer, sd_folder, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_model()
    tuned = draw(trainer.pipeline)

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "run", subfolder="unet")
    fresh = StableDiffusionPipeline.from_pretrained(sd_folder, unet=unet)

    torch.testing.assert_close(draw(fresh), tuned, rtol=0, atol=1e-6)
    assert not (tmp_path / "run" / "vae").exists()
    suffixes = {file.suffix for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert suffixes - {".md", ".png", ".lock"} == {".json", ".safetensors"}  # no pickles


def test_a_whole_pipeline_can_be_saved_also_without_its_encoders_in_memory(make_trainer, sd_folder, tmp_path):
    cache = {"precompute_latents": True, "precompute_dir": str(tmp_path / "cache")}
    trainer = make_trainer(max_steps=2, save_full_pipeline=True, **cache)
    trainer.train()
    trainer.save_model()
    fresh = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert isinstance(fresh.vae, AutoencoderKL)
    pairs = zip(fresh.unet.parameters(), trainer.denoiser.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    untuned = DiffusionPipeline.from_pretrained(sd_folder)
    assert all(map(torch.equal, fresh.vae.parameters(), untuned.vae.parameters()))
    files = [file for file in (tmp_path / "run").rglob("*.json") if file.name != "training_args.json"]
    assert not [file for file in files if sd_folder in file.read_text()]  # no folder of this machine


def test_a_policy_from_a_trained_adapter_goes_on_training_it(make_trainer, sd_folder, tmp_path):
    first = make_trainer(peft_config=LoraConfig(r=4), output_dir=str(tmp_path / "first"))
    first.train()
    first.save_model()
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.load_lora_weights(str(tmp_path / "first"))

    second = make_trainer(pipeline, output_dir=str(tmp_path / "second"))
    assert second.reference.kind == "ref_adapter"
    torch.testing.assert_close(draw(second.pipeline), draw(first.pipeline), rtol=0, atol=1e-5)
    second.train()
    second.save_model()

    fresh = StableDiffusionPipeline.from_pretrained(sd_folder)
    fresh.load_lora_weights(str(tmp_path / "second"))
    torch.testing.assert_close(draw(fresh), draw(second.pipeline), rtol=0, atol=1e-5)


def test_the_users_pipeline_keeps_its_own_denoiser(make_trainer, sd_folder):
    owner = StableDiffusionPipeline.from_pretrained(sd_folder)
    own = owner.unet
    other = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    trainer = make_trainer(other, processing_class=owner)
    assert owner.unet is own and trainer.denoiser is other
