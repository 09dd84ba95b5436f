"""The demo in its smallest form, with the real trainer."""

import json

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from trl_diffusion_sdpo.tools.demo.comparison import run_demo
from trl_diffusion_sdpo.tools.demo.report import FILES
from trl_diffusion_sdpo.tools.demo.results import Curves, DemoResult, Score
from trl_diffusion_sdpo.tools.demo.scoring import ImageScorer, generate_guided

TINY = {"max_steps": 2, "samples_per_prompt": 1, "evaluations": 1, "guidance_scales": ()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's folder and results."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, **TINY)


def test_the_demo_has_five_models_and_writes_its_report(demo):
    folder, result = demo
    assert list(result.models) == ["base", "sft", "dpo", "sdpo", "sdpo_recipe", "sdpo_recipe_guided"]
    assert {path.name for path in folder.iterdir()} == {"runs", *FILES}
    assert DemoResult.read(folder / "results.json") == result


def test_every_method_names_its_safeguard(demo):
    _, result = demo
    used = {key: result.models[key].settings["safeguard"] for key in ("sft", "dpo", "sdpo", "sdpo_recipe")}
    assert used == {"sft": "none", "dpo": "none", "sdpo": "output", "sdpo_recipe": "parameter"}


def test_lambda_is_1_for_plain_dpo_and_sft_has_none(demo):
    _, result = demo
    assert result.models["sft"].curves.scale == []
    assert result.models["dpo"].curves.scale == [1.0, 1.0]
    for key in ("sdpo", "sdpo_recipe"):
        scale = result.models[key].curves.scale
        assert len(scale) == 2 and all(0 < value <= 1 for value in scale)


def test_the_tuned_pipeline_loads_in_plain_diffusers_and_generates_the_reported_images(demo):
    folder, result = demo
    scorer = ImageScorer(1, seed=20_000)
    tuned = StableDiffusionPipeline.from_pretrained(folder / "runs" / "dpo")
    _, scores = scorer(tuned, scorer.reported)
    assert scores.mean() == pytest.approx(result.models["dpo"].plain.mean, abs=1e-3)
    _, guided = scorer(tuned, scorer.reported, guidance_scale=3.0)
    assert guided.mean() == pytest.approx(result.models["dpo"].curves.score[-1].mean, abs=1e-3)


def test_the_scale_is_chosen_on_the_prompts_that_do_not_report():
    values = {1.0: (0.2, 0.4), 2.0: (0.6, 0.5), 5.0: (0.5, 0.9)}  # on the others, on the reported ones

    class Scorer(ImageScorer):
        def __call__(self, pipeline, only=slice(None), guidance_scale=1.0):
            flags = self.reported[only]
            images = np.full((len(flags), 32, 32, 3), int(guidance_scale), dtype=np.uint8)
            return images, np.where(flags, *values[guidance_scale][::-1])

    guided = generate_guided(Scorer(2, seed=0), (2.0, 5.0), None)
    assert guided.chosen_from == pytest.approx({1.0: 0.2, 2.0: 0.6, 5.0: 0.5})
    assert (guided.best.guidance_scale, guided.best.score.mean) == (2.0, pytest.approx(0.5))
    assert (guided.plain.guidance_scale, guided.plain.score.mean) == (1.0, pytest.approx(0.4))
    assert (guided.best.images == 2).all() and guided.best.images.shape == guided.plain.images.shape
    assert guided.best.images.shape == (36, 2, 32, 32, 3)


@pytest.mark.matrix
def test_the_verdicts_on_the_whole_runs_are_those_that_the_docs_state(tmp_path):
    run_demo(tmp_path, samples_per_prompt=1)
    verdicts = {
        key: json.loads((tmp_path / "runs" / key / "verdict.json").read_text(encoding="utf-8"))["word"]
        for key in ("sft", "dpo", "sdpo", "sdpo_recipe")
    }
    assert verdicts["dpo"] == "ruined" and verdicts["sdpo"] == "worse"
    assert {verdicts["sft"], verdicts["sdpo_recipe"]} <= {"unchanged", "better"}


def test_curves_are_changes_in_per_cent_since_the_first_evaluation():
    relative = "eval_errors/winner_change_relative"
    history = [
        {"step": 0, "eval_errors/winner": 0.5, "eval_errors/loser": 0.25, relative: 0.0, f"{relative}_stderr": 0.0},
        {"step": 0, "oracle": 0.4, "oracle_stderr": 0.1, "oracle_guidance_scale": 3.0},
        {"step": 5, "loss": 0.7, "safeguard/scale": 0.75},
        {
            **{"step": 10, "eval_errors/winner": 0.75, "eval_errors/loser": 1.25},
            **{relative: 0.5, f"{relative}_stderr": 0.125, f"{relative}@0": 0.25, f"{relative}@1": 2.0},
        },
        {"step": 10, "oracle": 0.2, "oracle_stderr": 0.1, "oracle_guidance_scale": 3.0},
        {"step": 10, "train_loss": 0.6},
    ]
    curves = Curves.of(history)
    assert curves.steps == [0, 10]
    assert (curves.winner_change, curves.winner_stderr) == ([0.0, 50.0], [0.0, 12.5])
    assert curves.loser_change == [0.0, 400.0]
    assert curves.worst_bin == 200.0
    assert curves.score == [Score(0.4, 0.1, 3.0), Score(0.2, 0.1, 3.0)]
    assert (curves.scale_steps, curves.scale) == ([5], [0.75])


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "mine" / "runs").mkdir(parents=True)
    with pytest.raises(ValueError, match="`output_dir`.*mine"):
        run_demo(tmp_path / "mine")


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"max_steps": 0}])
def test_arguments_out_of_range_are_named_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run_demo(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()
