"""The benchmark for GPUs on the CPU, with networks of one layer: every kind of case, and resuming."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # in this process: importing takes longer than measuring

from gpu_device import Memory  # noqa: E402


def benchmark():
    """`benchmarks/gpu_speed.py` as a module; `gpu` is a folder of tests."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu_speed.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


gpu = benchmark()
SMALLEST = ["--device", "cpu", "--smallest"]


def call(file: Path, *words: str) -> int:
    return gpu.main([*SMALLEST, "--no-isolated", "--file", str(file), *words])


def lines(file: Path) -> dict[str, dict]:
    return {line["case"]: line for line in map(json.loads, file.read_text().splitlines())}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpu") / "gpu.jsonl"
    assert call(file, "--cases", "sd15-full", "flux-dev-lora-checkpointing", "flux-dev-lora-cached") == 0
    return file


def test_a_case_trains_neutrally_and_is_measured(measured):
    found = lines(measured)
    assert found.keys() == {"sd15-full", "flux-dev-lora-checkpointing", "flux-dev-lora-cached"}
    for line in found.values():
        assert line["outcome"] == "trained" and line["neutral"] and line["smallest"]
        assert line["pairs_per_second"] > 0 and line["teraflops_per_pair"] > 0
        assert line["versions"]["torch"] == torch.__version__
        assert {"models", "between steps", "encoding", "step"} <= line["memory_gib"].keys()
    # Three passes of the policy and one of the reference, encoding beside them; cached: two passes alone.
    passes = {name: line["teraflops_per_pair"] for name, line in found.items()}
    assert passes["flux-dev-lora-cached"] < 0.67 * passes["flux-dev-lora-checkpointing"]


def test_a_second_call_goes_on_where_the_first_ended(measured, capsys):
    before = measured.read_text()
    assert call(measured, "--cases", "sd15-full") == 0
    assert measured.read_text() == before
    measured.write_text(before + '{"case": "cut o')
    assert call(measured, "--cases", "sd15-full") == 0
    assert "damaged" in capsys.readouterr().err
    measured.write_text(before)


DID_NOT_FIT = {"outcome": "out of memory in training", "memory_gib": {"models": 23.0}}


def test_running_out_of_memory_is_a_result(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "build", fail)
    line = gpu.measure(gpu.CASES[0], "cpu", smallest=True)
    assert line["outcome"] == "out of memory in making the networks"


def test_a_case_that_fails_has_a_line_and_the_others_run(tmp_path, monkeypatch, capsys):
    def fail(case, options, seconds):
        if case.name == "sd15-lora":
            raise RuntimeError("planted")
        return {**gpu.facts(case, "cpu", smallest=True), **DID_NOT_FIT}

    monkeypatch.setattr(gpu, "measured", fail)
    assert call(tmp_path / "gpu.jsonl", "--cases", "sd15-lora*") == 1
    found = lines(tmp_path / "gpu.jsonl")
    assert found.keys() == {"sd15-lora", "sd15-lora-checkpointing", "sd15-lora-cached", "sd15-lora-compiled"}
    assert found["sd15-lora"]["outcome"] == "failed: planted" and "planted" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "measured", None)
    assert call(tmp_path / "gpu.jsonl", "--cases", "sd15-lora*") == 0  # nothing is left


def test_a_case_that_hangs_is_ended_with_its_workers_and_not_begun_again(tmp_path, monkeypatch):
    """The child starts a process that keeps its output open, as workers of a data loader do."""
    hangs = tmp_path / "hangs.py"
    hangs.write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(hangs))
    words = [*SMALLEST, "--file", str(tmp_path / "gpu.jsonl"), "--cases", "sd15-lora", "--case_seconds", "4"]
    assert gpu.main(words) == 0
    assert lines(tmp_path / "gpu.jsonl")["sd15-lora"]["outcome"] == "not done in 4 s"
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until init has collected it
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)
    monkeypatch.setattr(gpu, "measured", None)
    assert gpu.main(words) == 0


def test_flux_in_full_does_not_fit_by_its_weights():
    """By hand: 11.9 B weights, 16 bytes each in float32 with gradient and AdamW, and 2 for the reference."""
    full = next(case for case in gpu.CASES if case.name == "flux-dev-full")
    assert gpu.least_bytes(full) == pytest.approx(11.90e9 * 18, rel=0.01)


def test_the_peak_of_a_step_is_the_largest_of_its_parts():
    memory = Memory("cpu")
    sizes = iter([5, 7, 3, 20, 4, 9])  # before, encoding, between, reference, between, after
    memory._peak = lambda: next(sizes) * 2**30
    memory.note = lambda name: None
    memory.begin()
    with memory.part("encoding"):
        pass
    with memory.part("reference"):
        pass
    memory._peak = lambda: 9 * 2**30
    memory.end()
    assert memory.peaks == {"encoding": 7, "reference": 20, "step": 20, "policy and backward pass": 9}


@pytest.mark.matrix
def test_a_case_runs_in_a_process_of_its_own(tmp_path):
    file = tmp_path / "gpu.jsonl"
    assert gpu.main([*SMALLEST, "--file", str(file), "--cases", "sdxl-lora"]) == 0
    assert lines(file)["sdxl-lora"]["neutral"]


@pytest.mark.matrix
@pytest.mark.parametrize("case", gpu.CASES, ids=lambda case: case.name)
def test_every_case_trains(tmp_path, case):
    if case.tuning == "qlora":
        pytest.importorskip("bitsandbytes")
    assert call(tmp_path / "gpu.jsonl", "--cases", case.name) == 0
    assert lines(tmp_path / "gpu.jsonl")[case.name]["neutral"]
