"""What a plan says that each of two processes holds, against the tensors that two processes hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_diffusion_sdpo.cli.plan import PlannedSettings
from trl_diffusion_sdpo.planning.plan import Planner

WORKER = Path(__file__).with_name("memory_worker.py")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
LORA_WORDS = f"--use_peft --lora_r 4 --lora_alpha 8 --lora_target_modules {' '.join(LORA['target_modules'])}"
ARGS = {"max_steps": 1, "per_device_train_batch_size": 2, "optim": "adamw_torch", "safeguard": "output", "beta": 500.0}
CASES = [
    {"name": f"{engine}-{tuning}-{precision}", "engine": engine, "tuning": tuning, "half": precision == "bf16"}
    for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    for tuning, precision in (("full", "float32"), ("full", "bf16"), ("fresh", "bf16"))
]


@pytest.fixture(scope="module")
def measured(start, tmp_path_factory):
    """The folder of each process's bytes by case, and the base pipeline."""
    folder = tmp_path_factory.mktemp("measured")
    same = {"model": start["base"], "ref_model": None, "lora": None, "data": start["pairs"]}
    cases = [
        {**case, **same, "peft": LORA if case["tuning"] == "fresh" else None, "args": {**ARGS, "bf16": case["half"]}}
        for case in CASES
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH, str(WORKER), str(folder / "cases.json"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    errors = [file.read_text() for file in folder.glob("*/error*.txt")]
    assert done.returncode == 0 and not errors, "\n".join([*errors, done.stderr[-3000:]])
    return folder


@pytest.mark.matrix
@pytest.mark.parametrize("planned", CASES, ids=[case["name"] for case in CASES])
def test_a_process_holds_what_the_plan_says(planned, measured, start, tmp_path):
    words = f"--model_name_or_path {start['base']} --output_dir {tmp_path} --per_device_train_batch_size 2"
    words += f" --num_processes 2 --optim adamw_torch --bf16 {str(planned['half']).lower()}"
    words += f" {LORA_WORDS}" if planned["tuning"] == "fresh" else ""
    settings = PlannedSettings([*words.split(), *engine_words(planned["engine"], tmp_path)], "plan", "cpu", None)
    components = {"reference": 0, **Planner("cpu").components(settings.prepared({}))}
    for rank in (0, 1):
        found = json.loads((measured / planned["name"] / f"bytes{rank}.json").read_text())
        assert {name: components[name] for name in found} == pytest.approx(found, rel=0.02), rank


def engine_words(engine: str, folder: Path) -> list[str]:
    if not engine.startswith("zero"):
        return ["--accelerate_config", {"ddp": "multi_gpu"}.get(engine, engine)]
    file = folder / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": int(engine.removeprefix("zero"))}}))
    return ["--deepspeed", str(file)]
