"""Runs killed at random times and at writes, and damaged or malicious checkpoints, under every engine. All runs are
forked from one process (`scenarios.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("scenarios.py")
ENGINES = ("ddp", "fsdp2", "fsdp2-sharded", "zero1", "zero2", "zero3")
SECONDS = 3600


@pytest.fixture(scope="module")
def report(request, tmp_path_factory):
    """`report(scenario)`: the results of a scenario of `scenarios.py`."""
    selected = (item for item in request.session.items if item.path == Path(__file__))
    names = {item.callspec.params["scenario"] for item in selected if "scenario" in item.fixturenames}
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, str(SCRIPT), "--output", str(folder), *sorted(names)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
    file = folder / "report.json"
    results = json.loads(file.read_text()) if file.is_file() else {}

    def of(scenario: str):
        assert scenario in results, f"The scenario did not run:\n{ended.stdout[-3000:]}"
        return results[scenario]

    return of


def scenarios(*names: str):
    return pytest.mark.parametrize("scenario", names)


def assert_killed_and_equal(entries: list[dict], kills: int) -> None:
    assert sum(len(entry["kills"]) for entry in entries) == kills
    assert not [entry for entry in entries if entry["differences"]]


@scenarios("kills:plain:3")
def test_a_killed_run_ends_like_an_uninterrupted_one(report, scenario):
    assert_killed_and_equal(report(scenario), 3)


@pytest.mark.matrix
@scenarios(*[f"kills:{engine}:3" for engine in ENGINES])
def test_a_run_of_every_engine_that_loses_a_process_ends_like_an_uninterrupted_one(report, scenario):
    assert_killed_and_equal(report(scenario), 3)


def assert_survived(results: dict) -> None:
    assert all(entry["died"] for entry in results["kills"])
    assert not [entry for entry in results["kills"] if entry["differences"]]
    names = " ".join(results["writes"])
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"):
        assert f"half of _partial/checkpoint-4/{name}" in names  # the scenario records these writes
    for name in ("trainer_state.json", "diffusion_sdpo_setup.json"):
        assert f"open _partial/checkpoint-4/{name}" in names
    assert "rename _partial/checkpoint-4" in names


@scenarios("writes:lora:40")
def test_a_run_survives_a_kill_at_a_write(report, scenario):
    assert_survived(report(scenario))


@pytest.mark.matrix
@scenarios("writes:lora:1", "writes:full-ema:1")
def test_a_run_survives_a_kill_at_every_write(report, scenario):
    assert_survived(report(scenario))


def assert_noticed(results: dict) -> None:
    assert results
    for name, entry in results.items():
        assert not entry["done"] and Path(name).name in entry["log"], name


@scenarios("damaged:zero2:rank_1_mp_rank_00_optim_states.pt")
def test_a_missing_file_of_one_process_is_named(report, scenario):
    assert_noticed(report(scenario))


@pytest.mark.matrix
@scenarios(*[f"damaged:{engine}" for engine in ENGINES])
def test_a_missing_file_of_one_process_is_named_under_every_engine(report, scenario):
    assert_noticed(report(scenario))


def assert_refused(entry: dict) -> None:
    assert not entry["done"] and not entry["ran"]
    # The first process to fail ends the others, perhaps before they have written why.
    assert any("tensors, numbers and settings only" in log for log in entry["logs"])


@scenarios("planted:zero2:pp_rank_1_mp_rank_00_optim_states.pt", "planted:fsdp2-sharded:.metadata:__0_0.distcp")
def test_a_planted_pickle_of_an_engine_does_not_run(report, scenario):
    results = report(scenario)
    assert len(results) == scenario.count(":") - 1
    for entry in results.values():
        assert_refused(entry)


@pytest.mark.matrix
@scenarios(*[f"planted:{engine}" for engine in ENGINES])
def test_no_planted_pickle_of_any_engine_runs(report, scenario):
    results = dict(report(scenario))
    assert results.pop("untouched")["done"]
    assert len(results) > 3
    for entry in results.values():
        assert_refused(entry)
