"""The demo's report of given numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo.demo.report import draw_grid, numbers, summary, table, write_report
from trl_diffusion_sdpo.demo.results import Curves, DemoResult, MethodResult, Score, read_sheet, write_sheet

COLOURS = {"base": 0, "sft": 40, "dpo": 80, "sdpo": 120, "sdpo_recipe": 140, "dpo_gentle": 160, "sdpo_gentle": 200}
LABELS = {
    "sft": "SFT",
    "dpo": "Diffusion-DPO",
    "sdpo": "Diffusion-SDPO",
    "sdpo_recipe": "Diffusion-SDPO, recipe",
    "dpo_gentle": "Diffusion-DPO, gentle",
    "sdpo_gentle": "Diffusion-SDPO, gentle",
}
WINNER_CHANGE = {
    "sft": -0.125,
    "dpo": 0.25,
    "sdpo": 0.0625,
    "sdpo_recipe": 0.03125,
    "dpo_gentle": 0.2,
    "sdpo_gentle": 0.1,
}
WIGGLE = np.tile([-0.1, 0.1], 36)  # standard error of the mean of 72: 0.1 * sqrt(72 / 71) / sqrt(72) = 0.012


@pytest.fixture
def make_result(tmp_path):
    """`make_result({"sft": 0.5, ...})`: a story with these final scores."""

    def make(finals, wiggles=()):
        return DemoResult(
            folder=tmp_path,
            settings={
                "seed": 0,
                "max_steps": 100,
                "pairs": "off_policy",
                "samples_per_prompt": 1,
                "per_device_train_batch_size": 32,
            },
            train_pairs=851,
            eval_pairs=118,
            base=Score(0.4, 0.014),
            base_samples=_plain(COLOURS["base"]),
            base_scores=np.full(72, 0.4),
            methods=[_method(key, final, WIGGLE if key in wiggles else 0.0) for key, final in finals.items()],
            seconds=9.0,
        )

    return make


def _method(key, final, wiggle):
    scores = np.full(72, final) + wiggle
    return MethodResult(
        key=key,
        label=LABELS[key],
        gentle="gentle" in key,
        settings={"learning_rate": 2e-4},
        seconds=12.3,
        curves=Curves(
            steps=[0, 50, 100],
            winner_change=[0.0, 0.1, WINNER_CHANGE[key]],
            loser_change=[0.0, 0.2, 0.5],
            oracle=[Score(0.4, 0.01), Score(0.9, 0.01), Score.of(scores)],
            scale_steps=[] if key == "sft" else [50, 100],
            scale=[] if key == "sft" else [1.0, 0.5],
        ),
        samples=_plain(COLOURS[key]),
        scores=scores,
    )


def _plain(level):
    return np.full((72, 32, 32, 3), level, dtype=np.uint8)


def test_the_table_has_the_last_and_the_best_numbers(make_result):
    lines = table(make_result({"sft": 0.5, "dpo": 0.3, "sdpo": 0.6, "sdpo_recipe": 0.6})).splitlines()
    assert lines[2] == "| base model | 0.400 ± 0.014 | | 0 | 0 | |"
    assert lines[4] == "| Diffusion-DPO | 0.300 ± 0.000 | 0.900 at step 50 | +0.250 | +0.500 | 12 |"
    assert "- SFT: 100 steps, learning_rate 0.0002" in lines


def test_the_summary_names_the_setting_and_that_the_gentle_ones_were_not_run(make_result):
    text = summary(make_result({"sft": 0.5, "dpo": 0.3, "sdpo": 0.6, "sdpo_recipe": 0.6}))
    assert "when one pushes hard" in text
    assert "one seed of a toy world" in text
    assert "learning rate 1e-4) were not run" in text
    assert "Diffusion-SDPO is ahead of Diffusion-DPO (difference +0.300 ± 0.000)" in text
    assert "Diffusion-SDPO, recipe is not clearly different from Diffusion-SDPO (difference +0.000 ± 0.000)" in text
    changes = "+0.250 under plain Diffusion-DPO, +0.062 under Diffusion-SDPO, +0.031 with the recipe"
    assert changes in text


def test_the_summary_says_so_if_the_safeguard_is_behind_or_nothing_is_clear(make_result):
    finals = {"sft": 0.5, "dpo": 0.6, "sdpo": 0.5, "sdpo_recipe": 0.5, "dpo_gentle": 0.6, "sdpo_gentle": 0.61}
    text = summary(make_result(finals, wiggles=("sdpo_gentle",)))
    assert "Diffusion-SDPO is behind Diffusion-DPO (difference -0.100 ± 0.000)" in text
    verdict = "Diffusion-SDPO, gentle is not clearly different from Diffusion-DPO, gentle (difference +0.010 ± 0.012)"
    assert verdict in text
    assert "was not run" not in text


def test_the_grid_has_a_column_for_the_base_and_each_method_and_every_tenth_prompt(make_result):
    grid = draw_grid(make_result({"sft": 0.5, "dpo": 0.3, "sdpo": 0.6, "sdpo_recipe": 0.6}))
    pixels = np.asarray(grid)
    middle = pixels[64 + 64]  # the first row of images begins at 64 and is 128 high
    for column, key in enumerate(["base", "sft", "dpo", "sdpo", "sdpo_recipe"]):
        start = 150 + column * 170
        assert (middle[start : start + 128] == COLOURS[key]).all()
    assert (middle[150 + 4 * 170 + 130 :] == 255).all()
    rows = np.flatnonzero((pixels[:, 150 + 64] == 0).all(axis=-1))
    images = (np.diff(rows) > 1).sum() + 1
    assert images >= 8


def test_everything_is_written_and_the_curves_are_wide_enough_to_read(make_result):
    result = make_result(dict.fromkeys(LABELS, 0.5))
    text, files = write_report(result)
    assert (result.folder / "summary.txt").read_text(encoding="utf-8") == text + "\n"
    assert json.loads((result.folder / "results.json").read_text(encoding="utf-8")) == numbers(result)
    with Image.open(result.folder / "curves.png") as curves:
        assert curves.width == 1200
    assert all(file.stat().st_size < 400_000 for file in files)


def test_a_method_is_read_as_it_was_written(make_result, tmp_path):
    method = make_result({"sdpo": 0.6}).methods[0]
    method.write(tmp_path)
    again = MethodResult.read(tmp_path)
    assert again.to_dict() == method.to_dict()
    assert np.array_equal(again.samples, method.samples) and np.array_equal(again.scores, method.scores)
    assert again.best == (50, Score(0.9, 0.01))


def test_a_sheet_has_a_row_for_each_prompt(tmp_path):
    samples = np.random.default_rng(0).integers(0, 256, size=(144, 32, 32, 3), dtype=np.uint8)
    write_sheet(samples, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (72 * 32, 2 * 32, 3)
    assert np.array_equal(pixels[:32, 32:], samples[1])  # the first prompt's second image
    assert np.array_equal(read_sheet(tmp_path / "sheet.png"), samples)


def test_a_score_is_the_mean_with_its_standard_error():
    assert str(Score.of(np.array([0.25, 0.75]))) == "0.500 ± 0.250"  # deviation 0.3536 over sqrt 2
    assert Score.of(np.array([0.5])) == Score(0.5, 0.0)
