"""The smallest models on a GPU, under every engine at world size 1: `make test-gpu`. With `-m matrix`, one of the
runs goes to the CPU and tests this code itself."""

import math

import pytest
import torch
from gpu.cases import CASES, STEPS, skipped

ON_CPU = "plain-lora-output-fp32-resume-samples-push"
ENGINES = {"ddp": "MULTI_", "fsdp2": "FSDP", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def on_devices() -> list:
    on_gpus = [pytest.param("cuda", run, id=f"cuda-{run['name']}", marks=pytest.mark.gpu) for run in CASES]
    (run,) = (run for run in CASES if run["name"] == ON_CPU)
    return [*on_gpus, pytest.param("cpu", run, id=f"cpu-{run['name']}", marks=pytest.mark.matrix)]


@pytest.mark.parametrize(("device", "run"), on_devices())
def test_a_run_trains_saves_and_resumes(answer_of, hub, device, run):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if skipped(run) is not None:
        pytest.skip(skipped(run))
    found = answer_of(run, device)
    assert found["device"] == device and found["steps"] == STEPS
    assert found["engine_kind"].startswith(ENGINES.get(run["engine"], "NO"))
    # Neutral before the first step, whatever the precision.
    assert found["losses"][0] == pytest.approx(math.log(2), rel=1e-6) and found["margin"] == 0
    assert all(math.isfinite(loss) for loss in found["losses"])
    if "fp16" not in run["args"]:  # the loss scaler may skip all of its first steps
        assert found["losses"][-1] != found["losses"][0]
    if "resume" in run["extras"]:
        assert found["resume_difference"] <= (2e-4 if device == "cuda" else 0)
    if "samples" in run["extras"]:
        assert found["samples"] == 1 + STEPS // 2
    if "push" in run["extras"]:
        check_pushed(hub, run)
    if "waits" in run["extras"] and device == "cuda":
        check_waits(found["waits"])


def check_pushed(hub, run: dict) -> None:
    files = hub.repos[f"{hub.user}/{run['name']}"].files
    assert "pytorch_lora_weights.safetensors" in files and "README.md" in files


def check_waits(waits: dict[str, int]) -> None:
    """In code of the package, a step waits only for the metrics of its log."""
    ours = {place: count for place, count in waits.items() if place.startswith("trl_diffusion_sdpo")}
    assert ours == {"trl_diffusion_sdpo/step/meters.py::drain": 1}
