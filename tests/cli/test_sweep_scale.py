"""The sweep over scales between a base and a run's weights: measured, plotted, and written."""

import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import case

from trl_diffusion_sdpo import preference_guidance
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.saving.interpolation import ScaledWeights, read_run, scaled_factor

LORA = {"peft_config": LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])}
PREDICTION_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory, make_pairs):
    folder = tmp_path_factory.mktemp("pairs")
    make_pairs(6, seed=1).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def train_run(tmp_path_factory, make_pairs, sd_folder):
    """`train_run(name, base=, lora=, **settings)`: folder of a short run, and its evaluation; one run per name."""
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    runs = {}

    def train(name, *, base=None, ref_model=False, peft_config=None, **settings):
        if name in runs:
            return runs[name]
        folder = tmp_path_factory.mktemp("runs") / name
        args = DiffusionSDPOConfig(
            **{"output_dir": str(folder), "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
            | {"num_noise_bins": 3, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
            | {"per_device_eval_batch_size": 8, "random_flip": False, **settings}
        )
        data = {"train_dataset": make_pairs(4), "eval_dataset": make_pairs(6, seed=1)}
        reference = sd_folder if ref_model else None
        trainer = DiffusionSDPOTrainer(base or sd_folder, reference, args, **data, peft_config=peft_config)
        trainer.train()
        trainer.save_model()
        runs[name] = folder, trainer.evaluate()
        return runs[name]

    return train


@pytest.fixture
def lora_run(train_run):
    return train_run("lora", **LORA, ema_decay=0.5)


@pytest.fixture
def full_run(train_run):
    return train_run("full", learning_rate=1e-3, ema_decay=0.5)


@pytest.fixture
def sweep(tmp_path, sd_folder, pairs_folder):
    """`sweep(folder, *more, base=, output=)`: exit code of the command without images; the rows are in
    `tmp_path / output`."""

    def call(folder, *more, base=None, output="sweep"):
        words = ["--run", str(folder), "--model_name_or_path", base or sd_folder, "--dataset_name", pairs_folder]
        words.append("--no_images")
        return main(["sweep-scale", *words, "--output_dir", str(tmp_path / output), "--use_cpu", *map(str, more)])

    return call


@pytest.fixture
def generate(tmp_path, sd_folder, pairs_folder, monkeypatch):
    """`generate(folder, *more)`: exit code of the command with images of two steps, in `tmp_path / "sweep"`; modules of
    `tmp_path` can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(folder, *more):
        words = ["--run", str(folder), "--model_name_or_path", sd_folder, "--dataset_name", pairs_folder]
        words += ["--output_dir", str(tmp_path / "sweep"), "--use_cpu", "--max_pairs", "1"]
        return main(["sweep-scale", *words, "--sample_inference_steps", "2", *map(str, more)])

    return call


def pixels(folder: Path, name: str, prompt: int) -> np.ndarray:
    """One image of 16 pixels within a grid, whose rows are at least 45 pixels high with 4 between them."""
    top = 4 + 49 * prompt
    with Image.open(folder / "images" / name) as image:
        return np.asarray(image.crop((4, top, 20, top + 16)))


def rows_in(folder: Path) -> list[dict]:
    return json.loads((folder / "sweep.json").read_text())["rows"]


def unet_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()


def predict(denoiser: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    width = denoiser.config.cross_attention_dim
    with torch.no_grad():
        return denoiser.eval()(noisy, torch.tensor([10, 700]), text[..., :width]).sample


def assert_is_what_the_run_measured(row: dict, measured: dict, prefix: str = "eval"):
    assert row["margin"] == pytest.approx(measured[f"{prefix}_rewards/margins"], rel=1e-5, abs=1e-9)
    for key, metric in (("winner_change", "winner_change_relative"), ("margin_relative", "margin_relative")):
        assert row[key] == pytest.approx(measured[f"{prefix}_errors/{metric}"], rel=1e-4, abs=1e-7), key


def assert_is_the_reference(row: dict):
    assert row["scale"] == 0
    assert row["margin"] == row["winner_change"] == row["margin_relative"] == 0.0


# ---- Weights -------------------------------------------------------------------------------------------------------


def test_of_a_lora_the_factor_b_alone_is_scaled():
    tuned = torch.tensor([2.0, -4.0])
    assert scaled_factor("down.to_q.lora_B.weight", tuned, 0.25).tolist() == [0.5, -1.0]
    assert scaled_factor("down.to_q.lora_A.weight", tuned, 0.25) is tuned


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.matrix)])
def test_weights_are_restored_exactly_after_a_scale(make_trainer, lora_run, full_run, tuning):
    run = read_run({"lora": lora_run, "full": full_run}[tuning][0])
    trainer = make_trainer(peft_config=run.lora)
    denoiser = trainer.denoiser
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    weights = ScaledWeights(trainer.weight_files, run)
    with weights.active(0.5):
        during = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    after = denoiser.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(during[name], before[name]) for name in before)


# ---- The sweep -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_scale_0_is_the_reference_and_scale_1_equals_the_runs_evaluation(
    sweep, tmp_path, lora_run, full_run, tuning, capsys
):
    folder, measured = {"lora": lora_run, "full": full_run}[tuning]
    assert sweep(folder, "--scales", 0, 0.5, 1) == 0
    rows = rows_in(tmp_path / "sweep")
    assert [row["scale"] for row in rows] == [0.0, 0.5, 1.0]
    assert_is_the_reference(rows[0])
    assert_is_what_the_run_measured(rows[2], measured)
    assert rows[1]["margin"] not in (0.0, rows[2]["margin"])
    assert "winners' error" in capsys.readouterr().out


@pytest.mark.matrix
def test_scale_1_is_the_artefact_loaded_by_plain_diffusers(sweep, tmp_path, make_trainer, make_pairs, sd_folder):
    """With rank-stabilised scaling, whose strength a wrong factor would change."""
    config = LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["to_k"])
    trainer = make_trainer(peft_config=config, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    assert sweep(tmp_path / "run", "--scales", 1) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.load_lora_weights(tmp_path / "run")
    loaded = make_trainer(pipeline, sd_folder, eval_dataset=make_pairs(6, seed=1), output_dir=str(tmp_path / "other"))
    assert_is_what_the_run_measured(rows_in(tmp_path / "sweep")[0], loaded.evaluate())


@pytest.mark.matrix
def test_a_flow_model_is_swept(sweep, tmp_path, train_run, family_folder):
    base = family_folder("flux")
    folder, measured = train_run(
        "flux", base=base, peft_config=LoraConfig(r=2), resolution=case("flux").RESOLUTION, guidance_scale=2.0
    )
    assert sweep(folder, "--scales", 0, 1, "--bake", 0.5, "--baked_dir", tmp_path / "baked", base=base) == 0
    rows = rows_in(tmp_path / "sweep")
    assert_is_the_reference(rows[0])
    assert_is_what_the_run_measured(rows[1], measured)
    FluxPipeline.from_pretrained(base).load_lora_weights(tmp_path / "baked")


def test_a_run_without_a_reference_is_measured_by_the_sigmoid_loss_and_averages_by_their_weights(
    sweep, tmp_path, train_run, lora_run
):
    assert sweep(train_run("sft", **LORA, loss_type="sft")[0], "--scales", 1) == 0
    assert rows_in(tmp_path / "sweep")[0]["margin"] != 0
    folder, measured = lora_run
    assert sweep(folder, "--scales", 1, "--average") == 0
    assert measured["eval_ema_rewards/margins"] != measured["eval_rewards/margins"]
    assert_is_what_the_run_measured(rows_in(tmp_path / "sweep")[0], measured, prefix="eval_ema")


@pytest.mark.parametrize(("setting", "more"), [("sync_ref_model", {"ref_model_sync_steps": 1}), ("ref_model", {})])
def test_a_run_with_another_reference_than_the_sweeps_is_a_warning(train_run, caplog, setting, more):
    folder, _ = train_run(setting, max_steps=1, **{setting: True}, **more)
    read_run(folder)
    assert f"`{setting}`" in caplog.text


@pytest.mark.parametrize(("max_pairs", "evaluated"), [(4, 4), (7, 6)])
def test_pairs_are_counted_where_a_row_is_one_of_several_images(
    sweep, tmp_path, make_pairs, lora_run, max_pairs, evaluated
):
    """Two prompts with three ranked images each: three pairs of every prompt, and no pair in a row."""
    images = make_pairs(6, seed=1)["chosen"]
    rows = {"prompt": ["a dog"] * 3 + ["a cat"] * 3, "prompt_id": [0] * 3 + [1] * 3, "rank": [1, 2, 3] * 2}
    (tmp_path / "ranked").mkdir()
    datasets.Dataset.from_dict({**rows, "image": list(images)}).to_parquet(tmp_path / "ranked" / "test.parquet")
    asked = ["--scales", 1, "--max_pairs", max_pairs, "--dataset_name", tmp_path / "ranked"]
    assert sweep(lora_run[0], *asked) == 0
    assert rows_in(tmp_path / "sweep")[0]["pairs"] == evaluated


# ---- Baking --------------------------------------------------------------------------------------------------------


def test_a_baked_lora_loads_in_plain_diffusers_and_predicts_like_the_mix_by_hand(sweep, tmp_path, lora_run, sd_folder):
    folder, _ = lora_run
    assert sweep(folder, "--scales", 1, "--bake", 0.25, "--baked_dir", tmp_path / "baked") == 0
    baked = StableDiffusionPipeline.from_pretrained(sd_folder)
    baked.load_lora_weights(tmp_path / "baked")
    mix, factors = unet_of(sd_folder), load_file(folder / "adapter_model.safetensors")
    names = [name for name in factors if name.endswith(".lora_A.weight")]
    for name in names:
        update = factors[name.replace("lora_A", "lora_B")] @ factors[name]
        layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
        mix[layer] = mix[layer] + 0.25 * (4 / 2) * update  # lora_alpha / r
    by_hand = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    base = predict(by_hand)
    by_hand.load_state_dict(mix)
    assert names and (predict(by_hand) - base).abs().max() > 1e-3
    torch.testing.assert_close(predict(baked.unet), predict(by_hand), **PREDICTION_TOLERANCE)


def test_baked_weights_load_in_plain_diffusers_and_are_the_mix_by_hand(sweep, tmp_path, full_run, sd_folder):
    folder, _ = full_run
    assert sweep(folder, "--scales", 1, "--bake", 0.5, "--baked_dir", tmp_path / "baked") == 0
    baked, base, tuned = unet_of(tmp_path / "baked"), unet_of(sd_folder), unet_of(folder)
    for name in base:
        torch.testing.assert_close(baked[name], (base[name] + tuned[name]) / 2, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(baked[name], tuned[name]) for name in base)


@pytest.mark.matrix
def test_a_run_that_saved_its_whole_pipeline_is_baked_as_one(sweep, tmp_path, train_run):
    folder, _ = train_run("pipeline", learning_rate=1e-3, save_full_pipeline=True, max_steps=1)
    assert sweep(folder, "--scales", 1, "--bake", 1, "--baked_dir", tmp_path / "baked", "--max_pairs", 1) == 0
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "baked")
    tuned = unet_of(folder)
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in loaded.unet.state_dict().items())


def test_baked_weights_have_the_scale_in_their_setup_file(sweep, tmp_path, lora_run):
    folder, _ = lora_run
    asked = ["--scales", 1, "--baked_dir", tmp_path / "baked", "--bake"]
    assert sweep(folder, *asked, 0.25) == 0
    assert sweep(folder, *asked, 0.75) == 0  # earlier scaled weights may be written over
    setup, own = (json.loads((f / "diffusion_sdpo_setup.json").read_text()) for f in (tmp_path / "baked", folder))
    assert setup == {**own, "scale": 0.75, "scaled_average": False}


# ---- Images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.matrix)])
def test_images_are_those_of_plain_diffusers_pipelines(generate, tmp_path, lora_run, full_run, sd_folder, tuning):
    """The base, scaled weights and guidance, with classifier-free guidance, from equal noise."""
    folder, _ = {"lora": lora_run, "full": full_run}[tuning]
    asked = ["--scales", 0, 1, 2, "--prompts", "a dog", "a cat", "--sample_guidance_scale", 3, "--seed", 5]
    assert generate(folder, *asked) == 0

    def image_of(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        call = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
        return np.asarray(pipeline("a cat", generator=torch.Generator().manual_seed(5 + 1), **call).images[0])

    base = StableDiffusionPipeline.from_pretrained(sd_folder)
    expected = {"weights-0.png": image_of(base)}
    tuned, reference = StableDiffusionPipeline.from_pretrained(sd_folder), None
    if tuning == "lora":
        tuned.load_lora_weights(folder)
        tuned.set_adapters("default_0", 2.0)
        expected["weights-2.png"] = image_of(tuned)
        tuned.set_adapters("default_0", 1.0)
    else:
        base_weights, reference = unet_of(sd_folder), base.unet
        tuned.unet.load_state_dict({name: 2 * weight - base_weights[name] for name, weight in unet_of(folder).items()})
        expected["weights-2.png"] = image_of(tuned)
        tuned.unet.load_state_dict(unet_of(folder))
    expected["weights-1.png"] = image_of(tuned)
    with preference_guidance(tuned, 2.0, reference=reference):
        expected["prediction-2.png"] = image_of(tuned)
    assert len({found.tobytes() for found in expected.values()}) == 4
    for name, found in expected.items():
        assert np.abs(pixels(tmp_path / "sweep", name, 1).astype(int) - found).max() <= 1, name


SCORER = """
calls = []


def by_call(images, prompts):
    calls.append((len(images), prompts))
    return [float(len(calls))] * len(images)
"""


def test_scores_recommend_a_scale_in_the_metadata_of_the_card(generate, tmp_path, lora_run, capsys):
    """With the run's own sample prompts. The scorer's values rise with its calls."""
    folder = shutil.copytree(lora_run[0], tmp_path / "run")
    prompts, args = [f"prompt {i}" for i in range(8)], json.loads((folder / "training_args.json").read_text())
    (folder / "training_args.json").write_text(json.dumps({**args, "sample_prompts": prompts}))
    (tmp_path / "scores_of_a_test.py").write_text(SCORER)
    asked = ["--scales", 1, 2, "--sample_inference_steps", 1, "--sample_guidance_scale", 3]
    assert generate(folder, *asked, "--scorer", "scores_of_a_test:by_call") == 0
    from scores_of_a_test import calls

    assert calls == [(8, prompts)] * 4
    recommended = ModelCard.load(folder / "README.md").data.recommended_scale
    assert recommended["prediction"] == 2.0 and recommended["guidance_scale"] == 3.0
    assert (
        json.loads((tmp_path / "sweep" / "sweep.json").read_text())["recommended"]["sentence"]
        in capsys.readouterr().out
    )


def test_a_run_on_swapped_labels_is_measured_with_them_and_is_a_reference(sweep, tmp_path, train_run, capsys):
    folder, measured = train_run("swapped", **LORA, swap_labels=True, max_steps=1)
    assert sweep(folder, "--scales", 1) == 0
    assert_is_what_the_run_measured(rows_in(tmp_path / "sweep")[0], measured)
    assert "negative model" in capsys.readouterr().out


# ---- What is refused -----------------------------------------------------------------------------------------------


def test_a_run_of_another_base_is_refused(sweep, lora_run, tmp_path, make_sd_pipeline, capsys):
    make_sd_pipeline(seed=1).save_pretrained(tmp_path / "other")
    assert sweep(lora_run[0], base=str(tmp_path / "other")) == 2
    assert "over the base that it began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--scales", "-0.5"], "at least 0, got -0.5"),
        (["--scales", "nan"], "finite numbers"),
        (["--bake", "0.5"], "belong together"),
        (["--max_pairs", "0"], "`--max_pairs` must be at least 1"),
        (["--sample_inference_steps", "0"], "`--sample_inference_steps` must be at least 1, got 0"),
        (["--scorer", "math:sqrt"], "`--no_images` generates none"),
        (["--prompts", " "], "`--prompts`"),
        (["--sample_guidance_scale", "nan"], "`--sample_guidance_scale` must be a finite number, got nan"),
    ],
)
def test_an_option_out_of_range_is_an_error_of_one_line(sweep, more, said, capsys):
    assert sweep("nowhere", *more) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_colon", "module:function"),
        ("no_module_of_this_name:score", "No module named 'no_module_of_this_name'"),
        ("math:no_function", "no attribute 'no_function'"),
        ("math:pi", "must be a function, got a float"),
    ],
)
def test_a_scorer_that_cannot_be_called_is_told_before_anything_is_loaded(generate, lora_run, name, said, capsys):
    assert generate(lora_run[0], "--scorer", name) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and "Loading" not in error


@pytest.mark.parametrize("named", [["--prompts", *"abcdefg"]])
def test_too_few_prompts_for_a_scorer_are_told_before_anything_is_made(generate, tmp_path, lora_run, named, capsys):
    """Seven that are named, and those of six pairs."""
    assert generate(lora_run[0], "--scorer", "builtins:print", *named) == 2
    assert "Name 8 or more with `--prompts`" in capsys.readouterr().err
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_folders_that_are_no_run_are_errors(sweep, tmp_path, train_run, capsys):
    without_average, _ = train_run("sft", **LORA, loss_type="sft")
    for folder in (tmp_path / "nowhere", tmp_path):
        assert sweep(folder) == 2
        assert f"{folder} has no diffusion_sdpo_setup.json" in capsys.readouterr().err
    assert sweep(without_average, "--average") == 2
    assert "`ema_decay`" in capsys.readouterr().err


def test_weights_of_another_scale_than_1_are_refused(sweep, tmp_path, lora_run, capsys):
    assert sweep(lora_run[0], "--scales", 1, "--bake", 0.25, "--baked_dir", tmp_path / "baked", "--max_pairs", 1) == 0
    assert sweep(tmp_path / "baked") == 2
    assert "holds weights of scale 0.25 already, written by `--bake`" in capsys.readouterr().err


def test_baking_over_other_files_is_refused(sweep, sd_folder, lora_run, capsys):
    folder, _ = lora_run
    for target, said in ((folder, "another folder than the run's"), (sd_folder, "holds other files")):
        assert sweep(folder, "--bake", 0.5, "--baked_dir", target) == 2
        assert said in capsys.readouterr().err


def test_a_dora_is_refused(sweep, tmp_path, lora_run, capsys):
    folder = shutil.copytree(lora_run[0], tmp_path / "dora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert sweep(folder) == 2
    assert "A DoRA cannot be scaled" in capsys.readouterr().err


def test_data_without_a_pair_is_refused(sweep, tmp_path, make_pairs, lora_run, capsys):
    ties = make_pairs(2).map(lambda row: {"prompt": None})
    (tmp_path / "bad").mkdir()
    ties.to_parquet(tmp_path / "bad" / "test.parquet")
    assert sweep(lora_run[0], "--dataset_name", tmp_path / "bad") == 2
    assert "No pair is left" in capsys.readouterr().err
