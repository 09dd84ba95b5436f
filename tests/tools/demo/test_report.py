"""The demo's report of given numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo.tools.demo.report import FILES, error_sentences, score_sentences, summary, table, write_report
from trl_diffusion_sdpo.tools.demo.results import Curves, DemoResult, ModelResult, Score

# Key -> name, score with guidance, and last change of the winners' error with its standard error, in per cent.
MODELS = {
    "base": ("base model", 0.5, None),
    "sft": ("SFT", 0.5, (-1.0, 2.0)),
    "dpo": ("Diffusion-DPO", 0.25, (772.4, 143.0)),
    "sdpo": ("Diffusion-SDPO as published", 0.5, (39.47, 5.3)),
    "sdpo_recipe": ("recipe", 0.75, (-4.0, 1.5)),
    "sdpo_recipe_guided": ("recipe, guided from its reference", 0.8, None),
}
# Key -> scores of four prompts. Only the models that are compared need them.
PROMPT_SCORES = {
    "base": [0.5, 0.51, 0.49, 0.5],
    "sft": [0.6, 0.9, 0.7, 0.8],
    "sdpo": [0.9, 0.91, 0.9, 0.9],
    "sdpo_recipe": [0.75, 0.76, 0.74, 0.75],
    "sdpo_recipe_guided": [0.85, 0.86, 0.86, 0.85],
}


@pytest.fixture
def result():
    return DemoResult(
        settings={
            "seed": 0,
            "max_steps": 100,
            "samples_per_prompt": 3,
            "per_device_train_batch_size": 32,
            "curve_scale": 3.0,
        },
        versions={"torch": "2.13.0"},
        threads=2,
        train_pairs=851,
        eval_pairs=118,
        models={key: _model(key, *values) for key, values in MODELS.items()},
        seconds=9.0,
    )


def _model(key, label, score, change):
    curves = change and Curves(
        steps=[0, 50, 100],
        winner_change=[0.0, 1.0, change[0]],
        winner_stderr=[0.0, 1.0, change[1]],
        loser_change=[0.0, 2.0, 123.4],
        score=[Score(0.4, 0.01, 3.0), Score(0.5, 0.01, 3.0), Score(0.6, 0.01, 3.0)],
        worst_bin=8.0,
        scale_steps=[] if key == "sft" else [50, 100],
        scale=[] if key == "sft" else [1.0, 0.5],
    )
    return ModelResult(
        key,
        label,
        Score(score, 0.02, 2.0),
        Score(0.375, 0.02),
        {"1": 0.3},
        {"beta": 100.0},
        list(PROMPT_SCORES.get(key, [])),
        curves,
    )


def test_the_table_has_scores_with_guidance_first_and_errors_in_per_cent(result):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(result).splitlines()[2:7]]
    assert rows[0] == ["base model", "0.500 ± 0.020 (2)", "0.375 ± 0.020", "0", "0"]
    assert rows[2][1:] == ["0.250 ± 0.020 (2)", "0.375 ± 0.020", "+772 ± 143 %", "+123 %"]
    assert rows[3][3] == "+39.5 ± 5.3 %"
    assert [row[0] for row in rows] == [MODELS[key][0] for key in ("base", "sft", "dpo", "sdpo", "sdpo_recipe")]
    assert "0.750 ± 0.020 (2)" in rows[4][1] and "0.800 ± 0.020 (2)" in rows[4][1]  # the guided recipe has no own row


def test_a_difference_is_higher_or_lower_only_if_its_interval_leaves_out_zero(result):
    words = [sentence.split(": ")[1].split(",")[0] for sentence in score_sentences(result)]
    assert words == ["higher", "no difference shown", "lower", "higher"]


def test_an_error_rose_or_fell_from_two_standard_errors_on(result):
    rose, fell, unclear = error_sentences(result)
    assert " rose:" in rose and "Diffusion-DPO (+772" in rose and "as published (+39.5" in rose
    assert " fell:" in fell and "recipe (-4.0 ± 1.5 %" in fell
    assert "SFT (-1.0 ± 2.0 %; worst bin +8.0 %)" in unclear


def test_everything_is_written_and_the_results_are_read_again_without_loss(result, tmp_path):
    images = {key: np.zeros((36, 3, 32, 32, 3), dtype=np.uint8) for key in MODELS}
    write_report(result, images, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    assert DemoResult.read(tmp_path / "results.json") == result
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["models"]["sft"]["best"]["mean"] == 0.5
    assert all((tmp_path / name).stat().st_size < 400_000 for name in FILES)
    for name, width in (("scores.png", 1280), ("curves.png", 1200), ("images.png", 1440)):
        with Image.open(tmp_path / name) as picture:
            assert picture.width == width


def test_the_summary_fits_a_terminal_of_120_columns(result):
    assert max(map(len, summary(result).splitlines())) <= 120


def test_images_of_a_prompt_count_as_one_observation():
    score = Score.of(np.array([[0.0, 0.5], [0.75, 0.75]]))  # means .25 and .75: deviation .3536 over sqrt 2
    assert (score.mean, score.stderr) == (0.5, pytest.approx(0.25))


def test_a_difference_is_paired_over_prompts_and_four_intervals_hold_together(result):
    """Of differences 0.4 and 0.1, the standard error is 0.15. For 0.05 / 4 and one degree of freedom, t is 50.92."""
    result.models["base"].prompt_scores[:] = [0.2, 0.1]
    result.models["sft"].prompt_scores[:] = [0.0, 0.0]
    result.models["sdpo"].prompt_scores[:] = [0.0, 0.0]
    result.models["sdpo_recipe"].prompt_scores[:] = [0.6, 0.2]
    result.models["sdpo_recipe_guided"].prompt_scores[:] = [0.0, 0.0]
    one = result.differences()[0]
    assert (one.first, one.second) == ("sdpo_recipe", "base")
    assert (one.mean, one.low, one.high) == pytest.approx((0.25, 0.25 - 50.92 * 0.15, 0.25 + 50.92 * 0.15), rel=1e-3)
