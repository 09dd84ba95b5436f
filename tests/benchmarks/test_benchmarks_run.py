"""Every benchmark in its smallest form writes its file and measures all its modes. The numbers mean nothing at this
size."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> str:
    """The output of the script."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.matrix
def test_the_overhead_of_every_mode_is_measured(tmp_path):
    file = tmp_path / "overhead.json"
    shown = run(
        "safeguard_overhead.py",
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--warmup",
        "1",
        "--batch",
        "2",
        "--tuning",
        "lora",
        "--reference",
        "--device",
        "cpu",
        "--output",
        str(file),
    )
    report = json.loads(file.read_text())
    rows = {row["mode"]: row for row in report["rows"]}
    forms = ["half batches", "low memory", "error anchor"]
    assert list(rows) == ["none", "output", "parameter", *(f"parameter, {form}" for form in forms)]
    assert all(f"| {mode} |" in shown for mode in rows)
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in rows.values())
    assert rows["none"]["ratio"] == 1
    # One branch's activations at a time are less than two.
    assert 0 < rows["parameter, low memory"]["step_bytes"] < 0.8 * rows["parameter"]["step_bytes"]


@pytest.mark.matrix
def test_every_way_to_read_rows_is_measured(tmp_path):
    file = tmp_path / "loading.json"
    shown = run("data_loading.py", "--quick", "--output", str(file))
    found = json.loads(file.read_text())
    ways = [(row["rows"], row["way"]) for row in found["start_up"]]
    assert ways == [(rows, way) for rows in (100, 3000) for way in ("map", "again", "stream")]
    assert all(row["peak"] >= row["rss"] > 0 and row["seconds"] > row["constructing"] for row in found["start_up"])
    assert all(f"| {rows} | {way} |" in shown for rows, way in ways)
    assert [row["workers"] for row in found["loading"]] == [0, 1] and found["decoding"]["ratio"] > 0


@pytest.mark.matrix
def test_a_first_epoch_is_measured_with_and_without_a_cache(tmp_path):
    file = tmp_path / "epoch.json"
    run("first_epoch.py", "--rounds", "1", "--per_prompt", "1", "--output", str(file))
    found = json.loads(file.read_text())
    assert found["bytes"]["all"] > 1.8 * found["bytes"]["drawn"] > 0 == found["bytes"]["live"]
    assert found["ratios"]["drawn"][0] == found["seconds"]["drawn"][0] / found["seconds"]["live"][0]


@pytest.mark.matrix
def test_reading_a_large_cache_is_measured_in_every_process(tmp_path):
    file = tmp_path / "cache.json"
    shown = run("large_cache.py", "--quick", "--output", str(file))
    [found] = json.loads(file.read_text())
    assert found["shard_files"] == -(-2 * 1000 // 64) + -(-100 // 64)
    for start in ("fork", "spawn"):
        assert found["pairs_per_second"][start] > 0
        for process in ("training process", "worker 0", "worker 1"):
            facts = found["processes"][f"{process} ({start})"]
            assert facts["private"] > 0 and facts["maps"] > facts["files"] > 0
            assert f"| {process} ({start}) |" in shown


@pytest.mark.matrix
def test_the_memory_to_load_a_model_is_measured_under_both_engines(tmp_path):
    file = tmp_path / "weights.json"
    run("weights_once.py", "--quick", "--output", str(file))
    found = json.loads(file.read_text())
    kinds = [(row["engine"], row["tuning"]) for row in found]
    assert kinds == [("zero3", "lora"), ("fsdp2", "lora"), ("zero3", "full"), ("fsdp2", "full")]
    assert all(row["after"]["small"]["peak"] > row["model"] > 0 for row in found)


SMOKE = """
about: The smallest plan with a row of each kind.
pairs: off_policy
seeds: [0]
prompts: 1
max_pairs: 4
images_per_prompt: {selection: 1, final: 2}
guidance_scales: [1.0]
shared: {max_steps: 1, per_device_train_batch_size: 2, learning_rate: 2.0e-4, beta: 100.0, random_flip: false}
rows:
  base: {}
  recipe: {safeguard: parameter, safeguard_mu: 0.8}
  constant: {pairs: blurred, safeguard: none, constant_lambda: 0.5}
  recipe, guided: {of: recipe, guidance: {scale: 4.0, interval: [0.0, 0.62]}, weights_scale: 2.0}
"""


@pytest.mark.matrix
def test_a_study_trains_samples_and_goes_on_after_a_kill(tmp_path):
    plan, file = tmp_path / "smoke.yaml", tmp_path / "rows.jsonl"
    plan.write_text(SMOKE)
    options = ("--file", str(file), "--weights", str(tmp_path / "weights"))
    shown = run("studies/study.py", str(plan), *options)
    rows = [json.loads(line) for line in file.read_text().splitlines() if line]
    assert [row["name"] for row in rows] == ["base", "recipe", "constant", "recipe, guided"]
    assert all(f"| {row['name']} | 1 |" in shown for row in rows)
    base, recipe, *_ = rows
    assert base["errors"]["winner_change"] == 0 != recipe["errors"]["winner_change"]
    file.write_text(file.read_text() + '{"cut off')
    assert shown.endswith(run("studies/study.py", str(plan), *options))  # nothing is made anew


def test_every_plan_of_a_study_has_settings_that_exist():
    from trl_diffusion_sdpo import DiffusionSDPOConfig

    sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))
    import study

    known = {*DiffusionSDPOConfig.__dataclass_fields__, *study.TRAINING_KEYS, *study.SAMPLING_KEYS}
    for file in sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")):
        plan = study.load_plan(str(file))
        assert not {key for row in (plan["shared"], *plan["rows"].values()) for key in row} - known


def test_a_plan_with_an_unknown_form_of_guidance_is_refused(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))
    import study

    file = tmp_path / "plan.yaml"
    file.write_text("rows: {tuned: {}, guided: {of: tuned, guidance: {form: both}}}")
    with pytest.raises(ValueError, match="guided.*'both'"):
        study.load_plan(str(file))


STEP_SMOKE = """
seeds: [0]
pairs: off_policy
train_prompts: selection
per_prompt: 1
max_pairs: 4
prompts: 2
images_per_prompt: {selection: 1, final: 2}
guidance_scales: [1.0, 2.0]
shared: {max_steps: 1, per_device_train_batch_size: 2, learning_rate: 2.0e-4, beta: 100.0, random_flip: false}
rows:
  base: {}
  one step: {online: {iterations: 1, prompts: 2, k: 2, levels: 2, gap: -1.0}}
  two steps: {online: {iterations: 2, prompts: 2, k: 2, levels: 2, gap: -1.0}}
  output space: {online: {iterations: 1, prompts: 2, k: 2, levels: 1, gap: -1.0, safeguard: output}, lora_rank: 2}
  parameter space: {online: {iterations: 1, prompts: 2, k: 2, levels: 1, gap: -1.0, safeguard: parameter}}
"""


@pytest.mark.matrix
def test_the_study_of_step_pairs_runs(tmp_path):
    plan, file = tmp_path / "steps.yaml", tmp_path / "rows.jsonl"
    plan.write_text(STEP_SMOKE)
    run("studies/step_pairs.py", str(plan), "--file", str(file), "--weights", str(tmp_path / "weights"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    changes = [row["errors"]["winner_change"] for row in rows]
    assert changes[0] == 0 and all(changes[1:]) and rows[2]["cost"] == 2 * rows[1]["cost"] > 0


@pytest.mark.matrix
def test_the_study_of_edits_runs(tmp_path):
    sizes = ("--base_steps", "2", "--batch", "2", "--steps", "1", "--edits", "6")
    run("studies/edit.py", "--output", str(tmp_path), "--results", str(tmp_path), *sizes)
    results = json.loads((tmp_path / "edit.json").read_text())
    assert list(results) == ["base", "DPO", "output space, mu 0.6", "parameter space, mu 0.8"]
    assert Image.open(tmp_path / "edit_images.png").size == (6 * 32, 6 * 32)


@pytest.mark.matrix
def test_every_way_to_write_images_is_measured(tmp_path):
    sizes = ("--side", "32", "--draw", "0.001", "--batches", "1", "--rounds", "1")
    shown = run("writing_images.py", *sizes, "--output", str(tmp_path / "written.json"))
    rows = json.loads((tmp_path / "written.json").read_text())["rows"]
    assert len(rows) == 3 and all(f"| {row['way']} |" in shown and row["wall"][0] > 0 for row in rows)


@pytest.mark.matrix
def test_the_coverage_of_every_case_is_measured(tmp_path):
    shown = run("interval_coverage.py", "--evaluations", "20", "--output", str(tmp_path / "a.json"))
    measured = json.loads((tmp_path / "a.json").read_text())["measured"]
    assert len(measured) == 3 * 6 * 5 and all(0.5 <= row["coverage"] <= 1 for row in measured)
    assert all(f"| {kind}, true win rate |" in shown for kind in ("one seed", "one seed, ties", "four seeds"))


def test_the_table_of_costs_is_that_of_the_committed_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    overhead = importlib.import_module("safeguard_overhead")
    report = json.loads(overhead.RESULTS.read_text(encoding="utf-8"))
    assert overhead.docs_table(report) in (ROOT / "docs" / "safeguard.md").read_text(encoding="utf-8")
