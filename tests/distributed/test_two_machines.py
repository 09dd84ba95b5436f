"""Checkpoints of two machines whose disks are their own: two processes, each the first of its machine, in a folder of
its own under the same relative name."""

import json
import os
import socket
import subprocess
import sys

import pytest

MACHINE = """
import json, sys
from pathlib import Path

from accelerate import PartialState

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.saving.checkpoint_folders import CheckpointFolders
from trl_diffusion_sdpo.saving.manifest import Manifest, damage

found, rank = {}, int(sys.argv[1])
for each_node in (True, False):
    args = DiffusionSDPOConfig(f"run-{each_node}", save_on_each_node=each_node, use_cpu=True, report_to="none")
    folders, folder = CheckpointFolders(args), Path(args.output_dir) / "checkpoint-2"
    folders.begin(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rng_state_{rank}.pth").write_text("1")
    if args.should_save:
        (folder / "optimizer.pt").write_text("moments")
        (folder / "trainer_state.json").write_text(json.dumps({"machine": rank + 9}))  # of other sizes
    folders.complete(folder)
    manifest = Manifest.read(folder)
    found[str(each_node)] = [None if manifest is None else sorted(manifest.files), damage(folder)]
print("found " + json.dumps(found))
PartialState().destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each machine says of its own checkpoint, by `save_on_each_node`."""
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


def test_with_a_save_on_each_machine_each_manifest_is_of_its_own_files(found):
    for rank in range(2):
        files = ["optimizer.pt", f"rng_state_{rank}.pth", "trainer_state.json"]
        assert found[rank]["True"] == [files, []]


def test_a_file_that_only_another_machine_has_is_no_damage(found):
    assert found[0]["False"] == [["optimizer.pt", "rng_state_0.pth", "trainer_state.json"], []]
    assert found[1]["False"] == [None, ["it was not written to its end"]]  # it has no checkpoint
