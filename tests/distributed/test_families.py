"""Every family trains in bf16 under the engines that shard weights."""

import json
import math
from pathlib import Path

import pytest
from tiny_pipelines import CASES, case
from two_processes import do_in_turn, folder_of_done

WORKER = Path(__file__).with_name("family_worker.py")
ARGS = {"max_steps": 2, "per_device_train_batch_size": 1, "beta": 100.0, "bf16": True, "save_strategy": "no"}
WAYS = [("fsdp2", "full", "parameter"), ("fsdp2", "lora", "output")]
WAYS += [("zero3", "full", "output"), ("zero3", "lora", "parameter")]


@pytest.fixture(scope="module")
def logged(request, start, family_folder, tmp_path_factory):
    """`logged(run)`: the log of a run. The first call does all selected runs."""
    folder = tmp_path_factory.mktemp("families")
    runs = [item.callspec.params["run"] for item in request.session.items if "logged" in item.fixturenames]
    runs.sort(key=lambda run: run["engine"])
    outputs = do_in_turn(
        WORKER, [{**run, "model": family_folder(run["family"]), "data": start["pairs"]} for run in runs], folder
    )
    return lambda run: json.loads((folder_of_done(run, folder, outputs) / "log.json").read_text())


def build_run(family: str, engine: str, tuning: str, safeguard: str, *, edits: bool = False) -> dict:
    args = {**ARGS, "safeguard": safeguard, "resolution": case(family).RESOLUTION}
    name = f"{family}-{engine}-{tuning}-{safeguard}{'-edits' if edits else ''}"
    return {"name": name, "family": family, "engine": engine, "tuning": tuning, "args": args, "edits": edits}


RUNS = [build_run(family, *way) for family in CASES for way in WAYS]
RUNS += [build_run("flux2", *way, edits=True) for way in WAYS]


@pytest.mark.matrix
@pytest.mark.parametrize("run", RUNS, ids=[run["name"] for run in RUNS])
def test_every_family_starts_neutral_and_trains_when_its_weights_are_sharded(run, logged):
    first, second, *_ = logged(run)
    assert first["rewards/margins"] == 0
    assert first["errors/winner_change"] == first["errors/loser_change"] == 0
    assert all(0 < entry["grad_norm"] < math.inf for entry in (first, second))
    assert second["errors/winner_change"] != 0
