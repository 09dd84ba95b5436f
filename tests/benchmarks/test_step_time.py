"""The benchmark of the step in its smallest form. Times mean nothing at this size: operations are counted, and that the
hand-written steps do the work of this package's step."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # in this process: importing takes longer than measuring


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    import step_time

    folder = tmp_path_factory.mktemp("step_time")
    words = [
        "--smallest",
        "--rounds",
        "1",
        "--warmup",
        "1",
        "--device",
        "cpu",
        "--parts",
        "bare",
        "authors",
        "diffusers",
    ]
    words += ["--output", str(folder / "a.json"), "--plot", str(folder / "a.png")]
    assert step_time.main(words) == 0
    assert (folder / "a.png").stat().st_size > 10_000
    return json.loads((folder / "a.json").read_text()), words


def rows(measured) -> dict[tuple[str, str], dict]:
    return {
        (group["tuning"], row["comparison"]["against"]): row
        for group in measured[0]["groups"]
        for row in group["results"]
    }


def test_every_comparison_is_measured(measured):
    found = rows(measured)
    both = [(tuning, other) for tuning, other in (("full", "authors' step"), ("lora", "diffusers' script"))]
    assert found.keys() == {("full", "bare loop"), ("lora", "bare loop"), *both}
    assert all(len(row["ratios"]) == 1 and row["ratios"][0] > 0 for row in found.values())
    for group in measured[0]["groups"]:
        assert sum(group["shares"].values()) == pytest.approx(1) and sum(
            group["true_shares"].values()
        ) == pytest.approx(1)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_bare_loop_does_the_work_of_our_step(measured, tuning):
    """The same pairs, noise, passes, loss and update: losses agree to rounding, which beta multiplies by 2500. Those of
    the scripts, which draw other noise, differ."""
    found = rows(measured)
    scripts = found["full", "authors' step"] if tuning == "full" else found["lora", "diffusers' script"]
    assert found[tuning, "bare loop"]["difference"] < 0.05 * scripts["difference"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_our_step_adds_few_and_small_operations(measured, tuning):
    """What a step costs beside its passes, without a clock: metrics and checks on scalars."""
    row = rows(measured)[tuning, "bare loop"]
    ours, bare = row["operations"]
    assert 0 < ours - bare < 220
    assert row["written"][0] < 1.01 * row["written"][1]


@pytest.mark.matrix
def test_caches_leave_every_loss_as_it_is(tmp_path):
    """Encoded pairs and stored errors of the reference: losses equal to the bit, as are those of the bare loop's passes
    within transformers' own Trainer."""
    import step_time

    words = [
        "--smallest",
        "--rounds",
        "1",
        "--warmup",
        "1",
        "--device",
        "cpu",
        "--parts",
        "cached",
        "errors",
        "overhead",
    ]
    assert step_time.main([*words, "--output", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    found = [row for group in report["groups"] for row in group["results"]]
    assert len(found) == 11
    assert all(row["difference"] == 0 for row in found if row["comparison"]["name"] != "ours")
    plain, bare = next(row["operations"] for row in found if row["comparison"]["name"] == "plain Trainer")
    assert 0 < plain - bare < 20  # it does the same passes
    for group in report["groups"]:
        if group["published"].startswith("sdxl"):  # of our own live step
            assert sum(group["shares"].values()) == pytest.approx(1) and group["shares"]["VAE"] > 0
