"""The tiny pipeline: its tokenizer, the packaged weights, and images from fixed latents."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from trl_diffusion_sdpo.tools.demo.oracle import oracle_parts
from trl_diffusion_sdpo.tools.demo.pipeline import (
    base_pipeline_folder,
    generate_images,
    load_base_pipeline,
    score_latents,
    score_prompts,
)
from trl_diffusion_sdpo.tools.demo.world import BACKGROUNDS, COLOURS, SHAPES


@pytest.fixture(scope="module")
def base():
    return load_base_pipeline()


def test_every_word_of_the_world_is_one_token(base):
    tokenizer = base.tokenizer
    words = ["a", "on", *COLOURS, *SHAPES, *BACKGROUNDS]
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(words)


def test_the_shipped_pipeline_loads_in_one_dtype_if_none_is_asked_for():
    pipeline = StableDiffusionPipeline.from_pretrained(base_pipeline_folder())
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    image = pipeline("a red circle on white", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_equal_latents_give_equal_images_and_the_pipeline_is_not_changed(base):
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    pipeline = StableDiffusionPipeline(**{**base.components, "scheduler": scheduler}, requires_safety_checker=False)
    latents, prompts = score_latents(1)[:3], score_prompts(1)[:3]
    first = generate_images(pipeline, prompts, latents, steps=3)
    assert first.shape == (3, 32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, generate_images(pipeline, prompts, latents, steps=3))
    assert pipeline.scheduler is scheduler


def test_the_base_model_follows_prompts_and_can_be_improved(base):
    images = generate_images(base, score_prompts(3), score_latents(3))
    parts, mismatched = oracle_parts(images, score_prompts(3)), oracle_parts(images, score_prompts(3)[::-1])
    assert 0.35 < parts.score.mean() < 0.45  # measured 0.400, standard error 0.012
    assert parts.colour.mean() > 3 * mismatched.colour.mean()


@pytest.mark.matrix
def test_the_build_script_makes_a_loadable_folder_and_resumes(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import build_demo_base as build_base

    monkeypatch.setattr(build_base, "IMAGES_PER_PROMPT", 1)
    arguments = ["--output", str(tmp_path / "base"), "--work_dir", str(tmp_path / "work")]
    build_base.main([*arguments, "--vae_steps", "2", "--unet_steps", "2"])
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert generate_images(loaded, score_prompts(1)[:1], score_latents(1)[:1], steps=1).shape == (1, 32, 32, 3)

    with caplog.at_level("INFO"):
        build_base.main([*arguments, "--vae_steps", "2", "--unet_steps", "2"])
    assert "stage skipped" in caplog.text
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(again.unet.conv_in.weight, loaded.unet.conv_in.weight)
