"""Kill runs at random times and restart them with `resume_from_checkpoint="latest"` until they are done. Their
results must equal those of an uninterrupted run to the bit, and starting a finished run again must change nothing.

    python tests/kills/random_kills.py --engine plain --kills 100 --output kills

Finished runs are recorded in the output folder: repeat the command to go on.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from attempts import Attempt, Kill, attempt, generator_of, prepare
from safetensors.torch import load_file

ENGINES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")
EMA_AND_BUDGET = {
    "ema_decay": 0.5,
    "winner_budget": 1e-4,
    "winner_budget_kwargs": {"pairs": 4, "steps": 1},
}
WORKERS = {"dataloader_num_workers": 2}
VARIANTS = {
    "lora": {"lora": True, "args": {}},
    "full-workers": {"lora": False, "args": WORKERS},
    "lora-ema-workers": {"lora": True, "args": {**EMA_AND_BUDGET, **WORKERS, "learning_rate": 0.5}},
    "full-ema": {"lora": False, "args": {**EMA_AND_BUDGET, "learning_rate": 0.03}},
}
RESULTS = ("", "unet/", "ema/", "ema/unet/")  # folders of the weights beside the checkpoints
KILLS_PER_RUN = 3
SHARES = (0.1, 0.5, 0.4)  # of the kills: after the start, after the begin of training, after that of a checkpoint
BUILDING, SAVING = 1.0, 0.3  # range in seconds of the first and the last of these


def run_of(engine: str, variant: str, name: str) -> dict:
    return {"name": f"{engine}-{variant}-{name}", "engine": engine, "resume": "latest", **VARIANTS[variant]}


def result_of(run: dict, folder: Path) -> dict:
    """Return the result of a finished run: its weights, averaged weights and logged losses."""
    output = folder / run["name"] / "output"
    files = [path for subfolder in RESULTS for path in output.glob(f"{subfolder}*.safetensors")]
    facts = json.loads((folder / run["name"] / "facts.json").read_text())
    weights = {str(path.relative_to(output)): load_file(path) for path in sorted(files)}
    return {"weights": weights, "step": facts["step"], "log": facts["log"]}


def differences(ours: dict, theirs: dict) -> list[str]:
    """Return the files, or `step` or `log`, that are not equal to the bit."""
    unequal = [] if ours["weights"].keys() == theirs["weights"].keys() else ["files"]
    for name in ours["weights"].keys() & theirs["weights"].keys():
        first, second = ours["weights"][name], theirs["weights"][name]
        if first.keys() != second.keys() or any(not first[key].equal(second[key]) for key in first):
            unequal.append(name)
    return unequal + [name for name in ("step", "log") if ours[name] != theirs[name]]


def finish(run: dict, folder: Path) -> Attempt:
    ended = attempt(run, folder)
    if not ended.done:
        logs = "".join(path.read_text()[-3000:] for path in sorted((folder / run["name"]).glob("log*.txt")))
        raise SystemExit(f"{run['name']} ended with {ended.exit_codes} without a kill:\n{logs}")
    return ended


def uninterrupted(engine: str, variant: str, folder: Path) -> tuple[dict, float]:
    """Return the result of a run without kills, and the seconds of its training."""
    run, facts = run_of(engine, variant, "uninterrupted"), folder / f"{engine}-{variant}-uninterrupted.json"
    if not facts.is_file():
        shutil.rmtree(folder / run["name"], ignore_errors=True)
        ended = finish(run, folder)
        facts.write_text(json.dumps({"training_seconds": ended.training_seconds}))
    return result_of(run, folder), json.loads(facts.read_text())["training_seconds"]


def interrupted(engine: str, variant: str, index: int, seed: int, folder: Path, kills: int) -> dict:
    """Kill a run up to `kills` times. Return the kills, and the differences of its result."""
    expected, seconds = uninterrupted(engine, variant, folder)
    run, generator = run_of(engine, variant, f"killed-{index}"), generator_of(seed, engine, variant, index)
    run_folder = folder / run["name"]
    shutil.rmtree(run_folder, ignore_errors=True)
    killed: list[dict] = []
    while len(killed) < kills:
        (phase,) = generator.choices(range(3), SHARES)
        process = 0 if engine == "plain" else generator.randrange(2)
        delay = generator.uniform(0, (BUILDING, seconds, SAVING)[phase])
        ended = attempt(run, folder, Kill(process, delay, phase))
        if ended.killed:
            killed.append(ended.killed)
        elif ended.done:
            break
        else:
            return {"kills": killed, "differences": [f"an attempt ended with {ended.exit_codes}"]}
    finish(run, folder)
    unequal = differences(result_of(run, folder), expected)
    finish(run, folder)
    unequal += [f"{name} after it was done" for name in differences(result_of(run, folder), expected)]
    facts = json.loads((run_folder / "facts.json").read_text())
    unequal += [f"{facts['steps_taken']} steps after it was done"] if facts["steps_taken"] else []
    if not unequal:
        shutil.rmtree(run_folder)
    return {"kills": killed, "differences": unequal}


def kill_runs(engine: str, kills: int, seed: int, folder: Path, seconds: float) -> list[dict]:
    """Kill runs of the variants in turn, until `kills` kills are reached or `seconds` have passed."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    record, began = folder / f"{engine}-{seed}.jsonl", time.monotonic()
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    while (count := sum(len(entry["kills"]) for entry in done)) < kills and time.monotonic() - began < seconds:
        index = len(done)
        variant = list(VARIANTS)[index % len(VARIANTS)]
        result = interrupted(engine, variant, index, seed, folder, min(KILLS_PER_RUN, kills - count))
        done.append({"engine": engine, "variant": variant, "index": index, **result})
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{engine} {variant}: {len(result['kills'])} kills, {result['differences'] or 'equal'}", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", nargs="+", default=["plain"], choices=ENGINES, help="plain is one process")
    parser.add_argument("--kills", type=int, default=100, help="number per engine, over all its runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="time limit per engine; a later call continues"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and their record")
    options = parser.parse_args()
    folder = options.output.resolve()
    entries = [
        entry
        for engine in options.engine
        for entry in kill_runs(engine, options.kills, options.seed, folder, options.seconds)
    ]
    print(f"{sum(len(entry['kills']) for entry in entries)} kills in {len(entries)} runs")
    return int(any(entry["differences"] for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
