"""DeepSpeed in bf16 does not round a given model or lose a reference's small moves, and refuses calls without an
engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.matrix

WORKER = Path(__file__).with_name("rounding_worker.py")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_half_precision_rounds_neither_given_models_nor_small_moves(start, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH, str(WORKER), start["base"], start["policy"], start["pairs"], str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["given"]  # the user's reference model is as before
    assert found["small_moves"] < 1e-7  # of a reference that follows, which half precision would lose
    assert found["uneven_shards"]  # weights that do not divide by the number of processes come back whole
    assert "Set `eval_on_start=True`" in found["early"]  # an evaluation before there is an engine
    assert "trains only once" in found["again"]  # a second training with one engine
