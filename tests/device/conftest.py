"""Cases on the pretend device share a subprocess, in which torch is patched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")
SECONDS_PER_CASE = 120  # timeout, many times the usual


@pytest.fixture(scope="session")
def start_data(make_pairs, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "pairs"
    make_pairs(8).save_to_disk(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def on_pretend_device(request, start_data, family_folder, tmp_path_factory):
    """`on_pretend_device(case)`: the result of a case. The first call runs all selected cases."""
    folder = tmp_path_factory.mktemp("pretend")
    selected = (item for item in request.session.items if "cases" in item.fixturenames)
    cases = {case["name"]: case for item in selected for case in item.callspec.params["cases"]}
    pending = [
        {**case, "model": family_folder(case["family"]), "data": start_data, "resumes": _checkpoint(case, folder)}
        for case in cases.values()
    ]
    output = ""
    while pending:
        output = _train(pending, folder)
        started = [case for case in pending if (folder / f"{case['name']}.json").is_file()]
        assert started, f"The worker did not start:\n{output[-3000:]}"
        pending = pending[len(started) :]  # torch's C++ may have aborted the process

    def found(case: dict) -> dict:
        answer = json.loads((folder / f"{case['name']}.json").read_text())
        assert answer, f"The process ended in {case['name']}:\n{output[-3000:]}"
        return answer

    return found


def _checkpoint(case: dict, folder: Path) -> str | None:
    """The checkpoint that a case resumes from, given as another case's name and a step."""
    if case["resumes"] is None:
        return None
    name, step = case["resumes"]
    return str(folder / name / f"checkpoint-{step}")


def _train(cases: list[dict], folder: Path) -> str:
    (folder / "cases.json").write_text(json.dumps(cases))
    path = os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "output.txt", "w+") as output:
        subprocess.run(
            [sys.executable, str(WORKER), str(folder / "cases.json"), str(folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=60 + SECONDS_PER_CASE * len(cases),
        )
        return (folder / "output.txt").read_text()
