"""The model card: metadata that the Hub accepts, code that loads the tuned weights, and nothing private."""

import re
from dataclasses import fields

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_diffusion_sdpo.saving.model_card import (
    TunedModel,
    forget_recommended_scales,
    generate_model_card,
    recommend_scale,
    recommended_scales,
)

TOKEN = "hf_" + "a1B2" * 8


OF_MODEL = [field.name for field in fields(TunedModel)]


def card_of(**changes) -> ModelCard:
    given = {
        "model_name": "sd-tuned",
        "hub_model_id": "me/sd-tuned",
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "pipeline_class": "StableDiffusionPipeline",
        "denoiser_name": "unet",
        "tuning": "lora",
        "dataset_name": "yuvalkirstain/pickapic_v2",
        "tags": ["stable-diffusion", "lora"],
        "settings": {"beta": 2000.0, "loss_type": "sigmoid"},
        "gallery": [("samples/step-000050-0.png", "a red cube")],
        "license": "creativeml-openrail-m",
        **changes,
    }
    model = {name: given.pop(name) for name in OF_MODEL if name in given}
    return generate_model_card(TunedModel(**model), **given)


def metadata(card):
    """Return the metadata, parsed from the text of the card."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])


def test_metadata_of_a_lora_is_what_the_hub_reads():
    assert metadata(card_of()) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "creativeml-openrail-m",
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "base_model_relation": "adapter",
        "datasets": ["yuvalkirstain/pickapic_v2"],
        "tags": [
            "text-to-image",
            "diffusers",
            "diffusers-training",
            "trl-diffusion-sdpo",
            "diffusion-sdpo",
            "dpo",
            "lora",
            "template:sd-lora",
            "stable-diffusion",
        ],
        "widget": [{"text": "a red cube", "output": {"url": "samples/step-000050-0.png"}}],
    }


def test_the_card_survives_being_written_and_read(tmp_path):
    card = card_of(gallery=[("a.png", "a\n---\nlicense: evil"), ("b.png", 'ein "Würfel": {{ x }} 🧊')])
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == card.data.to_dict()
    assert [entry["text"] for entry in read.data.widget] == ["a\n---\nlicense: evil", 'ein "Würfel": {{ x }} 🧊']
    assert read.data.license == "creativeml-openrail-m"
    assert "# sd-tuned" in read.text


def test_tokens_never_reach_the_card():
    settings = {
        "hub_token": "secret-1",
        "push_to_hub_token": "secret-2",
        "model_init_kwargs": {"token": "secret-3", "revision": "main", "nested": [{"auth_token": "secret-4"}]},
        "run_name": f"with {TOKEN} inside",
        "token_length": 77,
    }
    card = str(card_of(settings=settings))
    assert "secret" not in card and TOKEN not in card
    assert "`{'revision': 'main', 'nested': [{}]}`" in card and "`77`" in card


@pytest.mark.parametrize("name", ["base_model", "dataset_name", "model_name"])
def test_a_signed_address_shows_its_file_and_no_signature(name):
    address = "https://me:s3cr3t@host/sets/pairs.parquet?X-Amz-Date=5&X-Amz-Signature=s3cr3t#s3cr3t"
    card = str(card_of(**{name: address}))
    assert "pairs.parquet" in card and "s3cr3t" not in card and "Amz" not in card
    assert "s3cr3t" not in str(card_of(**{name: "/runs/token=s3cr3t"}))


def test_a_secret_in_a_prompt_is_not_on_the_card():
    prompt = f"a cube, token={TOKEN}"
    card = card_of(gallery=[("a.png", prompt)], comparison=[(prompt, "a.png", "b.png")])
    assert TOKEN not in str(card) and metadata(card)["widget"][0]["text"].startswith("a cube")


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\x00", "\x9b", "\u202e", "\u2066", "\u200f", "\ud800"])
def test_characters_that_a_terminal_obeys_are_not_on_the_card(character):
    text = f"a {character}[31m b"
    given = {"settings": {"run_name": text, "nested": {"a": [text]}}, "gallery": [("a.png", text)], "model_name": text}
    lora = {"r": 2, "lora_alpha": 2, "target_modules": [text]}
    card = card_of(**given, comparison=[(text, "a.png", "b.png")], dataset_name=f"/sets/{text}", lora=lora)
    assert character not in str(card) and "[31m" in str(card)
    str(card).encode()


def test_the_code_on_the_card_names_the_revision_of_the_base():
    card = card_of(options={"revision": "v2", "variant": "fp16", "token": "s3cr3t"})
    (call,) = re.findall(r"DiffusionPipeline.from_pretrained\((.*)\)", card.text)
    assert 'revision="v2"' in call and 'variant="fp16"' in call and "token" not in call


@pytest.mark.parametrize("path", ["C:\\someone\\models\\sd", "~/someone/sd/", "someone/a/sd"])
def test_only_the_names_of_local_folders_are_shown(path):
    card = card_of(base_model=path, dataset_name=path, settings={"output_dir": path, "beta": 1.0})
    assert "base_model" not in metadata(card) and "datasets" not in metadata(card)
    assert "base_model_relation" not in metadata(card)
    assert "Replace `sd`" in card.text
    body = re.sub(r"\| `output_dir`.*", "", str(card)) if path == "someone/a/sd" else str(card)
    assert "someone" not in body


@pytest.mark.parametrize("name", ["models/sd", "models/sd.safetensors"])
def test_a_folder_or_file_that_looks_like_a_hub_id_is_none(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir()
    path.touch() if path.suffix else path.mkdir()
    assert metadata(card_of(base_model=name))["base_model"] == name
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in metadata(card_of(base_model=name))


def test_values_cannot_break_the_table():
    text = card_of(settings={"sample_prompts": ["a | b", "c\nd `e`"], "none": None, "empty": ""}).text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 3 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


@pytest.mark.parametrize(
    ("tuning", "dtype"),
    [
        ("lora", torch.bfloat16),
        ("lora of peft", torch.float32),
        ("full", torch.bfloat16),
        ("full pipeline", torch.float32),
    ],
)
def test_the_code_on_the_card_loads_what_was_tuned(tuning, dtype, sd_folder, make_sd_pipeline, tmp_path, monkeypatch):
    """Some bases are stored in bf16. Without a dtype, diffusers and transformers would load them in two dtypes."""
    monkeypatch.chdir(tmp_path)
    base = DiffusionPipeline.from_pretrained(sd_folder, dtype=dtype)
    base.save_pretrained("base")
    kind = {"tuning": tuning.split()[0], "loads_lora": "peft" not in tuning, "full_pipeline": "pipeline" in tuning}
    if tuning == "lora of peft":
        lora = get_peft_model(base.unet, LoraConfig(r=2, target_modules=["to_q"]))
        for name, parameter in lora.named_parameters():
            if "lora" in name:
                nn.init.ones_(parameter)
        lora.save_pretrained("tuned")
    elif tuning == "lora":
        base.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
        state = {n.replace(".default", ""): torch.ones_like(p) for n, p in base.unet.named_parameters() if "lora" in n}
        base.save_lora_weights("tuned", unet_lora_layers=state)
    else:
        tuned = make_sd_pipeline(seed=1)
        tuned.save_pretrained("tuned") if "pipeline" in tuning else tuned.unet.save_pretrained("tuned/unet")
    card = card_of(base_model="base", hub_model_id="./tuned", dtype=str(dtype).removeprefix("torch."), **kind)
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1].replace('pipeline.to("cuda")\n', "")
    names = {}
    exec(snippet.replace('("a red cube")', '("a red cube", num_inference_steps=1)'), names)
    assert names["image"].size == (16, 16)
    tuned, untuned = names["pipeline"].unet.state_dict(), DiffusionPipeline.from_pretrained("base").unet.state_dict()
    if kind["tuning"] == "lora":
        lora = [name for name in tuned if "lora" in name]
        assert lora and all((tuned[name] == 1).all() for name in lora)
    else:
        assert not torch.equal(tuned["conv_in.weight"], untuned["conv_in.weight"])


# ---- The recommended scale -------------------------------------------------------------------------------------------

GUIDED = {"weights": 1.0, "prediction": 2.5, "guidance_scale": None, "sentence": "Scale 2.5."}
NUMBERS = {"weights": 1.0, "prediction": 2.5}


def test_a_recommended_scale_is_in_the_metadata_and_in_the_text():
    card = card_of(recommended={"recommended_scale": NUMBERS})
    assert metadata(card)["recommended_scale"] == NUMBERS
    assert "preference guidance: 2.5" in card.text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_recommendation_changes_the_metadata_of_an_edited_card_and_nothing_else(tmp_path, newline):
    text = "---\nlicense: mit\nmine: [1, 2]\n---\n# Mine\n\n```python\npipeline(1)\n```\n"
    file = tmp_path / "README.md"
    file.write_bytes(text.replace("\n", newline).encode())
    recommend_scale(tmp_path, GUIDED, average=False)
    recommend_scale(tmp_path, GUIDED, average=True)
    scales = {"recommended_scale": NUMBERS, "recommended_scale_of_average": NUMBERS}
    assert recommended_scales(tmp_path) == scales
    assert ModelCard.load(file).data.to_dict() == {"license": "mit", "mine": [1, 2], **scales}
    assert file.read_bytes().decode().endswith(text[text.index("# Mine") :].replace("\n", newline))
    forget_recommended_scales(tmp_path)
    assert ModelCard.load(file).data.to_dict() == {"license": "mit", "mine": [1, 2]}
