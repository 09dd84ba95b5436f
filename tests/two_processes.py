"""Do a list of runs in two processes on the CPU. The runs share the processes until one of them ends."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
SECONDS_TO_START = 600  # minutes, where others use the cores too
SECONDS_A_RUN = 30  # a hundred times what one takes


def do_in_turn(
    worker: Path,
    runs: Sequence[dict],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    launch: Sequence[str] = LAUNCH,
) -> dict[str, str]:
    """Do runs one after the other, each below `folder` under its name. If a run ends its processes, the remaining runs
    start in new processes.

    Returns:
        `dict[str, str]`: For the name of each run, what its processes printed, and their exit status.
    """
    pending, outputs = list(runs), {}
    while pending:
        output = _launch([*launch, str(worker)], pending, folder, environment or {})
        reached = [run for run in pending if (folder / run["name"]).is_dir()]
        assert reached, f"The processes did not start:\n{output[-3000:]}"
        outputs.update({run["name"]: output for run in reached})
        pending = pending[len(reached) :]  # one that failed or was killed has ended its processes
    return outputs


def folder_of_done(run: dict, folder: Path, outputs: Mapping[str, str]) -> Path:
    """The folder of a run; fails if the run did, in either process."""
    place = folder / run["name"]
    errors = [path.read_text()[-3000:] for path in sorted(place.glob("error*.txt"))]
    assert not errors, "\n".join(errors)
    done = [(place / f"done{rank}").is_file() for rank in (0, 1)]
    assert all(done), f"A process ended without an exception:\n{outputs[run['name']][-3000:]}"
    return place


def done_of(worker: Path, runs: Sequence[dict], folder: Path) -> Callable[[dict], Path]:
    """Do runs as [`do_in_turn`]; [`folder_of_done`] of each of them."""
    outputs = do_in_turn(worker, runs, folder)
    return lambda run: folder_of_done(run, folder, outputs)


def _launch(words: Sequence[str], runs: Sequence[dict], folder: Path, environment: Mapping[str, str]) -> str:
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, *words, str(folder / "runs.json"), str(folder)]
    whole = {**os.environ, **ON_CPU, **environment}
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen(command, env=whole, stdout=output, stderr=output, start_new_session=True)
        try:
            process.wait(timeout=SECONDS_TO_START + SECONDS_A_RUN * len(runs))
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers, which have sessions of their own
                process.wait(timeout=120)
    return f"{(folder / 'output.txt').read_text()}\nexit status {process.returncode}"
