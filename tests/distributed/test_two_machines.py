"""Checkpoints of two machines whose disks are their own: two processes, each the first of its machine, in a folder of
its own under the same relative name."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.matrix

MACHINE = """
import json, sys
from pathlib import Path

from accelerate import PartialState

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.saving.checkpoints import Checkpoints

found, rank = {}, int(sys.argv[1])
for each_node in (True, False):
    args = DiffusionSDPOConfig(f"run-{each_node}", save_on_each_node=each_node, use_cpu=True, report_to="none")
    checkpoints, folder = Checkpoints(args), Path(args.output_dir) / "checkpoint-2"
    with checkpoints.writing(folder, 0) as partial:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / f"rng_state_{rank}.pth").write_text("1")
        if args.should_save:
            (partial / "trainer_state.json").write_text("{}")
    try:
        told = checkpoints.resume_point(True, args.output_dir)
    except ValueError as error:
        told = str(error)
    found[str(each_node)] = [sorted(path.name for path in folder.iterdir()), told]
print("found " + json.dumps(found))
PartialState().destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """Return what each machine reports about its checkpoint, by `save_on_each_node`."""
    root, machines = tmp_path_factory.mktemp("machines"), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for rank in range(2):
        (root / str(rank)).mkdir()
        places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
        env = {**os.environ, **{name: str(value) for name, value in places.items()}}
        command = [sys.executable, "-c", MACHINE, str(rank)]
        machines.append(subprocess.Popen(command, cwd=root / str(rank), env=env, stdout=subprocess.PIPE, text=True))
    said = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    return [json.loads(text.rpartition("found ")[2]) for text in said]


def test_with_a_save_on_each_machine_each_has_a_checkpoint_of_its_own(found):
    for rank in range(2):
        assert found[rank]["True"] == [[f"rng_state_{rank}.pth", "trainer_state.json"], "run-True/checkpoint-2"]


def test_without_it_each_keeps_its_own_files_and_resuming_is_refused(found):
    assert [machine["False"][0] for machine in found] == [
        ["rng_state_0.pth", "trainer_state.json"],
        ["rng_state_1.pth"],
    ]
    for machine in found:
        assert "trainer_state.json is missing" in machine["False"][1]
