"""Train the arms of a plan on real pairs, compare them with the base, and write a table.

The work is a list of pieces: the training of each arm and seed, its errors on held-out pairs, and the images and scores
of all models. Each call does the pieces that are missing, until its minutes are over: a training then saves a
checkpoint and stops, as after Ctrl-C, and the next call resumes it. A killed call loses the steps since the last
checkpoint, and nothing else. The exit code is 0 when all pieces are done, and 130 if another call must go on.

    python benchmarks/real_run.py benchmarks/real_run.yaml
    python benchmarks/real_run.py benchmarks/real_run.yaml --minutes 10
    python benchmarks/real_run.py benchmarks/real_run.yaml --set '{"seeds": [0], "train": {"max_steps": 200}}'
"""

import argparse
import gc
import json
import shutil
import signal
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from constant_lambda import constant_lambda
from gpu_meter import Memory, SpeedLog
from tqdm.auto import tqdm

from trl_diffusion_sdpo import Candidate, DiffusionSDPOConfig, DiffusionSDPOTrainer, UserError, evaluate_models
from trl_diffusion_sdpo.cli import EXIT_INTERRUPTED, EXIT_OK
from trl_diffusion_sdpo.cli.images import load_scorers, mapping_option
from trl_diffusion_sdpo.data.holdout import hold_out
from trl_diffusion_sdpo.data.loading import load_pairs
from trl_diffusion_sdpo.saving.checkpoints import checkpoints_in
from trl_diffusion_sdpo.step.pair_forward import PairForward
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings
from trl_diffusion_sdpo.utils.files import write_atomically
from trl_diffusion_sdpo.utils.identity import plain
from trl_diffusion_sdpo.utils.statistics import win_rate

KEYS = {"output_dir", "device", "model", "data", "seeds", "train", "arms", "evaluate"}
BASE = "base"


def load_plan(file: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Read a plan and change it. `None` in place of an arm takes it out.

    Raises:
        `UserError`: If the plan has other fields than `KEYS`, or needs a GPU and there is none.
    """
    plan = changed(yaml.safe_load(file.read_text(encoding="utf-8")), changes)
    if set(plan) != KEYS:
        raise UserError(f"A plan must have the fields {sorted(KEYS)}, and no others, got {sorted(plan)}.")
    if plan["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("The plan needs a GPU, and this Python's torch sees none. `device: cpu` tests the program.")
    return {**plan, "arms": {arm: settings for arm, settings in plan["arms"].items() if settings is not None}}


def changed(plan: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping in which `changes` replace values; mappings within it are changed in the same way."""
    both = {key for key in changes if isinstance(changes[key], dict) and isinstance(plan.get(key), dict)}
    return {**plan, **{key: changed(plan[key], changes[key]) if key in both else changes[key] for key in changes}}


class RealRun:
    """The pieces of a plan, and what they have written into its folder.

    Raises:
        `UserError`: If the folder has pieces of another plan. Only the seeds may differ.
    """

    def __init__(self, plan: dict[str, Any]):
        self.plan = plan
        self.folder = Path(plan["output_dir"])
        self.memory = Memory(plan["device"])
        record = self.folder / "plan.json"
        facts = plain({key: plan[key] for key in sorted(KEYS - {"output_dir", "seeds"})})
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != facts:
            raise UserError(
                f"{self.folder} must be of one plan, and {record} is of another. Use another `output_dir`."
            )
        (self.folder / "pieces").mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(facts, indent=1).encode() + b"\n")
        data = plan["data"]
        rows = load_pairs(data["name"], data["split"])
        [(self.pairs, self.held_out)] = hold_out([rows], data["held_out"], seed=data["seed"], formats=[None])

    def pieces(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Return a function for each piece, in order. All arms are trained with a seed and compared, then the next."""
        found: dict[str, Callable[[], dict[str, Any]]] = {}
        for number, seed in enumerate(self.plan["seeds"], 1):
            for arm in self.plan["arms"]:
                found[f"train {arm}-{seed}"] = partial(self.train, arm, seed)
                found[f"errors {arm}-{seed}"] = partial(self.errors, arm, seed)
            seeds = self.plan["seeds"][:number]
            found[f"scores {seeds}"] = partial(self.scores, seeds)
        return found

    def result(self, piece: str) -> dict[str, Any] | None:
        """Return the result of a piece, or `None` if it is not finished."""
        file = self.folder / "pieces" / f"{piece}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def make(self, piece: str) -> None:
        """Make a piece and keep its result."""
        result = json.dumps(plain(self.pieces()[piece]()), indent=1)
        write_atomically(self.folder / "pieces" / f"{piece}.json", result.encode() + b"\n")
        gc.collect()  # trainers are cycles, and their memory would count in the peaks of the next piece
        if self.plan["device"] == "cuda":
            torch.cuda.empty_cache()

    def arguments(self, folder: Path, **settings: Any) -> DiffusionSDPOConfig:
        fixed = {
            "use_cpu": self.plan["device"] == "cpu",
            "precompute_dir": str(self.folder / "encoded"),
            "verify_images": "none",  # encoding opens every image
            "report_to": "none",
        }
        return DiffusionSDPOConfig(str(folder), **{**fixed, **self.plan["train"], **settings})

    def run_folder(self, arm: str, seed: int) -> Path:
        return self.folder / "runs" / f"{arm}-{seed}"

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm, or go on with it, and save its weights and model card."""
        settings = dict(self.plan["arms"][arm])
        share = settings.pop("constant_lambda", None)

        class Trainer(DiffusionSDPOTrainer):
            _name = DiffusionSDPOTrainer._name if share is None else f"Diffusion-DPO, losers times {share:g}"
            pair_forward_class = PairForward if share is None else constant_lambda(share)

        speed = SpeedLog(self.memory, self.folder / "speed" / f"{arm}-{seed}.jsonl")
        args = self.arguments(self.run_folder(arm, seed), seed=seed, overwrite_output_dir=True, **settings)
        trainer = Trainer(self.plan["model"], None, args, self.pairs, self.held_out, callbacks=[speed])
        trainer.dataset_name = self.plan["data"]["name"]
        trainer.train(resume_from_checkpoint="latest")
        trainer.save_model()
        return {"steps": trainer.state.global_step, "verdict": str(trainer.verdict())}

    def errors(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the changes of the errors on held-out pairs against the base, at the same noise for all arms."""
        run = self.run_folder(arm, seed)
        for checkpoint in checkpoints_in(run):  # three times the weights; the training is finished
            shutil.rmtree(checkpoint)
        args = self.arguments(self.folder / "errors", seed=0, loss_type="sigmoid", safeguard="none")
        metrics = DiffusionSDPOTrainer(str(run), self.plan["model"], args, None, self.held_out).evaluate()
        return {key.removeprefix("eval_errors/"): value for key, value in metrics.items() if "eval_errors/" in key}

    def scores(self, seeds: list[int]) -> dict[str, Any]:
        """Draw and score the images of the base and of all arms, and compare each arm with the base."""
        runs = {arm: [self.run_folder(arm, seed) for seed in seeds] for arm in self.plan["arms"]}
        settings = {**self.plan["evaluate"]}
        scorers = load_scorers(settings.pop("scorers"), {})
        settings = {**settings, "dtype": getattr(torch, settings["dtype"]), "seeds": tuple(settings["seeds"])}
        evaluation = evaluate_models(
            [Candidate(BASE, self.plan["model"]), *(Candidate(run.name, str(run)) for run in chain(*runs.values()))],
            self.held_out["prompt"],
            scorers,
            self.folder / "evaluation",
            ImageSettings(device=self.plan["device"], **settings),
        )
        # Seeds of training stand side by side, as seeds of images do: the intervals are over prompts.
        return {
            arm: {
                name: asdict(win_rate(np.hstack([scores[run.name] for run in ours]), np.tile(scores[BASE], len(ours))))
                for name, scores in evaluation.scores.items()
            }
            for arm, ours in runs.items()
        }

    # ---- Report -----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Write what is finished into `results.json` and `results.md`, and return the table."""
        seeds = self.plan["seeds"]
        done = (self.result(f"scores {seeds[:number]}") for number in range(len(seeds), 0, -1))
        scores = next((found for found in done if found is not None), {})
        arms = {arm: {"scores": scores.get(arm, {}), **self.measured(arm)} for arm in self.plan["arms"]}
        scorers = list(dict.fromkeys(name for arm in arms.values() for name in arm["scores"]))
        columns = ["arm", "seeds", *scorers, "winners' error", "s a step", "peak GiB"]
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for arm, found in arms.items():
            cells = [arm, str(len(found["errors"]))]
            cells += [score_cell(found["scores"][name]) if name in found["scores"] else "" for name in scorers]
            cells.append(", ".join(map(error_cell, found["errors"].values())))
            cells += ["" if found[name] is None else f"{found[name]:.3g}" for name in ("seconds_per_step", "peak_gib")]
            lines.append(f"| {' | '.join(cells)} |")
        table = "\n".join(lines)
        facts = {"plan": self.plan, "arms": arms}
        write_atomically(self.folder / "results.json", json.dumps(facts, indent=1).encode() + b"\n")
        write_atomically(self.folder / "results.md", table.encode() + b"\n")
        return table

    def measured(self, arm: str) -> dict[str, Any]:
        """Return what the pieces of an arm measured, of all seeds together."""
        files = [self.folder / "speed" / f"{arm}-{seed}.jsonl" for seed in self.plan["seeds"]]
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        calls = [json.loads(line) for text in texts for line in text.splitlines()]
        seconds = [second for call in calls for second in call["seconds"][1:]]  # the first step warms up
        errors = {seed: self.result(f"errors {arm}-{seed}") for seed in self.plan["seeds"]}
        return {
            "errors": {seed: found for seed, found in errors.items() if found is not None},
            "seconds_per_step": statistics.median(seconds) if seconds else None,
            "peak_gib": max((call["peaks_gib"]["step"] for call in calls), default=None),
            "devices": sorted({call["device"] for call in calls}),
        }


def score_cell(found: dict[str, Any]) -> str:
    """Return the mean change of a score against the base with its 95 % interval, and the win rate."""
    low, high = found["change_low"], found["change_high"]
    interval = "" if low is None else f" ({low:+.3g} to {high:+.3g})"
    return f"{found['mean_change']:+.3g}{interval}, {found['rate']:.0%} won"


def error_cell(found: dict[str, Any]) -> str:
    """Return the relative change of the winners' error against the base, with its standard error."""
    stderr = found.get("winner_change_relative_stderr")
    return f"{found['winner_change_relative']:+.2%}" + ("" if stderr is None else f" ± {stderr:.2%}")


def run(work: RealRun) -> int:
    """Make the missing pieces, until Ctrl-C or the alarm of `--minutes`. Then print the table."""
    pieces = work.pieces()
    missing = [piece for piece in pieces if work.result(piece) is None]
    with tqdm(total=len(pieces), initial=len(pieces) - len(missing), unit="piece") as bar:
        try:
            for piece in missing:
                bar.set_description(piece)
                work.make(piece)
                bar.update()
        except KeyboardInterrupt:
            tqdm.write(f"Stopped in {piece!r}.")
    print(work.report())
    left = sum(work.result(piece) is None for piece in pieces)
    if left:
        print(f"{left} of {len(pieces)} pieces are left: call again.")
    return EXIT_INTERRUPTED if left else EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file")
    parser.add_argument("--set", type=mapping_option, default={}, metavar="JSON", help="changes of the plan")
    parser.add_argument("--minutes", type=float, help="stop after these minutes: in a training, after step and save")
    options = parser.parse_args(arguments)
    if options.minutes is not None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    try:
        return run(RealRun(load_plan(options.plan, options.set)))
    except UserError as error:
        parser.error(str(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    raise SystemExit(main())
