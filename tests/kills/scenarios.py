"""Deaths and damages that are not random, each with what came of it, in one JSON file:

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
from kill_runs import differences, finish, kill_runs, result_of, run_of, undisturbed
from lives import live, prepare

PICKLED = (".pt", ".pth", ".bin", ".metadata", ".distcp")
NEWEST = "checkpoint-5"  # of a run that is done


# ---- Dead at a write -------------------------------------------------------------------------------------------------


def writes(folder: Path, variant: str, every: str = "1") -> dict:
    """A run of one process that dies at every so-many-th write to its output folder, and is started again."""
    expected, _ = undisturbed("plain", variant, folder)
    counted = {**run_of("plain", variant, "counted"), "count_writes": True}
    finish(counted, folder)
    listed = json.loads((folder / counted["name"] / "writes.json").read_text())
    found = []
    for number in range(0, len(listed), int(every)):
        run = run_of("plain", variant, f"write-{number}")
        died = live({**run, "die_at_write": number}, folder).exit_codes == [-9]
        finish(run, folder)
        wrong = differences(result_of(run, folder), expected)
        found.append({"write": listed[number], "died": died, "differences": wrong})
        shutil.rmtree(folder / run["name"])
    return {"writes": listed, "found": found}


# ---- Damaged ---------------------------------------------------------------------------------------------------------


def damaged(folder: Path, engine: str, *only: str) -> dict:
    """For files of the newest checkpoint that one process alone writes (of `only`, those that end so): what a run says
    that resumes with the file missing, how many steps it takes, and whether it ends like an undisturbed one."""
    expected, _ = undisturbed(engine, "lora", folder)
    whole = folder / run_of(engine, "lora", "whole")["name"] / "output"
    newest = whole / NEWEST
    names = [path.relative_to(newest).as_posix() for path in sorted(newest.rglob("*"))]
    marks = ("rank_1_", "rng_state_1.", "__1_", "scheduler.pt")
    found = {}
    for name in names:
        if not any(mark in name for mark in marks) or (only and not name.endswith(only)):
            continue
        run = {**run_of(engine, "lora", "damaged"), "resume": True}
        place = folder / run["name"]
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place / "output")
        (place / "output" / NEWEST / name).unlink()
        finish(run, folder)
        facts = json.loads((place / "facts.json").read_text())
        found[name] = {
            "said": (place / "log0.txt").read_text(),
            "steps_taken": facts["steps_taken"],
            "differences": differences(result_of(run, folder), expected),
        }
    return found


# ---- Planted ---------------------------------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def plant(file: Path, mark: Path) -> None:
    """Have a file of a checkpoint run code when it is unpickled, and be otherwise what it was."""
    if file.name.endswith(".metadata"):
        with open(file, "rb") as stream:
            content = pickle.load(stream)
        content.planner_data = Payload(mark)
        file.write_bytes(pickle.dumps(content))
    elif file.suffix == ".distcp":  # several small files of `torch.save` behind one another; the first gets a payload
        content = file.read_bytes()
        file.write_bytes(_with_payload_in_every_pickle(content, mark))
    else:
        content = torch.load(file, weights_only=False)
        torch.save({**content, "planted": Payload(mark)}, file)


def _with_payload_in_every_pickle(content: bytes, mark: Path) -> bytes:
    """The stored items of a distributed checkpoint, those that are no tensors replaced by a payload of equal length."""
    place, out = 0, b""
    while place < len(content):
        end = content.index(b"PK\x05\x06", place) + 22
        item = content[place:end]
        buffer = io.BytesIO()
        torch.save(Payload(mark), buffer)
        is_small = len(zipfile.ZipFile(io.BytesIO(item)).namelist()) < 8 and len(buffer.getvalue()) <= len(item)
        out += buffer.getvalue().ljust(len(item), b"\0") if is_small else item
        place = end
    return out


def planted(folder: Path, engine: str, *only: str) -> dict:
    """For each file of a checkpoint that can hold a pickle: what a run says that resumes from it, and whether the
    payload ran; and whether an untouched checkpoint resumes, and what the payload does to a run that trusts it. Of
    `only` the files that end so, and nothing beside, if there are any."""
    whole = folder / run_of(engine, "lora", "planted-whole")["name"]
    writer = {**run_of(engine, "lora", "planted-whole"), "args": {"max_steps": 2}}
    finish(writer, folder)
    checkpoint = whole / "output" / "checkpoint-2"
    files = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if holds_pickle(path)]
    if only:
        names = [name for name in files if name.endswith(only)]
        return {name: _resume(folder, engine, checkpoint, name) for name in names}
    found = {name: _resume(folder, engine, checkpoint, name) for name in files}
    found["untouched"] = _resume(folder, engine, checkpoint, None)
    trusted = next((name for name in files if "states" in name or "optimizer" in name), files[0])
    found["trusted"] = _resume(folder, engine, checkpoint, trusted, trust_checkpoint=True)
    return found


def holds_pickle(path: Path) -> bool:
    return path.is_file() and path.name.endswith(PICKLED)


def _resume(folder: Path, engine: str, checkpoint: Path, name: str | None, **args) -> dict:
    run = run_of(engine, "lora", "planted")
    place, mark = folder / run["name"], folder / "mark"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(checkpoint, place / "output" / "checkpoint-2")
    if name is not None:
        plant(place / "output" / "checkpoint-2" / name, mark)
        (place / "output" / "checkpoint-2" / "checkpoint_manifest.json").unlink()  # as a stranger would forge it
    life = live({**run, "resume": True, "args": {"max_steps": 3, **args}}, folder)
    logs = [path.read_text() for path in sorted(place.glob("log*.txt"))]
    ran = mark.is_dir()
    if ran:
        mark.rmdir()
    return {"done": life.done, "ran": ran, "said": logs}


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
