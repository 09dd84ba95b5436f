"""The step benchmark in its smallest form. Times mean nothing here, so we count operations, and compare the losses of
hand-written steps with those of our step."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # in this process: importing takes longer than measuring


def measure(file: Path, *parts: str) -> list[dict]:
    import step_time

    words = ["--smallest", "--rounds", "1", "--device", "cpu", "--parts", *parts, "--output", str(file)]
    assert step_time.main(words) == 0
    return json.loads(file.read_text())["results"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, str], dict]:
    results = measure(tmp_path_factory.mktemp("step_time") / "a.json", "bare", "authors", "diffusers")
    return {(row["comparison"]["tuning"], row["comparison"]["against"]): row for row in results}


def test_every_comparison_is_measured(rows):
    scripts = [("full", "authors' step"), ("lora", "diffusers' script")]
    assert rows.keys() == {("full", "bare loop"), ("lora", "bare loop"), *scripts}
    assert all(len(row["ratios"]) == 1 and row["ratios"][0] > 0 for row in rows.values())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_bare_loop_does_the_work_of_our_step(rows, tuning):
    """The same pairs, noise, passes, loss and update: losses agree to rounding, which beta multiplies by 2500. Those of
    the scripts, which draw other noise, differ."""
    script = rows["full", "authors' step"] if tuning == "full" else rows["lora", "diffusers' script"]
    assert rows[tuning, "bare loop"]["difference"] < 0.05 * script["difference"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_our_step_adds_few_and_small_operations(rows, tuning):
    """Metrics and checks on scalars, beside the passes."""
    row = rows[tuning, "bare loop"]
    ours, bare = row["operations"]
    assert 0 < ours - bare < 220
    assert row["written"][0] < 1.01 * row["written"][1]


@pytest.mark.matrix
def test_caches_leave_every_loss_as_it_is(tmp_path):
    """Encoded pairs and stored errors of the reference: losses equal to the bit, as are those of the bare loop's passes
    within transformers' own Trainer."""
    results = measure(tmp_path / "a.json", "cached", "errors", "overhead")
    assert len(results) == 9
    assert all(row["difference"] == 0 for row in results if row["comparison"]["name"] != "ours")
    plain, bare = next(row["operations"] for row in results if row["comparison"]["name"] == "plain Trainer")
    assert 0 < plain - bare < 20  # it does the same passes
