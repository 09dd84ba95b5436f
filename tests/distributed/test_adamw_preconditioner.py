"""Lambda bounded by AdamW's own step is the same number under every engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("adamw_worker.py")


@pytest.fixture(scope="module")
def scales(sd_folder, make_pairs, tmp_path_factory):
    """`scales(engine, metric)`: the lambdas that two processes log."""
    folder = tmp_path_factory.mktemp("adamw")
    make_pairs().save_to_disk(folder / "pairs")

    def run(engine: str, metric: str = "adamw") -> list[float]:
        file = folder / f"{engine}-{metric}.json"
        if not file.is_file():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command += [str(WORKER), engine, str(file), sd_folder, str(folder / "pairs"), metric]
            setting = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env={**os.environ, **setting}, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(file.read_text(encoding="utf-8"))

    return run


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_every_engine_takes_the_lambda_of_ddp(scales, engine):
    assert scales(engine) == pytest.approx(scales("ddp"), abs=2e-5)


@pytest.mark.matrix
def test_the_first_lambda_is_below_the_plain_one(scales):
    """One batch and one start: only the metric differs."""
    assert 0 < scales("ddp")[0] < scales("ddp", "plain")[0]
