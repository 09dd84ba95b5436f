"""Kills runs at random moments, starts them again with `resume_from_checkpoint="latest"` until they are done, and looks
whether each ends where an undisturbed one ends, to the bit. A run that is done is started once more, which must change
nothing.

    python tests/kills/kill_runs.py --engine plain --kills 100 --output kills

What is done is kept in the output folder, and the same command goes on from there.
"""

import argparse
import collections
import json
import shutil
import sys
import time
from pathlib import Path

from lives import Kill, Life, live, prepare, stream
from safetensors.torch import load_file

ENGINES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")
KEPT = {
    "ema_decay": 0.5,
    "winner_budget": 1e-4,
    "winner_budget_pairs": 4,
    "winner_budget_steps": 1,
    "num_noise_bins": 3,
}
WORKERS = {"dataloader_num_workers": 2}
VARIANTS = {
    "lora": {"lora": True, "args": {}},
    "full-workers": {"lora": False, "args": WORKERS},
    "lora-kept-workers": {"lora": True, "args": {**KEPT, **WORKERS, "learning_rate": 0.5}},
    "full-kept": {"lora": False, "args": {**KEPT, "learning_rate": 0.03}},
}
RESULTS = ("", "unet/", "ema/", "ema/unet/")  # folders of the weights beside the checkpoints
KILLS_A_RUN = 3
SHARES = (0.1, 0.5, 0.4)  # of the kills, timed from the start, the begin of training, the begin of a checkpoint
BUILDING, SAVING = 1.0, 0.3  # seconds over which the first and the last of these are spread


def run_of(engine: str, variant: str, name: str) -> dict:
    return {"name": f"{engine}-{variant}-{name}", "engine": engine, "resume": "latest", **VARIANTS[variant]}


def result_of(run: dict, folder: Path) -> dict:
    """What a run that is done has left: its weights, its average's, and the losses that it logged."""
    output = folder / run["name"] / "output"
    files = [path for place in RESULTS for path in output.glob(f"{place}*.safetensors")]
    facts = json.loads((folder / run["name"] / "facts.json").read_text())
    weights = {str(path.relative_to(output)): load_file(path) for path in sorted(files)}
    return {"weights": weights, "step": facts["step"], "log": facts["log"]}


def differences(ours: dict, theirs: dict) -> list[str]:
    """Files, or logged steps, that are not equal to the bit."""
    found = [] if ours["weights"].keys() == theirs["weights"].keys() else ["files"]
    for name in ours["weights"].keys() & theirs["weights"].keys():
        first, second = ours["weights"][name], theirs["weights"][name]
        if first.keys() != second.keys() or any(not first[key].equal(second[key]) for key in first):
            found.append(name)
    return found + [name for name in ("step", "log") if ours[name] != theirs[name]]


def finish(run: dict, folder: Path) -> Life:
    life = live(run, folder)
    if not life.done:
        logs = "".join(path.read_text()[-3000:] for path in sorted((folder / run["name"]).glob("log*.txt")))
        raise SystemExit(f"{run['name']} ended with {life.exit_codes} although nobody killed it:\n{logs}")
    return life


def undisturbed(engine: str, variant: str, folder: Path) -> tuple[dict, float]:
    """The result of a run that nobody kills, and the seconds that its training takes."""
    run, facts = run_of(engine, variant, "whole"), folder / f"{engine}-{variant}-whole.json"
    if not facts.is_file():
        shutil.rmtree(folder / run["name"], ignore_errors=True)
        life = finish(run, folder)
        facts.write_text(json.dumps({"training_seconds": life.training_seconds}))
    return result_of(run, folder), json.loads(facts.read_text())["training_seconds"]


def disturbed(engine: str, variant: str, index: int, seed: int, folder: Path, kills: int) -> dict:
    """A run that is killed up to `kills` times, and what came of it."""
    expected, seconds = undisturbed(engine, variant, folder)
    run, draw = run_of(engine, variant, f"killed-{index}"), stream(seed, engine, variant, index)
    place = folder / run["name"]
    shutil.rmtree(place, ignore_errors=True)
    killed: list[dict] = []
    while len(killed) < kills:
        (phase,) = draw.choices(range(3), SHARES)
        process = 0 if engine == "plain" else draw.randrange(2)
        life = live(run, folder, Kill(process, draw.uniform(0, (BUILDING, seconds, SAVING)[phase]), phase))
        if life.killed:
            killed.append(life.killed)
        elif life.done:
            break
        else:
            return {"kills": killed, "differences": [f"a life ended with {life.exit_codes}"]}
    finish(run, folder)
    found = differences(result_of(run, folder), expected)
    finish(run, folder)
    found += [f"{name} after it was done" for name in differences(result_of(run, folder), expected)]
    facts = json.loads((place / "facts.json").read_text())
    found += [f"{facts['steps_taken']} steps after it was done"] if facts["steps_taken"] else []
    if not found:
        shutil.rmtree(place)
    return {"kills": killed, "differences": found}


def kill_runs(engine: str, kills: int, seed: int, folder: Path, seconds: float) -> list[dict]:
    """Runs, each of the variants in turn, until there were so many kills or the time is over."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    kept, began = folder / f"{engine}-{seed}.jsonl", time.monotonic()
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    while (count := sum(len(entry["kills"]) for entry in done)) < kills and time.monotonic() - began < seconds:
        index = len(done)
        variant = list(VARIANTS)[index % len(VARIANTS)]
        found = disturbed(engine, variant, index, seed, folder, min(KILLS_A_RUN, kills - count))
        done.append({"engine": engine, "variant": variant, "index": index, **found})
        with open(kept, "a", encoding="utf-8") as stream_:
            stream_.write(json.dumps(done[-1]) + "\n")
        print(f"{engine} {variant}: {len(found['kills'])} kills, {found['differences'] or 'equal'}", flush=True)
    return done


def table(entries: list[dict]) -> str:
    """A row for each engine and variant: runs, kills, in which phase, and how many runs ended elsewhere."""
    rows = collections.defaultdict(list)
    for entry in entries:
        rows[entry["engine"], entry["variant"]].append(entry)
    head = ["Engine", "Run", "Runs", "Kills", "building", "training", "saving", "Unequal"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (engine, variant), of in rows.items():
        phases = collections.Counter(kill["phase"].split()[0] for entry in of for kill in entry["kills"])
        numbers = [len(of), sum(phases.values()), *(phases[name] for name in ("building", "training", "saving"))]
        unequal = sum(bool(entry["differences"]) for entry in of)
        lines.append(f"| {engine} | {variant} | {' | '.join(map(str, numbers))} | {unequal} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", nargs="+", default=["plain"], choices=ENGINES, help="plain is one process")
    parser.add_argument("--kills", type=int, default=100, help="of each engine, over all its runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for each engine; what is left goes on later"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder, kept for the next call")
    options = parser.parse_args()
    folder = options.output.resolve()
    entries = [
        entry
        for engine in options.engine
        for entry in kill_runs(engine, options.kills, options.seed, folder, options.seconds)
    ]
    (folder / "table.md").write_text(table(entries) + "\n")
    print(table(entries))
    return int(any(entry["differences"] for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
