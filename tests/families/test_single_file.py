"""Models in one file: a tiny Stable Diffusion in the original format, whose keys are written out by hand."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from trl_diffusion_sdpo.models.loading import load_model, load_reference
from trl_diffusion_sdpo.models.pipelines import load_denoiser, load_pipeline
from trl_diffusion_sdpo.saving.starting_point import starting_point

# diffusers' prefix -> the original one, of a UNet with two levels of one layer each.
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.0\.resnets", "up.1.block"),  # counted from the image
    (r"up_blocks\.1\.resnets", "up.0.block"),
    (r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_(.)", r"mid.attn_1.\1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]


def original_unet_key(key: str) -> str:
    prefix = max((name for name in UNET if key.startswith(f"{name}.")), key=len)
    rest = key.removeprefix(f"{prefix}.")
    if "resnets" in prefix:
        part, _, name = rest.partition(".")
        rest = f"{RESNET[part]}.{name}"
    return f"model.diffusion_model.{UNET[prefix]}.{rest}"


def original_vae_key(key: str) -> str:
    for pattern, original in VAE:
        key = re.sub(pattern, original, key)
    return f"first_stage_model.{key}"


@pytest.fixture(scope="module")
def sd_file(sd_folder, tmp_path_factory) -> tuple[str, str]:
    """The tiny pipeline as one file, and a folder with its configurations and tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("single")
    pipeline = load_pipeline(sd_folder)
    tensors = {original_unet_key(key): value for key, value in pipeline.unet.state_dict().items()}
    for key, value in pipeline.vae.state_dict().items():
        if re.search(r"attentions.*weight", key) and value.ndim == 2:
            value = value[:, :, None, None]  # convolutions of size 1 in the original
        tensors[original_vae_key(key)] = value
    for key, value in pipeline.text_encoder.state_dict().items():
        text = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"cond_stage_model.transformer.{text}"] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "tiny.safetensors")
    shutil.copytree(sd_folder, folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder / "tiny.safetensors"), str(folder / "config")


def assert_equal(left: torch.nn.Module, right: torch.nn.Module) -> None:
    torch.testing.assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)


def test_a_file_gives_the_pipeline_of_its_folder(sd_file, sd_folder):
    file, config = sd_file
    pipeline, expected = load_pipeline(file, config=config), load_pipeline(sd_folder)
    for name in ("unet", "vae", "text_encoder"):
        assert_equal(getattr(pipeline, name), getattr(expected, name))
    assert_equal(load_denoiser(file, config=config), expected.unet)


@pytest.mark.matrix
def test_a_run_starts_from_a_file_and_a_second_stage_from_the_run(sd_file, make_trainer, tmp_path):
    """VAE and text encoder are read from the file only while they encode. The file is also the given reference."""
    file, config = sd_file
    kwargs = {"model_init_kwargs": {"config": config}}
    first = make_trainer(
        file,
        max_steps=1,
        precompute_latents=True,
        peft_config=LoraConfig(r=2),
        **kwargs,
    )
    first.train()
    first.save_model()
    point = starting_point(tmp_path / "run")
    assert (point.pipeline, point.options["config"]) == (file, config)
    second = make_trainer(
        tmp_path / "run",
        output_dir=str(tmp_path / "second"),
        max_steps=1,
        ref_model_name_or_path=file,
        ref_model_init_kwargs={"config": config},
    )
    second.train()
    assert second.state.log_history[0]["errors/winner"] > 0


def test_a_reference_in_one_file_is_read_with_the_configuration_of_the_policy(sd_file):
    file, config = sd_file
    policy = load_model(file, model_init_kwargs={"config": config})
    assert_equal(load_reference(file, policy), policy.denoiser)
    with pytest.raises(ValueError, match="for a reference `ref_model_init_kwargs`"):
        load_reference(file, policy, ref_model_init_kwargs={"config": None})


def test_files_that_cannot_be_read_are_refused(sd_file, tmp_path):
    file, config = sd_file
    with pytest.raises(ValueError, match="pickles"):
        (tmp_path / "model.ckpt").write_bytes(b"pickle")
        load_pipeline(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="`config` is only for a model in one file"):
        load_pipeline(config, config=config)
    with pytest.raises(ValueError, match="stable-diffusion-v1-5/.*`model_init"):
        load_pipeline(file)  # taken for Stable Diffusion 1.5, whose configuration is not in the cache
    (tmp_path / "cut.safetensors").write_bytes(Path(file).read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut.safetensors could not be read"):
        load_pipeline(tmp_path / "cut.safetensors", config=config)
    shutil.copytree(config, tmp_path / "config")
    (tmp_path / "config" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="vae has pickled weights"):
        load_pipeline(file, config=str(tmp_path / "config"))
