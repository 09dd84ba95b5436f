"""Under an engine that rounds: a given model stays as it was, small moves of a reference are not lost, and what has no
engine yet, or no more, is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.matrix

WORKER = Path(__file__).with_name("rounding_worker.py")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def found(start, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("rounding")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH, str(WORKER), start["base"], start["policy"], start["pairs"], str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_a_given_reference_is_not_rounded_in_the_users_hands(found):
    assert found["given"]


def test_a_reference_follows_in_moves_that_half_precision_would_lose(found):
    assert found["small_moves"] < 1e-7


def test_weights_that_do_not_divide_evenly_come_back_whole(found):
    assert found["uneven_shards"]


def test_evaluation_without_an_engine_is_refused(found):
    assert "Set `eval_on_start=True`" in found["early"]


def test_an_engine_trains_once(found):
    assert "trains only once" in found["again"]
