"""Pipelines are loaded from what diffusers saves, and everything else is refused with the reason."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from tiny_pipelines import case

from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.utils.errors import UserError

# Tiny pipeline -> classes besides the text-to-image one whose folders hold the same networks.
OTHER_CLASSES = {
    "chroma": ("ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "flux2_klein": ("Flux2KleinInpaintPipeline",),
    "qwen_image": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "stable_diffusion": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "stable_diffusion_3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "z_image": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
}


@pytest.fixture
def copied_folder(sd_folder, tmp_path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "copy"))


def rewrite_class(folder: Path, class_name) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": class_name}))


def test_half_precision_folder_loads_in_float32_unless_told_otherwise(sd_pipeline, tmp_path):
    sd_pipeline.to(torch.bfloat16).save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        pytest.param(name, other, marks=() if name == "stable_diffusion" else pytest.mark.matrix)
        for name, others in OTHER_CLASSES.items()
        for other in others
    ],
)
def test_folders_of_other_classes_of_a_model_load_as_text_to_image(name, class_name, tmp_path):
    pipeline = case(name).build()
    getattr(diffusers, class_name).from_pipe(pipeline).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == class_name
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is type(pipeline)
    assert type(find_family(loaded)) is type(find_family(pipeline))


def test_a_folder_with_lumina_2s_older_class_name_loads(tmp_path):
    pipeline = case("lumina2").build()
    pipeline.save_pretrained(tmp_path)
    rewrite_class(tmp_path, "Lumina2Text2ImgPipeline")  # as published; diffusers no longer exports it
    assert type(load_pipeline(tmp_path)) is type(pipeline)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("aura_flow", {"in_channels": 8}, "this one takes 8"),
        ("chroma", {"in_channels": 32}, "this one takes 32"),
        ("cogview4", {"in_channels": 32}, "this one takes 32"),
        ("cogview4", {"patch_size": 4}, "`patch_size`"),
        ("flux", {"in_channels": 96}, "this one takes 96"),
        ("ernie_image", {"in_channels": 32}, "this one takes 32"),
        ("hidream", {"in_channels": 32}, "this one takes 32"),
        ("hunyuan_dit", {"learn_sigma": False}, "learn_sigma=False"),
        ("hunyuan_dit", {"in_channels": 8}, "8 input channels"),
        ("ideogram4", {"in_channels": 32}, "this one takes 32"),
        ("krea2", {"in_channels": 32}, "this one takes 32"),
        ("longcat_image", {"in_channels": 32}, "this one takes 32"),
        ("pixart_sigma", {"use_additional_conditions": True}, "PixArtAlpha"),
        ("qwen_image", {"guidance_embeds": True}, "guidance_embeds"),
        ("qwen_image_21", {"in_channels": 16}, "this one takes 16"),
        ("sana", {"guidance_embeds": True}, "Sana-Sprint"),
        ("wan", {"image_dim": 32}, "`image_dim` None, got 32"),
        ("z_image", {"siglip_feat_dim": 16}, "Omni"),
        ("stable_diffusion", {"in_channels": 9}, "has 9"),
        ("stable_diffusion", {"time_cond_proj_dim": 8}, "distilled"),
        ("stable_diffusion_xl", {"projection_class_embeddings_input_dim": 5 * 8 + 32}, "72"),  # a refiner
    ],
)
def test_denoisers_made_for_something_else_are_refused(name, changed, message):
    pipeline = case(name).build()
    denoiser = "unet" if "unet" in pipeline.components else "transformer"
    module = pipeline.components[denoiser]
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    pipeline.register_modules(**{denoiser: type(module)(**{**config, **changed})})
    with pytest.raises(ValueError, match=message):
        find_family(pipeline)


def test_a_folder_with_a_denoiser_made_for_something_else_is_refused(tmp_path):
    pipeline = case("stable_diffusion").build()
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    pipeline.register_modules(unet=type(pipeline.unet)(**{**config, "in_channels": 9}))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 9"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("stable_diffusion", "unet"),
        ("stable_diffusion", "vae"),
        ("stable_diffusion", "text_encoder"),
        ("flux", "transformer"),
        ("ideogram4", "transformer"),
    ],
)
def test_a_pipeline_without_one_of_its_networks_is_refused(name, component):
    pipeline = case(name).build()
    pipeline.register_modules(**{component: None})
    with pytest.raises(ValueError, match=f"`{component}`"):
        find_family(pipeline)


def test_ideogram_4_loads_without_its_second_transformer(family_folder):
    pipeline = load_pipeline(family_folder("ideogram4"), unconditional_transformer=None)
    assert pipeline.unconditional_transformer is None
    assert find_family(pipeline).frozen_components == ("vae", "text_encoder")


def test_wan_with_two_transformers_is_refused():
    pipeline = case("wan").build()
    pipeline.register_to_config(boundary_ratio=0.875)
    with pytest.raises(ValueError, match="`boundary_ratio`"):
        find_family(pipeline)


def test_unsupported_class_is_refused_before_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SomeOtherPipeline"}))
    with pytest.raises(ValueError, match="FluxPipeline.*got SomeOtherPipeline"):
        load_pipeline(tmp_path)


def test_folder_that_is_no_pipeline_is_refused(sd_folder):
    with pytest.raises(ValueError, match="model_index.json"):
        load_pipeline(Path(sd_folder) / "unet")


def test_an_unreachable_hub_id_and_an_empty_file_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing"):
        load_pipeline("nobody/nothing", local_files_only=True, cache_dir=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_pipeline(tmp_path / "model.safetensors")


def test_pipeline_with_code_of_its_own_is_refused(copied_folder):
    rewrite_class(copied_folder, ["pipeline.py", "MyPipeline"])
    with pytest.raises(ValueError, match="never run"):
        load_pipeline(copied_folder)


@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "text_encoder/config.json"])
@pytest.mark.parametrize("text", ["null", "[1]", "3", "[" * 100_000])
def test_files_that_are_no_json_objects_are_refused_by_name(copied_folder, part, text):
    (copied_folder / part).write_text(text)
    for encoders in (True, False):
        with pytest.raises(ValueError, match=str(copied_folder)) as raised:
            load_pipeline(copied_folder, encoders=encoders)
        assert isinstance(raised.value, UserError)


def test_absurd_entries_sizes_and_weights_are_refused_by_name(copied_folder):
    """diffusers itself would train from random weights if a file has none."""
    index, file = copied_folder / "model_index.json", copied_folder / "unet" / "config.json"
    settings, config = json.loads(index.read_text()), json.loads(file.read_text())
    for entry in (3, None, ["diffusers"], {"a": 1}, ["diffusers", 3]):
        index.write_text(json.dumps({**settings, "unet": entry}))
        with pytest.raises(ValueError, match=str(copied_folder)):
            load_pipeline(copied_folder)
    index.write_text(json.dumps(settings))
    file.write_text(json.dumps({**config, "cross_attention_dim": 10**14}))
    with pytest.raises(ValueError, match=str(copied_folder)):
        load_pipeline(copied_folder)
    file.write_text(json.dumps(config))
    weights = copied_folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({}, weights)
    with pytest.raises(ValueError, match=str(weights)):
        load_pipeline(copied_folder)


def test_pickled_weights_are_refused(copied_folder):
    (copied_folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, copied_folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_pipeline(copied_folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [("trust_remote_code", True), ("custom_pipeline", "x"), ("use_safetensors", False), ("torch_dtype", torch.half)],
)
def test_options_that_would_weaken_loading_are_refused(option, value, sd_folder):
    with pytest.raises(ValueError, match=f"`{option}`"):
        load_pipeline(sd_folder, **{option: value})


def test_a_hub_that_cannot_be_reached_is_not_called_a_missing_file():
    with pytest.raises(ValueError) as caught:
        load_pipeline("nobody/nothing")  # offline, like all tests
    unreachable = caught.value.__cause__.__context__
    assert isinstance(unreachable, LocalEntryNotFoundError) and str(unreachable) in str(caught.value)
