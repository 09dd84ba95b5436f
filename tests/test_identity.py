"""What a stored result depends on is described whole, and a comparison names what differs."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import quiet

from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.utils.identity import (
    describe_component,
    describe_pipeline,
    describe_source,
    differences,
    hash_of_tensors,
    listed,
    read_description,
    short_hash,
    write_description,
)


def only_difference(before, now) -> str:
    """Return the one difference of two descriptions."""
    found = differences(before, now)
    assert len(found) == 1, found
    return found[0]


def test_a_difference_names_its_place_and_both_values():
    before = {"scheduler": {"shift": 3.0, "steps": [1, 2]}, "seed": 1}
    now = {"scheduler": {"shift": 1.0, "steps": (1, 2)}, "seed": 1}
    assert differences(before, now) == ["scheduler.shift was 3.0, is 1.0"]
    assert differences(before, before) == []


def test_an_entry_that_only_one_description_has_is_a_difference():
    found = differences({"a": 1, "b": None}, {"b": None, "c": 2})
    assert len(found) == 2 and "a" in found[0] and "c" in found[1]


def test_not_a_number_does_not_differ_from_itself():
    assert differences({"x": float("nan")}, {"x": float("nan")}) == []


def test_many_differences_are_counted_in_a_sentence():
    found = differences({}, {f"x{number}": number for number in range(20)})
    assert "x0" in listed(found) and "x19" not in listed(found) and "12" in listed(found)


def test_no_secret_is_in_a_sentence():
    assert "s3cr3t" not in only_difference({"url": "http://a/?token=s3cr3t"}, {"url": "http://b/"})


def test_a_description_is_the_same_after_it_was_written_and_read(tmp_path):
    class Thing:
        pass

    def value() -> dict:  # objects, functions and sets have another text in every process
        return {"thing": Thing(), "words": {"b", "a"}, 3: (torch.float32, np.float32(0.5)), "call": value, "no": None}

    file = tmp_path / "new" / "key.json"
    write_description(file, value())
    assert differences(read_description(file), value()) == []
    assert short_hash(read_description(file)) == short_hash(value())


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000])
def test_a_file_that_is_no_description_is_unknown(content, tmp_path):
    (tmp_path / "key.json").write_text(content)
    assert read_description(tmp_path / "key.json") is None
    assert read_description(tmp_path / "absent.json") is None


def test_long_arrays_differ_in_the_middle():
    values = np.zeros(5000)
    changed = values.copy()
    changed[2500] = 1
    assert differences({"x": values}, {"x": changed}) and short_hash(values) != short_hash(changed)
    assert differences({"x": torch.tensor(values)}, {"x": torch.tensor(changed)})


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(sd_folder, tmp_path):
    """A copy of a saved pipeline."""
    return shutil.copytree(sd_folder, tmp_path / "model")


@pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_file_changed_in_place_to_the_same_size_and_times_is_noticed(file, folder):
    before = describe_source(folder)
    status = (folder / file).stat()
    with open(folder / file, "r+b") as stream:
        stream.seek(-3, 2)
        stream.write(b"  \n" if file.endswith("json") else b"\1\2\3")
    os.utime(folder / file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file in only_difference(before, describe_source(folder))


def test_a_component_behind_a_link_is_part_of_the_model(folder, tmp_path):
    moved = shutil.move(folder / "unet", tmp_path / "elsewhere")
    (folder / "unet").symlink_to(moved)
    before = describe_source(folder)
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    assert "unet/config.json" in only_difference(before, describe_source(folder))


def test_images_checkpoints_and_evaluations_in_a_runs_folder_are_not_part_of_the_model(folder):
    before = describe_source(folder)
    for name in ("checkpoint-3/config.json", "samples/0.png", "README.md", "evaluation/scores/a.json", "runs/events"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert differences(before, describe_source(folder)) == []


def test_a_single_file_is_described_by_size_and_times(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"12345678")
    before = describe_source(file)
    assert before["files"]["model.safetensors"][0] == 8
    file.write_bytes(b"123456789")
    assert "model.safetensors" in only_difference(before, describe_source(str(file)))


def test_a_hub_id_is_described_by_its_commit(tmp_path):
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    assert describe_source("owner/name", cache_dir=tmp_path, token="t")["commit"] == "abc123"
    assert describe_source("owner/name", cache_dir=tmp_path, revision="c0ffee")["commit"] == "c0ffee"
    assert describe_source("owner/other", cache_dir=tmp_path)["commit"] is None


# ---- Objects in memory ----------------------------------------------------------------------------------------------


def test_a_pipeline_loaded_twice_has_one_description_and_a_call_does_not_change_it(sd_folder, sd_pipeline):
    before = describe_pipeline(sd_pipeline)
    sd_pipeline("a cat", num_inference_steps=1, output_type="latent")
    assert differences(before, describe_pipeline(sd_pipeline)) == []
    assert differences(before, describe_pipeline(quiet(load_pipeline(sd_folder)))) == []
    json.dumps(before)


def set_scaling_factor(pipeline):
    pipeline.vae.register_to_config(scaling_factor=0.5)


def set_tiling(pipeline):
    pipeline.vae.enable_tiling()


def set_weight(pipeline):
    with torch.no_grad():
        next(pipeline.unet.parameters()).view(-1)[0] += 1e-3


def set_shift(pipeline):
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, beta_end=0.5)


def set_template(pipeline):
    pipeline.tokenizer.chat_template = "{{ messages }}"


def set_length(pipeline):
    pipeline.tokenizer.model_max_length = 5


def set_words(pipeline):
    pipeline.tokenizer.add_tokens(["<new>"])


def set_pipeline_config(pipeline):
    pipeline.register_to_config(requires_safety_checker=not pipeline.config.requires_safety_checker)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (set_scaling_factor, "vae.config.scaling_factor"),
        (set_tiling, "vae.switches.use_tiling"),
        (set_weight, "unet.weights"),
        (set_shift, "scheduler.config.beta_end"),
        (set_template, "tokenizer.chat_template"),
        (set_length, "tokenizer.config.model_max_length"),
        (set_words, "tokenizer.words"),
        (set_pipeline_config, "config.requires_safety_checker"),
    ],
)
def test_every_part_of_a_pipeline_in_memory_is_described(change, name, sd_pipeline):
    before = describe_pipeline(sd_pipeline)
    change(sd_pipeline)
    found = differences(before, describe_pipeline(sd_pipeline))
    assert any(phrase.startswith(name) for phrase in found), found
    part = name.partition(".")[0]
    assert differences(before, {**describe_pipeline(sd_pipeline), part: before[part]}) == []
    if part != "config":
        described = describe_pipeline(sd_pipeline, leave_out=[part])
        assert differences({key: value for key, value in before.items() if key != part}, described) == []


def test_the_scale_of_an_adapter_is_described(sd_pipeline):
    sd_pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    before = describe_component(sd_pipeline.unet)
    sd_pipeline.unet.set_adapters(["default"], weights=[0.5])
    assert only_difference(before, describe_component(sd_pipeline.unet)).startswith("adapters")


def test_the_hash_of_tensors_is_over_name_dtype_shape_and_bytes():
    expected = hashlib.sha256(b"a torch.int16 [2]\n" + b"\1\0\2\0").hexdigest()
    assert hash_of_tensors({"a": torch.tensor([1, 2], dtype=torch.int16)}) == expected
    assert hash_of_tensors({"a": torch.tensor(1.0, dtype=torch.bfloat16)})
