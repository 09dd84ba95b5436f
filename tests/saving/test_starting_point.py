"""A second stage starts from a run's folder or from a LoRA."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.models.adapters import adapter_state
from trl_diffusion_sdpo.saving.lora_export import export_kohya
from trl_diffusion_sdpo.saving.starting_point import attach_adapter, starting_point
from trl_diffusion_sdpo.trainer.config.complete import copy_and_check_args
from trl_diffusion_sdpo.utils.errors import UserError

SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
both_precisions = pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.matrix), True])
LORA = {"r": 4, "lora_alpha": 12, "target_modules": ["to_q", "to_out.0", "conv1"]}


@pytest.fixture(scope="module")
def train(sd_folder, make_pairs, tmp_path_factory):
    """`train(model, name, ...)`: a trainer that has trained and saved its weights."""

    def run(model=None, name="run", ref_model=None, peft_config=None, trains=True, **settings):
        args = DiffusionSDPOConfig(**{**SETTINGS, "output_dir": str(tmp_path_factory.mktemp(name)), **settings})
        trainer = DiffusionSDPOTrainer(model or sd_folder, ref_model, args, make_pairs(), peft_config=peft_config)
        if trains:
            trainer.train()
            trainer.save_model()
        return trainer

    return run


@pytest.fixture(scope="module")
def lora_run(train) -> Path:
    """The folder of a LoRA with scale 3, with its average and a checkpoint."""
    trainer = train(peft_config=LoraConfig(**LORA), name="lora", save_strategy="steps", save_steps=2, ema_decay=0.5)
    return Path(trainer.args.output_dir)


@pytest.fixture(scope="module")
def full_run(train) -> Path:
    """The folder of a run that tuned all weights. It has a denoiser only."""
    return Path(train(name="full", learning_rate=1e-3).args.output_dir)


def assert_neutral(trainer) -> None:
    """Check that policy and reference agreed in the first step."""
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0
    assert first["errors/winner_change"] == first["errors/loser_change"] == 0
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)


def lora_of(folder: Path) -> dict[str, torch.Tensor]:
    state = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in state.items()}


def assert_equal(left, right) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


@both_precisions
def test_a_run_of_a_lora_goes_on_from_its_weights_which_are_the_reference(train, lora_run, bf16):
    second = train(lora_run, trains=False, bf16=bf16)
    started = {key: value.detach().clone() for key, value in adapter_state(second.denoiser, "default").items()}
    assert_equal(started, lora_of(lora_run))
    assert_equal(dict(adapter_state(second.denoiser, "ref")), started)
    second.train()
    second.save_model()
    assert second.reference.kind == "ref_adapter"
    assert_neutral(second)
    assert_equal(dict(adapter_state(second.denoiser, "ref")), started)
    after = lora_of(Path(second.args.output_dir))
    assert not torch.equal(*(state["down_blocks.0.resnets.0.conv1.lora_B.weight"] for state in (after, started)))
    config = json.loads(Path(second.args.output_dir, "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)


def test_a_lora_on_another_base_than_its_own_is_named(train, sd_folder, make_sd_pipeline, tmp_path, caplog):
    base = shutil.copytree(sd_folder, tmp_path / "base")
    run = train(str(base), peft_config=LoraConfig(**LORA), max_steps=1).args.output_dir

    def warnings() -> list[str]:
        return [text for text in caplog.messages if run in text]

    for folder in (run, str(shutil.copytree(run, tmp_path / "moved"))):
        train(folder, trains=False)
    assert not warnings()
    make_sd_pipeline(seed=1).unet.save_pretrained(base / "unet")
    train(run, trains=False)
    assert len(warnings()) == 1


@both_precisions
def test_a_run_of_all_weights_goes_on_with_the_rest_of_its_pipeline(train, full_run, sd_folder, bf16):
    second = train(full_run, bf16=bf16, trains=False)
    tuned = UNet2DConditionModel.from_pretrained(full_run, subfolder="unet").state_dict()
    assert_equal(second.denoiser.state_dict(), tuned)
    assert second.origin.name_or_path == sd_folder
    second.train()
    assert second.reference.kind == "frozen"
    assert_neutral(second)


@pytest.mark.matrix
def test_stages_follow_one_another_without_the_earlier_folders(train, lora_run, full_run, sd_folder):
    """A third stage of a LoRA needs the pipeline only. A LoRA on tuned weights needs these weights and the pipeline."""
    second = Path(train(lora_run, name="second").args.output_dir)
    point = starting_point(second)
    assert (point.pipeline, point.denoiser, point.adapter) == (sd_folder, None, str(second))
    over = Path(train(full_run, name="over", peft_config=LoraConfig(**LORA)).args.output_dir)
    point = starting_point(over)
    assert (point.pipeline, point.denoiser, point.adapter) == (sd_folder, str(full_run), str(over))
    assert_neutral(train(over, max_steps=1))


@pytest.mark.matrix
def test_checkpoints_and_averages_are_starting_points(train, lora_run):
    for folder in (lora_run / "checkpoint-2", lora_run / "ema"):
        trainer = train(folder, trains=False)
        assert_equal(dict(adapter_state(trainer.denoiser, "default")), lora_of(folder))


@pytest.mark.parametrize("where", [pytest.param("folder", marks=pytest.mark.matrix), "file"])
def test_a_lora_in_the_format_of_diffusers_goes_on(train, lora_run, sd_folder, tmp_path, where):
    """The scale is in the weights, so alpha is the rank. The product of the factors is unchanged."""
    shutil.copy(lora_run / "pytorch_lora_weights.safetensors", tmp_path)
    source = tmp_path if where == "folder" else tmp_path / "pytorch_lora_weights.safetensors"
    trainer = train(adapter_name_or_path=str(source), max_steps=1)
    assert_neutral(trainer)
    assert trainer.denoiser.peft_config["default"].r == trainer.denoiser.peft_config["default"].lora_alpha == 4
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    trained, before = (
        lora_of(lora_run),
        adapter_state(train(adapter_name_or_path=str(source), trains=False).denoiser, "default"),
    )
    product = 3 * trained[f"{name}.lora_B.weight"] @ trained[f"{name}.lora_A.weight"]
    torch.testing.assert_close(before[f"{name}.lora_B.weight"] @ before[f"{name}.lora_A.weight"], product)


@pytest.mark.matrix
def test_an_exported_lora_and_one_of_peft_go_on(train, lora_run, sd_pipeline, tmp_path):
    export_kohya(lora_run, tmp_path / "kohya.safetensors")
    assert_neutral(train(adapter_name_or_path=str(tmp_path / "kohya.safetensors"), max_steps=1))
    PeftModel.from_pretrained(sd_pipeline.unet, lora_run).save_pretrained(tmp_path / "peft")
    trainer = train(adapter_name_or_path=str(tmp_path / "peft"), trains=False)
    assert_equal(dict(adapter_state(trainer.denoiser, "default")), lora_of(lora_run))


@both_precisions
def test_a_run_as_the_reference_is_base_and_lora(train, lora_run, bf16):
    """Policy and reference load the same run in two ways, and agree bit for bit."""
    trainer = train(lora_run, ref_model_name_or_path=str(lora_run), bf16=bf16, max_steps=1)
    assert trainer.reference.kind == "frozen"
    assert_neutral(trainer)


@pytest.mark.matrix
def test_a_second_stage_resumes_bit_for_bit(train, lora_run, tmp_path):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(lora_run, output_dir=str(tmp_path / "whole"), **steps)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    resumed = train(lora_run, output_dir=str(tmp_path / "cut"), trains=False, **steps)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(dict(adapter_state(resumed.denoiser, "default")), dict(adapter_state(whole.denoiser, "default")))
    assert_equal(dict(adapter_state(resumed.denoiser, "ref")), lora_of(lora_run))


def test_a_third_stage_of_all_weights_needs_no_folder_of_the_second(full_run, tmp_path):
    """The second run's denoiser replaces the first run's."""
    shutil.copytree(full_run, tmp_path / "run")
    args = json.loads((tmp_path / "run" / "training_args.json").read_text())
    args["base_model"]["denoiser"] = "/gone/second-run"
    (tmp_path / "run" / "training_args.json").write_text(json.dumps(args))
    assert starting_point(tmp_path / "run").denoiser == str(tmp_path / "run")


@pytest.mark.parametrize("inner", ["", "checkpoint-2", "ema", "pytorch_lora_weights.safetensors"])
def test_a_run_does_not_write_over_its_own_start(tmp_path, inner):
    start, own = str(tmp_path / "run" / inner), DiffusionSDPOConfig(str(tmp_path / "run"), report_to="none")
    for model, reference in ((start, None), ("a/b", start)):
        with pytest.raises(ValueError, match="`output_dir`"):
            copy_and_check_args(model, reference, own)
    copy_and_check_args(start, None, DiffusionSDPOConfig(str(tmp_path / "other"), report_to="none"))


@pytest.mark.parametrize("damage", ["pickled", "cut", "nothing", "arguments"])
def test_a_damaged_folder_of_a_lora_is_refused(lora_run, sd_pipeline, tmp_path, damage):
    folder = tmp_path / "lora"
    shutil.copytree(lora_run, folder, ignore=shutil.ignore_patterns("checkpoint-*", "pytorch_lora*"))
    if damage == "pickled":
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    elif damage == "arguments":
        (folder / "training_args.json").write_text('{"beta": ')
    else:
        (folder / "adapter_config.json").write_text("{" if damage == "cut" else '{"r": 4}')
    messages = {"pickled": "no LoRA at .*adapter_model.safetensors", "arguments": "training_args.json"}
    messages |= {"cut": "adapter_config.json"}
    with pytest.raises(ValueError, match=messages.get(damage, "lora cannot be loaded")) as raised:
        starting_point(folder)
        attach_adapter(sd_pipeline, "unet", str(folder))
    assert isinstance(raised.value, UserError)


@pytest.mark.matrix
def test_a_base_that_moved_is_named_with_the_way_out(train, lora_run, sd_folder, tmp_path):
    moved = shutil.copytree(lora_run, tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoint-*"))
    args = json.loads((moved / "training_args.json").read_text())
    args["base_model"]["pipeline"] = "/no/such/pipeline"
    (moved / "training_args.json").write_text(json.dumps(args))
    with pytest.raises(ValueError, match="/no/such/pipeline.* `adapter_name_or_path`"):
        starting_point(moved)
    (moved / "training_args.json").unlink()  # as on the Hub, where the base was a folder
    with pytest.raises(ValueError, match="from which pipeline"):
        starting_point(moved)
    assert_neutral(train(sd_folder, adapter_name_or_path=str(moved), max_steps=1))


def test_a_second_lora_or_reference_is_refused_and_its_configuration_is_not_used(train, lora_run, caplog):
    trainer = train(lora_run, peft_config=LoraConfig(r=8), trains=False)
    assert trainer.denoiser.peft_config["default"].r == 4 and "`peft_config` has no effect" in caplog.text
    with pytest.raises(ValueError, match="`adapter_name_or_path`"):
        train(lora_run, adapter_name_or_path=str(lora_run), trains=False)
    with pytest.raises(ValueError, match="`ref_model_name_or_path`"):
        train(lora_run, "twice", "a/b", ref_model_name_or_path="a/b", trains=False)


def test_a_lora_that_cannot_go_on_is_refused_with_the_reason(train, lora_run, make_sd_pipeline, tmp_path):
    state = load_file(lora_run / "pytorch_lora_weights.safetensors")
    some = next(iter(state.values()))
    files = {
        "text": {**state, "text_encoder.layers.0.self_attn.q_proj.lora_A.weight": some.clone()},
        "lokr": {"lora_unet_mid.lokr_w1": some},
        "other": {
            "transformer.blocks.0.attn.to_q.lora_A.weight": some,
            "transformer.blocks.0.attn.to_q.lora_B.weight": some.clone(),
        },
    }
    messages = {
        "text": "text encoders",
        "lokr": "has none|cannot be loaded",
        "other": "has none|cannot be loaded",
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=messages[name]):
            train(adapter_name_or_path=str(tmp_path / f"{name}.safetensors"), trains=False)
    with pytest.raises(ValueError, match="cannot be loaded|another architecture"):
        train(make_sd_pipeline(block_out_channels=(8, 16)), adapter_name_or_path=str(lora_run), trains=False)
    (tmp_path / "lora.ckpt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="are never read"):
        train(adapter_name_or_path=str(tmp_path / "lora.ckpt"), trains=False)
    with pytest.raises(ValueError, match="/no/such"):
        train(adapter_name_or_path="/no/such", trains=False)


CATASTROPHIC = "(.*a){40}b"  # takes ages to match a long name
STRANGE_SETTINGS = {
    "code to import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    "regular expression of ranks": {"rank_pattern": {CATASTROPHIC: 4}},
    "regular expression of alphas": {"alpha_pattern": {CATASTROPHIC: 4}},
    "regular expression of layers": {"layers_pattern": CATASTROPHIC, "layers_to_transform": [0]},
    "no number": {"lora_alpha": float("inf")},
    "rank of no tensor": {"r": 300_000},
    "rank of memory": {"rank_pattern": {"to_q": 10**12}},
    "no names": {"target_modules": [1]},
}


@pytest.mark.parametrize("where", ["peft", "diffusers"])
@pytest.mark.parametrize("strange", STRANGE_SETTINGS)
def test_settings_of_a_strangers_lora_that_libraries_would_run_are_refused(
    lora_run, sd_pipeline, tmp_path, strange, where
):
    changes = STRANGE_SETTINGS[strange]
    config = json.loads((lora_run / "adapter_config.json").read_text())
    file = tmp_path / "adapter_config.json"
    if where == "peft":
        shutil.copy(lora_run / "adapter_model.safetensors", tmp_path)
        file.write_text(json.dumps({**config, **changes}))
        source = tmp_path
    else:
        source = file = write_lora(lora_run, tmp_path / "lora.safetensors", settings={**config, **changes})
    with pytest.raises(ValueError, match=str(file)) as raised:
        attach_adapter(sd_pipeline, "unet", str(source))
    assert isinstance(raised.value, UserError)


def write_lora(run: Path, file: Path, tensors=None, settings=None) -> Path:
    """Write a LoRA in diffusers' format, with tensors and settings in place of the run's."""
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as opened:
        metadata = opened.metadata()
    if settings is not None:
        settings = {f"unet.{name}": value for name, value in settings.items()}
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
    save_file(load_file(run / "pytorch_lora_weights.safetensors") if tensors is None else tensors, file, metadata)
    return file


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_a_regular_expression_of_targets_in_a_file_is_not_matched_but_read_from_the_tensors(
    lora_run, sd_pipeline, tmp_path, name
):
    shutil.copy(lora_run / "adapter_model.safetensors", tmp_path)
    config = json.loads((lora_run / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, name: CATASTROPHIC}))
    adapter = attach_adapter(sd_pipeline, "unet", str(tmp_path))
    stored = load_file(lora_run / "adapter_model.safetensors")
    found = adapter_state(sd_pipeline.unet, adapter)
    assert found.keys() == {key.removeprefix("base_model.model.") for key in stored}
    assert all(torch.equal(tensor, stored[f"base_model.model.{key}"]) for key, tensor in found.items())


@pytest.mark.parametrize("damage", ["few", "foreign", "of another model", "rank", "none", "settings"])
def test_a_damaged_lora_of_diffusers_is_refused_like_one_of_peft(lora_run, sd_pipeline, tmp_path, damage):
    file = tmp_path / "lora.safetensors"
    tensors = load_file(lora_run / "pytorch_lora_weights.safetensors")
    pair = {"a.lora_A.weight": torch.zeros(4, 8), "a.lora_B.weight": torch.zeros(8, 4)}
    modules = sorted({key.rpartition(".lora_")[0] for key in tensors})
    damaged = {
        "few": {key: value for key, value in tensors.items() if key.startswith(modules[0])},
        "foreign": {**tensors, **{f"unet.nowhere.{key}": value for key, value in pair.items()}},
        "of another model": {**tensors, **{f"transformer.{key}": value for key, value in pair.items()}},
        "rank": {
            f"{modules[0]}.lora_A.weight": torch.zeros(3000, *tensors[f"{modules[0]}.lora_A.weight"].shape[1:]),
            f"{modules[0]}.lora_B.weight": torch.zeros(
                len(tensors[f"{modules[0]}.lora_B.weight"]), 3000, *tensors[f"{modules[0]}.lora_B.weight"].shape[2:]
            ),
        },
        "none": {},
    }
    write_lora(lora_run, file, damaged.get(damage))
    if damage == "rank":
        save_file(damaged["rank"], file)  # without settings, so diffusers reads the rank from the tensors
    if damage == "settings":
        save_file(tensors, file, {"lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(ValueError, match=str(file)) as raised:
        attach_adapter(sd_pipeline, "unet", str(file))
    assert isinstance(raised.value, UserError)


def test_the_record_of_a_run_names_a_pipeline_and_no_other_options(tmp_path):
    def start(base):
        setup = {"tuning": "lora", "base_model": base}
        (tmp_path / "diffusion_sdpo_setup.json").write_text(json.dumps(setup))
        return starting_point(tmp_path)

    strange = {"cache_dir": "elsewhere", "proxies": {}, "token": "t", "unet": 1, "local_files_only": True}
    base = {"pipeline": "owner/name", "denoiser": None, "options": {"revision": "r", "variant": 3, **strange}}
    found = start(base)
    assert found.pipeline == "owner/name" and found.options == {"revision": "r"}
    for damaged in ({**base, "pipeline": 3}, {**base, "denoiser": [1]}, {**base, "options": [1]}, [1]):
        with pytest.raises(ValueError, match=f"{tmp_path}.*from which pipeline"):
            start(damaged)
    (tmp_path / "training_args.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="training_args.json"):
        start(base)


def test_a_lora_of_several_ranks_goes_on_twice(train, sd_folder, tmp_path):
    """diffusers puts `^` before the names in the `rank_pattern` that it makes for another tool's file."""
    ranks = {"r": 4, "target_modules": ["to_q", "to_k"], "rank_pattern": {"to_k": 2}}
    first = train(sd_folder, peft_config=LoraConfig(**ranks), max_steps=1).args.output_dir
    tensors = load_file(Path(first, "pytorch_lora_weights.safetensors"))
    save_file(tensors, tmp_path / "plain.safetensors")
    second = train(sd_folder, adapter_name_or_path=str(tmp_path / "plain.safetensors"), max_steps=1).args.output_dir
    assert "^" in json.loads(Path(second, "adapter_config.json").read_text())["rank_pattern"].popitem()[0]
    for source in (second, f"{second}/pytorch_lora_weights.safetensors"):
        assert train(sd_folder, adapter_name_or_path=source, trains=False).adapter == "default"
