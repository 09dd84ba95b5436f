"""The benchmark of guidance samples what its rows say, chooses one setting for all seeds, and goes from training to
report."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trl_diffusion_sdpo.demo.pipeline import generate_images

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("front", "front_plan", "front_report", "front_trainers")
GUIDED = ("guided_front", "guided_plan", "guided_report", "guided_training")


@pytest.fixture
def guided(monkeypatch):
    """The modules of the benchmark, by the second half of their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = {name.split("_")[1]: __import__(name) for name in GUIDED}
    yield SimpleNamespace(**found)
    for name in (*MODULES, *GUIDED):
        sys.modules.pop(name)


@pytest.fixture
def sampler(guided, tmp_path):
    """Of a recipe and a negative model whose weights are the base's, moved to opposite sides."""
    plan = guided.plan.plans()["smallest"]
    found = guided.front.Sampler(plan, tmp_path)
    for model, share in (("recipe", 0.97), ("negative", 1.02)):
        folder = guided.training.run_folder(tmp_path, plan.models[model].run(0))
        folder.mkdir()
        moved = {name: tensor * share for name, tensor in found.base.items()}
        save_file(moved, folder / "raw.safetensors")
        (folder / "run.json").write_text(json.dumps({"run": guided.training.asdict(plan.models[model].run(0))}))
    return found


def sampled(guided, sampler, kind, scale=1.0, guidance=1.0):
    """Images in four steps, and predictions for each."""
    setting = guided.plan.Setting(replace(kind, steps=4), scale, guidance)
    before = sampler.predictions
    images = sampler.images(guided.plan.Sampling(setting, "final", 0), *sampler.noise("final", 0))
    return images.astype(int), (sampler.predictions - before) / len(images)


def test_every_form_predicts_as_often_as_it_says_and_is_what_it_is_named_after(guided, sampler):
    kind = guided.plan.Kind
    plain, count = sampled(guided, sampler, kind("base"))
    assert count == 4
    by_the_demo = generate_images(sampler.pipeline, *sampler.noise("final", 0), steps=4)
    assert np.array_equal(plain, by_the_demo)
    # Scale 0 of the weights is the base; at scale 2 both lines agree to first order, and not with scale 1.
    assert np.array_equal(sampled(guided, sampler, kind("recipe", "weights"), 0.0)[0], plain)
    tuned, _ = sampled(guided, sampler, kind("recipe"))
    weights, count = sampled(guided, sampler, kind("recipe", "weights"), 2.0)
    assert count == 4
    prediction, count = sampled(guided, sampler, kind("recipe", "prediction"), 2.0)
    assert count == 8
    assert np.abs(weights - prediction).mean() < np.abs(prediction - tuned).mean() / 2
    # With classifier-free guidance, by the table of docs/guidance.md.
    counts = {"plain": 8, "prediction": 12, "both": 16, "negative": 12, "npo": 8}
    images = {form: sampled(guided, sampler, kind("recipe", form), 2.0, 2.0) for form in counts}
    assert {form: count for form, (_, count) in images.items()} == counts
    assert all(np.any(images[form][0] != images["plain"][0]) for form in counts if form != "plain")
    assert np.any(images["negative"][0] != images["prediction"][0])
    # Of the timesteps 1, 251, 501 and 751 the first three are below the noise level of 503.
    low, high = (sampled(guided, sampler, kind("recipe", "prediction", at), 2.0)[1] for at in ("low", "high"))
    assert (low, high) == (7, 5)


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_merged_lora_scales_like_a_lora(guided, sd_folder, is_wrapped):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model

    unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    base = guided.training.merged(unet)
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    if is_wrapped:
        tuned = get_peft_model(unet, lora)
    else:
        unet.add_adapter(lora)
        tuned = unet
    merged = guided.training.merged(tuned)
    assert merged.keys() == base.keys()
    name = next(name for name in base if name.endswith("to_q.weight"))
    layer = unet.get_submodule(name.removesuffix(".weight"))
    delta = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r
    twice = guided.training.scaled(base, merged, 2.0)
    torch.testing.assert_close(twice[name], base[name] + 2 * delta.detach(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(twice[other], base[other]) for other in base if not other.endswith("to_q.weight"))


def row_of(guided, kind, part, seed, score, frechet=1.0, scale=1.0, guidance=1.0):
    setting = guided.plan.Setting(kind, scale, guidance)
    measured = {"score": score, "frechet": frechet, "diversity": 0.1, "saturation": 1.0, "predictions": 24.0}
    return {
        "key": guided.plan.Sampling(setting, part, seed).key,
        "part": part,
        "seed": seed,
        **setting.facts(),
        **measured,
    }


def test_one_setting_is_chosen_for_all_seeds_by_the_mean_and_one_near_the_drawings(guided):
    recipe, loose = guided.plan.Kind("recipe", "prediction"), guided.report.LOOSE_KIND
    scores = {(2.0, 1.0): (0.5, 0.5), (3.0, 2.0): (0.4, 0.9), (4.0, 2.0): (0.6, 0.6)}
    distances = {(2.0, 1.0): 0.2, (3.0, 2.0): 0.9, (4.0, 2.0): 0.5}
    rows = [
        row_of(guided, recipe, "selection", seed, score, distances[at], *at)
        for at, both in scores.items()
        for seed, score in enumerate(both)
    ]
    rows += [row_of(guided, loose, "selection", seed, 0.5, 0.55) for seed in range(2)]
    # A seed that other settings lack does not count, and neither do rows of the final part.
    rows += [row_of(guided, recipe, "selection", 2, 0.0, 0.9, 3.0, 2.0)]
    rows += [row_of(guided, recipe, "final", seed, 1.0, 0.1, 2.0, 1.0) for seed in range(2)]
    choice = guided.report.choices(rows)[recipe]
    picked = [(setting.scale, setting.guidance) for setting in (choice.best, choice.plain, choice.near)]
    assert picked == [(3.0, 2.0), (2.0, 1.0), (4.0, 2.0)]


@pytest.mark.parametrize(
    ("score", "frechet", "verdict"), [(0.63, 0.4, "holds"), (0.62, 0.4, "fails"), (0.63, 0.6, "fails")]
)
def test_the_goal_needs_the_scores_the_seeds_and_the_distance(guided, score, frechet, verdict):
    report, recipe = guided.report, guided.plan.Kind("recipe", "prediction")
    rows = []
    for seed in range(5):
        for part in ("selection", "final"):
            rows += [row_of(guided, report.BASE_KIND, part, seed, 0.55)]
            rows += [row_of(guided, report.LOOSE_KIND, part, seed, 0.59, 0.5)]
            mine = score - 0.05 if seed == 4 else score + 0.0125  # below loose SDPO on one seed
            rows += [row_of(guided, recipe, part, seed, mine, frechet, 3.0, 2.0)]
    line = report.goal(rows, recipe, guided.plan.Setting(recipe, 3.0, 2.0))
    assert line.endswith(verdict)
    assert f"{score - 0.59:+.3f} over loose SDPO" in line and "above both on 4 of 5 seeds" in line


@pytest.mark.matrix
def test_from_training_to_report(guided, tmp_path, capsys):
    plan = ["--plan", "smallest", "--weights", str(tmp_path / "weights"), "--file", str(tmp_path / "rows.jsonl")]
    plan += ["--folder", str(tmp_path)]
    for command in (["train"], ["measure"], ["measure", "--part", "final", "--curves"], ["errors"], ["grid"]):
        assert guided.front.main([*command, *plan]) == 0
    rows = (tmp_path / "rows.jsonl").read_text()
    assert guided.front.main(["measure", *plan]) == 0  # everything is there
    assert (tmp_path / "rows.jsonl").read_text() == rows
    capsys.readouterr()
    guided.front.main(["report", *plan])
    table = capsys.readouterr().out
    # 24 predictions with classifier-free guidance, and 7 of the 12 timesteps are below the noise level of 503.
    assert (
        "nan" not in table
        and "| recipe, guided, low noise only | 2 | 2 | 31 | 1 |" in table
        and "over loose SDPO (goal +0.03)" in table
    )
    assert (tmp_path / "guidance_front.png").is_file() and (tmp_path / "guidance_grid.png").is_file()
    (run, *_) = guided.plan.plans()["smallest"].runs()
    assert guided.training.is_trained(tmp_path / "weights", run)
    assert not guided.training.is_trained(tmp_path / "weights", replace(run, seed=7))
