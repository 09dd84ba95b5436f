"""Runs on a GPU share processes by engine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.cases import skipped
from local_hub import running_hub

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
SECONDS = {"start": 120, "run": 90}  # timeouts, many times the usual


@pytest.fixture(scope="session")
def hub():
    """The Hub's HTTP API on this machine; the workers find it by their environment."""
    with running_hub() as server:
        yield server


@pytest.fixture(scope="session")
def answer_of(request, hub, family_folder, make_pairs, tmp_path_factory):
    """`answer_of(run, device)`: the result of a run. The first call does all selected runs, engine by engine."""
    scratch = tmp_path_factory.mktemp("gpu")
    make_pairs(16).save_to_disk(str(scratch / "pairs"))
    selected = [item.callspec.params for item in request.session.items if item.path.parent == WORKER.parent]
    done = set()

    def start(device: str) -> Path:
        answers = scratch / f"answers-{device}"
        if device not in done:
            done.add(device)
            answers.mkdir()
            runs = [params["run"] for params in selected if params["device"] == device and not skipped(params["run"])]
            data = str(scratch / "pairs")
            do_all([{**run, "model": family_folder(run["family"]), "data": data} for run in runs], device, answers)
        return answers

    def do_all(runs: list[dict], device: str, answers: Path) -> None:
        for engine in dict.fromkeys(run["engine"] for run in runs):
            pending = [run for run in runs if run["engine"] == engine]
            while pending:
                launch(pending, device, answers, scratch, hub)
                done = [run for run in pending if list(answers.glob(f"{run['name']}.*"))]
                pending = pending[max(1, len(done)) :]

    def answer(run: dict, device: str) -> dict:
        answers = start(device)
        file = answers / f"{run['name']}.json"
        if not file.is_file():
            errors = [error.read_text() for error in sorted(answers.glob(f"{run['name']}.*.error"))]
            output = (scratch / "output.txt").read_text()[-3000:]
            pytest.fail("\n".join(errors) or f"The process ended without a result:\n{output}", pytrace=False)
        return json.loads(file.read_text())

    return answer


def launch(runs: list[dict], device: str, answers: Path, scratch: Path, hub) -> None:
    """One process, by `torchrun` if there is an engine."""
    (scratch / "runs.json").write_text(json.dumps(runs))
    started = [sys.executable]
    if runs[0]["engine"] != "plain":
        started += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(scratch / "hf_home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        # Only the first of several GPUs.
        **({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else first_gpu()),
    }
    words = [str(WORKER), str(scratch / "runs.json"), device, str(answers), str(scratch / device)]
    with open(scratch / "output.txt", "w") as output:
        limit = SECONDS["start"] + SECONDS["run"] * len(runs)
        process = subprocess.Popen(
            [*started, *words], env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            output.write(f"\nTimeout after {limit} seconds.\n")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def first_gpu() -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
