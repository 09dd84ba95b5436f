"""The GPU benchmark on the CPU, with networks of one layer: every kind of case, and resuming."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # in this process: importing takes longer than measuring


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
