"""Kills at given writes, damaged and malicious checkpoints, with their results in one JSON file:

python tests/kills/scenarios.py --output folder writes:lora:12 planted:zero2 damaged:ddp kills:plain:4
"""

import argparse
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import torch
from attempts import attempt, prepare
from random_kills import differences, finish, kill_runs, result_of, run_of, uninterrupted

PICKLED = (".pt", ".pth", ".bin", ".metadata", ".distcp")
NEWEST = "checkpoint-5"  # of a finished run


# ---- Kills at a write ------------------------------------------------------------------------------------------------


def writes(folder: Path, variant: str, every: str = "1") -> dict:
    """Kill a run of one process at every `every`-th write to its output folder, and restart it."""
    expected, _ = uninterrupted("plain", variant, folder)
    counted = {**run_of("plain", variant, "counted"), "count_writes": True}
    finish(counted, folder)
    listed = json.loads((folder / counted["name"] / "writes.json").read_text())
    kills = []
    for number in range(0, len(listed), int(every)):
        run = run_of("plain", variant, f"write-{number}")
        died = attempt({**run, "die_at_write": number}, folder).exit_codes == [-9]
        finish(run, folder)
        wrong = differences(result_of(run, folder), expected)
        kills.append({"write": listed[number], "died": died, "differences": wrong})
        shutil.rmtree(folder / run["name"])
    return {"writes": listed, "kills": kills}


# ---- Damaged ---------------------------------------------------------------------------------------------------------


def damaged(folder: Path, engine: str, *only: str) -> dict:
    """Return for each file of the newest checkpoint that a single process writes whether a run resumes without the
    file, and its log. `only` are endings of file names."""
    uninterrupted(engine, "lora", folder)
    complete = folder / run_of(engine, "lora", "uninterrupted")["name"] / "output"
    newest = complete / NEWEST
    names = [path.relative_to(newest).as_posix() for path in sorted(newest.rglob("*"))]
    marks = ("rank_1_", "rng_state_1.", "__1_", "scheduler.pt")
    results = {}
    for name in names:
        if not any(mark in name for mark in marks) or (only and not name.endswith(only)):
            continue
        run = {**run_of(engine, "lora", "damaged"), "resume": True}
        run_folder = folder / run["name"]
        shutil.rmtree(run_folder, ignore_errors=True)
        shutil.copytree(complete, run_folder / "output")
        (run_folder / "output" / NEWEST / name).unlink()
        ended = attempt({**run, "args": {"max_steps": 6}}, folder)
        logs = [path.read_text() for path in sorted(run_folder.glob("log*.txt"))]
        results[name] = {"done": ended.done, "log": "".join(logs)}
    return results


# ---- Malicious -------------------------------------------------------------------------------------------------------


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def plant(file: Path, mark: Path) -> None:
    """Add a payload to a file of a checkpoint and change nothing else."""
    if file.name.endswith(".metadata"):
        with open(file, "rb") as stream:
            content = pickle.load(stream)
        content.planner_data = Payload(mark)
        file.write_bytes(pickle.dumps(content))
    elif file.suffix == ".distcp":  # concatenated small files of `torch.save`
        content = file.read_bytes()
        file.write_bytes(_with_payload_in_every_pickle(content, mark))
    else:
        content = torch.load(file, weights_only=False)
        torch.save({**content, "planted": Payload(mark)}, file)


def _with_payload_in_every_pickle(content: bytes, mark: Path) -> bytes:
    """Return a distributed checkpoint with a payload of equal length for each item that is no tensor."""
    start, out = 0, b""
    while start < len(content):
        end = content.index(b"PK\x05\x06", start) + 22
        item = content[start:end]
        buffer = io.BytesIO()
        torch.save(Payload(mark), buffer)
        is_small = len(zipfile.ZipFile(io.BytesIO(item)).namelist()) < 8 and len(buffer.getvalue()) <= len(item)
        out += buffer.getvalue().ljust(len(item), b"\0") if is_small else item
        start = end
    return out


def planted(folder: Path, engine: str, *only: str) -> dict:
    """Return for each file of a checkpoint that can hold a pickle the log of a run that resumes from it, and whether
    the payload ran; and the same for an untouched checkpoint. `only` are endings of file names."""
    complete = folder / run_of(engine, "lora", "planted-complete")["name"]
    writer = {**run_of(engine, "lora", "planted-complete"), "args": {"max_steps": 2}}
    finish(writer, folder)
    checkpoint = complete / "output" / "checkpoint-2"
    files = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if holds_pickle(path)]
    if only:
        names = [name for name in files if name.endswith(only)]
        return {name: _resume(folder, engine, checkpoint, name) for name in names}
    results = {name: _resume(folder, engine, checkpoint, name) for name in files}
    results["untouched"] = _resume(folder, engine, checkpoint, None)
    return results


def holds_pickle(path: Path) -> bool:
    return path.is_file() and path.name.endswith(PICKLED)


def _resume(folder: Path, engine: str, checkpoint: Path, name: str | None, **args) -> dict:
    run = run_of(engine, "lora", "planted")
    run_folder, mark = folder / run["name"], folder / "mark"
    shutil.rmtree(run_folder, ignore_errors=True)
    shutil.copytree(checkpoint, run_folder / "output" / "checkpoint-2")
    if name is not None:
        plant(run_folder / "output" / "checkpoint-2" / name, mark)
    ended = attempt({**run, "resume": True, "args": {"max_steps": 3, **args}}, folder)
    logs = [path.read_text() for path in sorted(run_folder.glob("log*.txt"))]
    ran = mark.is_dir()
    if ran:
        mark.rmdir()
    return {"done": ended.done, "ran": ran, "logs": logs}


SCENARIOS = {"writes": writes, "damaged": damaged, "planted": planted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+", help="name:settings")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    folder, report = options.output.resolve(), {}
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    for scenario in options.scenarios:
        name, *settings = scenario.split(":")
        if name == "kills":
            report[scenario] = kill_runs(settings[0], int(settings[1]), 0, folder, float("inf"))
        else:
            report[scenario] = SCENARIOS[name](folder, *settings)
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
