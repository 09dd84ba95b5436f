"""Scores of sample images in trainings of a tiny pipeline. Scorers are functions of the pixels, or scripted."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from trl_diffusion_sdpo.reporting.plots import curves_of
from trl_diffusion_sdpo.reporting.sample_scores import SampleScores
from trl_diffusion_sdpo.tools.rewards import BatchedScorer
from trl_diffusion_sdpo.utils.statistics import TOO_FEW

PROMPTS = ["a red cube", "a dog", "the sea", "two cats"]
SAMPLED = {"sample_prompts": PROMPTS, "sample_steps": 1, "sample_kwargs": {"num_inference_steps": 1}}
NAME = "my_scores:judge"
RATE = f"samples/{NAME}_win_rate"


def redness(images, prompts):
    return [float(np.asarray(image, dtype=float)[..., 0].mean()) for image in images]


@pytest.fixture
def judge(monkeypatch):
    """`judge(function)`: the scorer `my_scores:judge` becomes this function."""

    def install(function):
        monkeypatch.setitem(sys.modules, "my_scores", types.SimpleNamespace(judge=function))

    return install


@pytest.fixture
def scripted(judge):
    """`scripted(*values)`: a scorer whose calls return these scores for all images, in turn. An error is raised."""

    def install(*values):
        rest = list(values)

        def script(images, prompts):
            value = rest.pop(0)
            if isinstance(value, Exception):
                raise value
            return value if isinstance(value, list) else [float(value)] * len(images)

        judge(script)
        return rest

    return install


def scores_in(history, metric=RATE):
    return {entry["step"]: entry[metric] for entry in history if metric in entry}


def mean_of_files(folder, step):
    files = [folder / f"samples/step-{step:06d}-{index}.png" for index in range(len(PROMPTS))]
    return redness([Image.open(file).convert("RGB") for file in files], PROMPTS)


def test_each_generation_is_scored_and_compared_with_the_images_before_training(
    judge, make_trainer, make_pairs, tmp_path
):
    judge(redness)
    evaluated = {"eval_dataset": make_pairs(4, seed=5), "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(
        sample_scorers=NAME, learning_rate=0.05, peft_config=LoraConfig(r=4), **SAMPLED, **evaluated
    )
    trainer.train()
    folder, history = tmp_path / "run", trainer.state.log_history
    before = mean_of_files(folder, 0)
    rates = {}
    for step in range(3):
        scores = mean_of_files(folder, step)
        rates[step] = np.mean([(new > old) + 0.5 * (new == old) for new, old in zip(scores, before, strict=True)])
        assert scores_in(history, f"samples/{NAME}")[step] == pytest.approx(np.mean(scores))
    assert mean_of_files(folder, 2) != before
    assert scores_in(history) == rates
    assert scores_in(history, f"eval_{RATE}") == {2: rates[2]}
    assert set(scores_in(history, "loss")) == {1, 2}  # a log within a step must not replace the trainer's
    assert curves_of(history)["win rate of the sample images"] == {NAME: list(rates.items())}
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["sample_scores"][NAME]["win_rate"] == rates[2]
    assert verdict["sample_scores"][NAME]["verdict"] == TOO_FEW  # four prompts
    assert NAME in verdict["sentence"] and NAME in str(trainer.verdict())


def test_scoring_leaves_the_trajectory_alone(judge, make_trainer):
    judge(lambda images, prompts: torch.rand(len(images)))
    weights = []
    for scorers in ({}, {**SAMPLED, "sample_scorers": [NAME]}):
        trainer = make_trainer(**scorers)
        trainer.train()
        weights.append(torch.cat([weight.flatten() for weight in trainer.denoiser.state_dict().values()]))
    assert torch.equal(*weights)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": RATE,
    "sample_steps": None,  # the metric asks for images at each evaluation
}


def test_the_best_weights_by_win_rate_are_kept_over_a_resume(scripted, make_trainer, make_pairs, tmp_path):
    settings = {**SAMPLED, **BEST, "sample_scorers": [NAME], "eval_dataset": make_pairs(2, seed=5)}
    # Before training, steps 1 and 2; the best is step 1, whose images are scored once more at the end.
    rest = scripted(0, 1, -1, 1)
    make_trainer(peft_config=LoraConfig(r=4), max_steps=2, **settings).train()
    assert not rest
    # Before training, the checkpoint's step, steps 3 and 4, and the best one at the end.
    rest = scripted(0, -1, [1.0, 1.0, 0.0, -1.0], 0, 1)
    trainer = make_trainer(peft_config=LoraConfig(r=4), max_steps=4, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert not rest
    assert scores_in(trainer.state.log_history) == {0: 0.5, 1: 1.0, 2: 0.0, 3: 0.625, 4: 0.5}
    assert trainer.state.best_metric == 1.0
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["sample_scores"][NAME]["win_rate"] == 1.0


def test_without_the_first_images_there_is_no_win_rate(scripted, make_trainer, make_pairs, tmp_path, caplog):
    settings = {**SAMPLED, "sample_scorers": [NAME], "peft_config": LoraConfig(r=4)}
    scripted(0, 1)
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1, **settings).train()
    (tmp_path / "run" / "samples" / "step-000000-0.png").unlink()
    scripted(1, 2)
    trainer = make_trainer(max_steps=2, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert scores_in(trainer.state.log_history, f"samples/{NAME}")[2] == 2.0
    assert 2 not in scores_in(trainer.state.log_history) and "before training" in caplog.text
    best = make_trainer(max_steps=3, **{**settings, **BEST}, eval_dataset=make_pairs(2, seed=5))
    with pytest.raises(ValueError, match="metric_for_best_model"):
        best.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("fault", [RuntimeError("no memory"), [math.nan] * 4, [1.0]])
def test_a_scorer_that_fails_while_training_is_logged_and_the_run_goes_on(
    fault, scripted, make_trainer, make_pairs, caplog
):
    settings = {**SAMPLED, **BEST, "sample_scorers": [NAME], "eval_dataset": make_pairs(2, seed=5)}
    scripted(0, fault, 1)
    trainer = make_trainer(peft_config=LoraConfig(r=4), **settings)
    trainer.train()
    rates = scores_in(trainer.state.log_history)
    assert math.isnan(rates[1]) and rates[2] == 1.0 == trainer.state.best_metric
    assert "step 1" in caplog.text


@pytest.mark.parametrize("fault", [RuntimeError("no memory"), [math.nan] * 4, [1.0]])
def test_a_scorer_that_fails_before_training_ends_the_run(fault, scripted, make_trainer):
    scripted(fault)
    trainer = make_trainer(sample_scorers=[NAME], **SAMPLED)
    with pytest.raises((RuntimeError, ValueError)):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", ["pick_score", "no_such_module:judge", "vlm_server"])
def test_a_scorer_that_cannot_be_loaded_ends_the_run_at_once(name, make_trainer):
    with pytest.raises(ValueError, match=name):
        make_trainer(sample_scorers=[name], **SAMPLED)


class Failing(BatchedScorer):
    """Scores once, and then fails."""

    def __init__(self):
        super().__init__("failing")
        self.moves = []
        self.calls = 0

    def to(self, device):
        self.moves.append(str(device))

    def score_batch(self, images, prompts):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("out of memory")
        return torch.zeros(len(images))


def test_a_scorer_is_on_the_device_only_while_it_scores(monkeypatch, tmp_path):
    scorer = Failing()
    monkeypatch.setattr("trl_diffusion_sdpo.tools.rewards.load_scorer", lambda name: scorer)
    scores = SampleScores(["failing"], ["a cat"], torch.device("meta"))
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    scores.begin([tmp_path / "image.png"])
    scores.measure(1, [tmp_path / "image.png"])
    assert scorer.moves == ["meta", "cpu"] * 2 and scorer.calls == 2
