"""Saved scores are only used again by the same scorer."""

import numpy as np
import pytest
from PIL import Image
from tiny_clip import save_clip

from trl_diffusion_sdpo import Candidate, evaluate_models
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings, image_path
from trl_diffusion_sdpo.tools.rewards import load_scorer
from trl_diffusion_sdpo.tools.rewards.vlm_server import VLMServerScorer

PROMPTS = ["a red circle", "two squares"]
SETTINGS = ImageSettings(call_kwargs={"num_inference_steps": 1, "guidance_scale": 1.0})


def scores_of(evaluation):
    (by_model,) = evaluation.scores.values()
    return by_model["base"][:, 0].tolist()


def test_another_model_under_the_same_name_scores_again_and_the_first_scores_stay(sd_folder, tmp_path, caplog):
    caplog.set_level("INFO", "trl_diffusion_sdpo")
    folder, models = tmp_path / "evaluation", []
    for seed, version in enumerate(("v1", "v2")):
        models.append(save_clip(tmp_path / version / "clip", seed))

    def evaluated(model):
        return scores_of(
            evaluate_models(
                [Candidate("base", sd_folder)], PROMPTS, [load_scorer("clip_score", model=model)], folder, SETTINGS
            )
        )

    def directly(model):
        images = [Image.open(image_path(folder, "base", index, 0)) for index in range(2)]
        return load_scorer("clip_score", model=model)(images, PROMPTS).tolist()

    first = evaluated(models[0])
    assert evaluated(models[1]) == pytest.approx(directly(models[1])) != pytest.approx(first)
    save_clip(models[0], seed=7)  # other weights in the same folder
    assert evaluated(models[0]) == pytest.approx(directly(models[0])) != pytest.approx(first)
    assert "clip_score" in caplog.text and "sources.model" in caplog.text
    assert len([*(folder / "scores").rglob("base.json")]) == 3


class Answering(VLMServerScorer):
    """A server's scorer that answers itself."""

    asked = 0

    def _answer(self, images, question):
        self.asked += 1
        rating = 1 + len(question) % 5
        return "\n".join(f"{axis} Score (1-5): {rating}" for axis in ("Alignment", "Coherence", "Style"))


def test_another_question_asks_again_and_the_same_question_does_not(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_diffusion_sdpo.tools.rewards.vlm_server.VLMServerScorer", Answering)

    def evaluated(url="http://127.0.0.1:9/v1", **settings):
        scorer = load_scorer("vlm_server", url=url, model="org/model", **settings)
        return scorer, scores_of(
            evaluate_models([Candidate("base", sd_folder)], PROMPTS, [scorer], tmp_path, SETTINGS)
        )

    scorer, first = evaluated()
    assert scorer.asked == 2
    scorer, again = evaluated(timeout=3.0)
    assert (scorer.asked, again) == (0, first)
    scorer, other = evaluated(url="http://127.0.0.1:8/v1")
    assert scorer.asked == 2 and np.isfinite(other).all()
