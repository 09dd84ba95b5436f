"""The demo's report of given numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo.tools.demo.methods import Method
from trl_diffusion_sdpo.tools.demo.report import summary, table, write_report
from trl_diffusion_sdpo.tools.demo.results import Curves, DemoResult, Generated, Guided, MethodResult, Score

METHODS = {  # key -> name, level of its images, and change of the winners' error
    "sft": ("SFT", 40, -0.125),
    "dpo": ("Diffusion-DPO", 80, 0.25),
    "sdpo": ("Diffusion-SDPO", 120, 0.0625),
    "sdpo_recipe": ("Diffusion-SDPO, recipe", 140, 0.03125),
}
GIVEN = {"base": 0.4, "sdpo_recipe_guided": 0.7}
WIGGLE = np.tile([-0.1, 0.1], 36)  # standard error of the mean of 72: 0.1 * sqrt(72 / 71) / sqrt(72) = 0.012


@pytest.fixture
def make_result(tmp_path):
    """`make_result({"sft": 0.5, ...})`: results with these final scores."""

    def make(finals, wiggles=()):
        return DemoResult(
            folder=tmp_path,
            settings={
                "seed": 0,
                "max_steps": 100,
                "samples_per_prompt": 1,
                "per_device_train_batch_size": 32,
            },
            train_pairs=851,
            eval_pairs=118,
            base=Score(0.4, 0.014),
            methods=[_method(key, final, WIGGLE if key in wiggles else 0.0) for key, final in finals.items()],
            guided={key: _guided(key, final, key in wiggles) for key, final in {**GIVEN, **finals}.items()},
            seconds=9.0,
        )

    return make


def _method(key, final, wiggle):
    scores = np.full(72, final) + wiggle
    return MethodResult(
        method=Method(key, METHODS[key][0], {"learning_rate": 2e-4}),
        seconds=12.3,
        curves=Curves(
            steps=[0, 50, 100],
            winner_change=[0.0, 0.1, METHODS[key][2]],
            loser_change=[0.0, 0.2, 0.5],
            oracle=[Score(0.4, 0.01), Score(0.9, 0.01), Score.of(scores)],
            scale_steps=[] if key == "sft" else [50, 100],
            scale=[] if key == "sft" else [1.0, 0.5],
        ),
        samples=_plain(METHODS[key][1]),
        scores=scores,
    )


def _guided(key, final, wiggles):
    """Guidance adds 0.1 to the score, and makes the images lighter by 5."""
    plain, best = (
        Generated(
            scale,
            _plain(METHODS.get(key, ("", 20))[1] + 5 * (scale > 1), 36),
            np.full(36, final + 0.1 * (scale > 1)) + wiggles * WIGGLE[:36],
        )
        for scale in (1.0, 2.0)
    )
    return Guided(plain, best, {1.0: 0.3, 2.0: 0.4}, seconds=1.0)


def _plain(level, count=72):
    return np.full((count, 32, 32, 3), level, dtype=np.uint8)


def test_the_table_has_each_model_without_and_with_guidance(make_result):
    lines = table(make_result({"sft": 0.5, "dpo": 0.3, "sdpo": 0.6, "sdpo_recipe": 0.6})).splitlines()
    assert lines[2] == "| base model | 0.400 ± 0.000 | 0.500 ± 0.000 (2) | 0 | 0 | 0 |"
    assert lines[4] == "| Diffusion-DPO | 0.300 ± 0.000 | 0.400 ± 0.000 (2) | +0.250 | +0.500 | 12 |"
    label = "Diffusion-SDPO, recipe, guided"
    assert lines[7] == f"| {label} | 0.700 ± 0.000 | 0.800 ± 0.000 (2) | +0.031 | +0.500 | 12 |"
    assert "- SFT: 100 steps, learning_rate 0.0002" in lines


def test_the_summary_says_so_if_the_safeguard_is_behind_or_nothing_is_clear(make_result):
    finals = {"sft": 0.5, "dpo": 0.6, "sdpo": 0.5, "sdpo_recipe": 0.51}
    text = summary(make_result(finals, wiggles=("sdpo_recipe",)))
    assert "Diffusion-SDPO is worse than Diffusion-DPO by oracle: its win rate is 0%" in text
    assert "oracle shows no difference between Diffusion-SDPO, recipe and Diffusion-SDPO" in text


def test_everything_is_written_and_the_curves_are_wide_enough_to_read(make_result):
    result = make_result(dict.fromkeys(METHODS, 0.5))
    _, files = write_report(result)
    written = json.loads((result.folder / "results.json").read_text(encoding="utf-8"))
    assert written["guided"]["sft"]["plain"]["oracle"]["mean"] == 0.5 and len(written["methods"]) == len(METHODS)
    with Image.open(result.folder / "images.png") as images:
        assert images.width == 1200
    with Image.open(result.folder / "curves.png") as curves:
        assert curves.width == 1200
    assert all(file.stat().st_size < 400_000 for file in files)


def test_a_score_is_the_mean_with_its_standard_error():
    assert str(Score.of(np.array([0.25, 0.75]))) == "0.500 ± 0.250"  # deviation 0.3536 over sqrt 2
    assert Score.of(np.array([0.5])) == Score(0.5, 0.0)
