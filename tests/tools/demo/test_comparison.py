"""The demo in its smallest form, with the real trainer."""

import json

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from trl_diffusion_sdpo.tools.demo.comparison import run_demo
from trl_diffusion_sdpo.tools.demo.pipeline import reported_captions, score_prompts
from trl_diffusion_sdpo.tools.demo.results import Curves, Score
from trl_diffusion_sdpo.tools.demo.scoring import GuidedScorer, ImageScorer

TINY = {"max_steps": 2, "samples_per_prompt": 1, "evaluations": 1, "guidance_scales": ()}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"), **TINY)


def test_the_demo_trains_sft_dpo_sdpo_and_the_recipe_and_writes_its_report(result):
    assert [trained.method.key for trained in result.methods] == ["sft", "dpo", "sdpo", "sdpo_recipe"]
    assert {str(path.relative_to(result.folder)) for path in result.files} == {
        "curves.png",
        "images.png",
        "table.md",
        "results.json",
    }
    assert all(path.is_file() for path in result.files)


def test_lambda_is_1_for_plain_dpo_and_sft_has_none(result):
    sft, dpo, *safe = result.methods
    assert sft.curves.scale == []
    assert dpo.curves.scale == [1.0, 1.0]
    for method in safe:
        assert len(method.curves.scale) == 2
        assert all(0 < scale <= 1 for scale in method.curves.scale)


def test_the_tuned_pipeline_loads_in_plain_diffusers_and_generates_the_reported_images(result):
    folder = result.folder / "runs" / "sdpo"
    tuned = StableDiffusionPipeline.from_pretrained(folder)
    images, _ = ImageScorer(1, seed=20_000)(tuned)
    assert np.abs(images.astype(int) - result.methods[2].samples).max() <= 1
    assert not np.array_equal(result.methods[2].samples, result.methods[1].samples)


def test_the_scale_is_chosen_on_the_prompts_that_do_not_report():
    prompts = score_prompts(2)
    reported = np.repeat(reported_captions(), 2)
    values = {1.0: (0.2, 0.4), 2.0: (0.6, 0.5), 5.0: (0.5, 0.9)}  # on the others, on the reported ones

    def scored(pipeline, only=slice(None), guidance_scale=1.0):
        flags = reported[only]
        images = np.full((len(flags), 32, 32, 3), int(guidance_scale), dtype=np.uint8)
        return images, np.where(flags, *values[guidance_scale][::-1])

    scored.prompts = prompts
    guided = GuidedScorer(scored, (2.0, 5.0))(None)
    assert guided.chosen_from == pytest.approx({1.0: 0.2, 2.0: 0.6, 5.0: 0.5})
    assert (guided.best.guidance_scale, guided.best.score.mean) == (2.0, pytest.approx(0.5))
    assert (guided.plain.guidance_scale, guided.plain.score.mean) == (1.0, pytest.approx(0.4))
    assert (guided.best.images == 2).all() and len(guided.best.images) == len(guided.plain.images) == 72


@pytest.mark.matrix
def test_the_verdicts_on_the_whole_runs_are_those_that_the_docs_state(tmp_path):
    run_demo(tmp_path, samples_per_prompt=1)
    verdicts = {
        key: json.loads((tmp_path / "runs" / key / "verdict.json").read_text(encoding="utf-8"))["word"]
        for key in ("sft", "dpo", "sdpo", "sdpo_recipe")
    }
    assert verdicts["dpo"] == "ruined" and verdicts["sdpo"] == "worse"
    assert {verdicts["sft"], verdicts["sdpo_recipe"]} <= {"unchanged", "better"}


def test_curves_are_changes_since_the_first_evaluation():
    history = [
        {"step": 0, "eval_errors/winner": 0.5, "eval_errors/loser": 0.25},
        {"step": 0, "oracle": 0.4, "oracle_stderr": 0.1, "seconds": 1.0},
        {"step": 5, "loss": 0.7, "safeguard/scale": 0.75},
        {"step": 10, "eval_errors/winner": 0.75, "eval_errors/loser": 1.25},
        {"step": 10, "oracle": 0.2, "oracle_stderr": 0.1, "seconds": 3.0},
        {"step": 10, "train_loss": 0.6},
    ]
    curves = Curves.of(history)
    assert curves.steps == [0, 10]
    assert curves.winner_change == [0.0, 0.25]
    assert curves.loser_change == [0.0, 1.0]
    assert curves.oracle == [Score(0.4, 0.1), Score(0.2, 0.1)]
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
