"""Tables and pictures of the documentation come from committed results, and verdicts from intervals over seeds."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))

import pictures  # noqa: E402
import tables  # noqa: E402
from tables import Difference  # noqa: E402

MARKERS = [
    (page, match[2]) for page in tables.pages() for match in tables.MARKED.finditer(page.read_text(encoding="utf-8"))
]


def row(seed, score, error=0.0):
    errors = {"winner_change_relative": error, "winner_change_relative@0": 2 * error, "winner_change_relative@1": -1.0}
    return {"seed": seed, "best": {"score": score}, "plain": {"score": score / 2}, "own_errors": errors}


@pytest.mark.parametrize("picture", sorted((ROOT / "docs/images").glob("*.png")), ids=lambda path: path.name)
def test_a_picture_has_a_maker_and_its_results_are_committed(picture):
    made = pictures.PICTURES.get(picture.name)
    files = pictures.OTHERS[picture.name] if made is None else (*made.results, *made.images)
    assert all((ROOT / file).is_file() for file in files)


def test_every_maker_has_its_picture():
    assert all((ROOT / "docs/images" / name).is_file() for name in (*pictures.PICTURES, *pictures.OTHERS))


@pytest.mark.parametrize(("page", "name"), MARKERS, ids=lambda value: getattr(value, "name", value))
def test_a_table_has_a_maker(page, name):
    """Its results are committed, or rows of a plan that is not finished."""
    files = tables.TABLES[name].files if name in tables.TABLES else tables.OTHERS[name]
    for file in map(Path, files):
        plan = ROOT / "benchmarks" / "studies" / f"{file.stem}.yaml"
        assert (ROOT / file).is_file() or (file.suffix == ".jsonl" and plan.is_file())


@pytest.mark.parametrize("page", sorted({page for page, _ in MARKERS}), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert tables.written(text) == text, "run `python benchmarks/studies/tables.py`"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "benchmarks/studies/results").glob("*.jsonl")), ids=lambda path: path.name
)
def test_all_rows_of_a_file_are_of_one_base_model_and_the_same_versions(file):
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len({json.dumps(row["made_with"], sort_keys=True) for row in rows}) == 1


def test_only_the_text_between_known_markers_is_written():
    end = "<!-- end of table -->\n"
    after = tables.written(f"a\n<!-- table: edits -->\nold\n{end}b\n<!-- table: unknown -->\nkept\n{end}")
    assert after.startswith("a\n<!-- table: edits -->\n\n| Training |") and "old" not in after
    assert after.endswith(f"\n\n{end}b\n<!-- table: unknown -->\nkept\n{end}")


def test_a_verdict_needs_three_seeds_and_an_interval_without_zero():
    """Of 1, 2, 3 the standard error is 0.577 and t is 4.303: 2 ± 2.484."""
    assert str(Difference((1.0, 2.0, 3.0))) == "+2.000 (-0.484 to +4.484), no difference shown"
    assert Difference((11.0, 12.0, 13.0)).verdict == "higher"
    assert Difference((-11.0, -12.0, -13.0)).verdict == "lower"
    assert str(Difference((11.0, 12.0))) == "+11.500" and Difference((11.0, 12.0)).verdict == ""
    assert str(Difference(())) == ""


def test_a_difference_pairs_rows_by_seed():
    rows = [row(0, 0.5), row(1, 0.6), row(2, 0.9)]
    others = [row(2, 0.4), row(0, 0.3), row(7, 9.9)]
    assert tables.difference(rows, others).values == pytest.approx((0.2, 0.5))


def test_numbers_have_standard_errors_over_seeds():
    """The deviation of 0.50, 0.54 and 0.55 is 0.0265, and that of 10, 14 and 15 is 2.65; both are divided by 1.732."""
    rows = [row(0, 0.50, 0.10), row(1, 0.54, 0.14), row(2, 0.55, 0.15)]
    assert tables.number(rows) == "0.530 ± 0.015"
    assert tables.share(rows) == "+13 % ± 2"
    assert tables.share(rows[:1], tables.worst_bin) == "+20 %"
    assert tables.share([row(0, 0.5)]) == "0"


def test_constants_are_compared_at_the_error_of_the_rule():
    """In the logarithm of 1 + error, 1 lies in the middle between 0 and 3: log 2 is half of log 4."""
    points = [(3.0, 0.7), (0.0, 0.5)]
    assert tables.constants_at(points, 1.0) == pytest.approx(0.6)
    assert tables.constants_at(points, 0.0) == pytest.approx(0.5)
    assert tables.constants_at(points, -0.1) is None and tables.constants_at(points, 3.1) is None
    rule = [row(0, 0.65, 1.0), row(1, 0.65, 9.0), row(2, 0.65, 1.0)]
    fixed = [[row(0, 0.5, 0.0), row(1, 0.5, 0.0)], [row(0, 0.7, 3.0), row(1, 0.7, 3.0), row(2, 0.7, 3.0)]]
    # Seed 1 is beyond the largest constant, and seed 2 lacks a constant.
    assert tables.over_constants(rule, fixed).values == pytest.approx((0.05,))


def test_a_table_says_which_rows_have_another_number_of_seeds():
    rows = {name: [row(seed, 0.5, 0.1) for seed in range(3)] for name in ("base", "off_policy, DPO")}
    shown = tables.safeguard(rows, {"SFT": rows["base"][:2]})
    assert (
        "| DPO | 0.500 ± 0.000 | 0.250 ± 0.000 | +0.000 (+0.000 to +0.000), no difference shown | +10 % ± 0 |" in shown
    )
    assert "| supervised tuning (2 seeds) | " in shown and "3 seeds a row" in shown


def test_tiles_are_read_as_they_were_written(tmp_path, monkeypatch):
    import numpy as np

    tiles = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3)).astype(np.uint8)
    pictures.write_tiles(tmp_path / "tiles.png", tiles)
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    assert np.array_equal(pictures.read_tiles("tiles.png"), tiles)


def test_a_line_of_a_page_is_found_again_by_the_words_before_its_numbers():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import page_outputs

    printed = (
        "noise\nstep 20  evaluation  loss 0.5000  winner 0.1\nstep 40  loss 0.4\nVerdict: worse. At step 40, 2%.\n"
    )
    shown = "step 20  evaluation  loss 0.6933  winner 0.2\n...\nVerdict: better. At step 40, 1%.\n"
    expected = "step 20  evaluation  loss 0.5000  winner 0.1\n...\nVerdict: worse. At step 40, 2%.\n"
    assert page_outputs.refreshed(shown, printed) == expected
    with pytest.raises(ValueError, match="step 60"):
        page_outputs.refreshed("step 60  loss 0.1\n", printed)


def test_the_flops_of_a_pair_add_up():
    """Two images and a prompt are encoded, and six predictions count for a LoRA: 2 + 0.5 + 6 times 3."""
    counted = {"vae": 1e12, "text": 5e11, "denoiser": 3e12}
    shown = tables.pair_flops(dict.fromkeys(("sd15", "sdxl", "sd35-medium", "flux-dev"), counted))
    assert "| SDXL, 1024 | LoRA | 20.5 | 18.0 | 12.0 |" in shown
    assert "| SDXL, 1024 | all weights | 26.5 | 24.0 | 18.0 |" in shown
