"""The benchmark of the step in its smallest form. Times mean nothing at this size: operations are counted, and that the
hand-written steps do the work of this package's step."""

import json
import sys
from pathlib import Path

import pytest
import torch

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


def test_a_call_that_resumes_measures_only_what_is_missing(measured, monkeypatch, capsys):
    import step_time

    report, words = measured
    file = Path(words[words.index("--output") + 1])
    shown = file.read_text()
    monkeypatch.setattr(step_time, "measure", None)  # nothing is measured anew
    assert step_time.main([*words, "--resume"]) == 0
    assert "| bare | sd15 | lora | ours | bare loop |" in capsys.readouterr().out and file.read_text() == shown
    file.write_text(json.dumps({**report, "groups": report["groups"][:1]}))
    with pytest.raises(TypeError, match="not callable"):
        step_time.main([*words, "--resume"])
    for other in (["--pairs", "3"], ["--quick"]):
        with pytest.raises(ValueError, match="`--resume` needs the settings of"):
            step_time.main([*words, "--resume", *other])
    del report["settings"]["quick"]  # as files of before
    file.write_text(json.dumps(report))
    assert step_time.main([*words, "--resume"]) == 0
    file.write_text(shown)


def rows(measured) -> dict[tuple[str, str], dict]:
    return {
        (group["tuning"], row["comparison"]["against"]): row
        for group in measured[0]["groups"]
        for row in group["results"]
    }


def test_all_of_a_scripts_batch_is_on_the_device():
    """That of the networks: the loader's pixels are on the CPU. The meta device stands for another one."""
    import bare_steps
    from proportions import PROPORTIONS

    pipeline = PROPORTIONS["smallest sd15"].build()
    bench = bare_steps.Bench(pipeline, "full", 1.0, 0.5, 1e-4)
    bench.device = torch.device("meta")
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "prompts": ["a prompt"], "seeds": [0]}
    made = bare_steps.script_batch(bench, batch)
    tensors = {name: value.device.type for name, value in made.items() if isinstance(value, torch.Tensor)}
    assert tensors == dict.fromkeys(("pixel_values", "floats", "input_ids"), "meta")
    assert made["pixel_values"].dtype == torch.uint8 and made["seeds"] == [0]


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


def test_sdxls_vae_in_float32_takes_a_quarter_of_a_step():
    """By hand: 4.88 and 6.76 TFLOP for VAE and UNet, and 0.142 s of the VAE in float32 where half precision takes
    0.078 s."""
    sys.path.append(str(ROOT / "benchmarks"))
    from proportions import XL_HALF, true_shares

    vae, unet, text = 4.879, 6.761, 0.111
    for tuning, passes in (("full", 4), ("lora", 3)):
        for published, factor in (("sdxl", 0.142 / 0.078), (XL_HALF, 1)):
            whole = 2 * factor * vae + text + 2 * passes * unet
            assert true_shares(published, tuning)["VAE"] == pytest.approx(2 * factor * vae / whole, rel=1e-3)
    assert true_shares("sdxl", "full")["VAE"] == pytest.approx(0.247, abs=1e-3)


def test_the_true_shares_are_those_of_the_published_sizes(measured):
    """By hand: SD1.5 at 512 has 1.12 TFLOP for the VAE and 0.80 for the UNet's forward pass of an image."""
    whole = 2 * 1.1167 + 2 * 0.8033 * 4
    shares = next(group["true_shares"] for group in measured[0]["groups"] if group["tuning"] == "full")
    assert shares["VAE"] == pytest.approx(2 * 1.1167 / whole, rel=0.01)
    assert shares["reference"] == pytest.approx(2 * 0.8033 / whole, rel=0.01)


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
