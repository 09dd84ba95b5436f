"""The front of reward and damage: what rules for the loser's gradient gain, and what they cost the winners.

Every run tunes the demo's model of the embedded world with the public trainer, and is measured with raw and averaged
weights: the oracle's score of generated images, and the change of the winners' and losers' errors on held-out pairs,
over all noise levels and in each noise bin. Prompts and held-out pairs come in two parts: rules and strengths are
chosen on one, and reported on the other.

Runs are rows of a JSON-lines file. A second call makes the missing ones, in several processes.

    python benchmarks/front.py run --plan front --workers 2
    python benchmarks/front.py report
"""

import argparse
import json
import multiprocessing
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from diffusers.utils.torch_utils import randn_tensor
from front_plan import (
    HELD_OUT_COPIES,
    HELD_OUT_SEED,
    HOW,
    LORA_RANK,
    NUM_NOISE_BINS,
    PARTS,
    PROBE_SEED,
    SAMPLES_PER_PROMPT,
    SCORE_SEED,
    SETTINGS,
    SHARED,
    STEPS,
    Run,
    plans,
)
from front_report import report, rows_of
from front_trainers import TriedTrainer
from peft import LoraConfig
from transformers import PrinterCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.demo.oracle import oracle_score
from trl_diffusion_sdpo.demo.pairs import eval_pairs, off_policy_pairs, on_policy_pairs
from trl_diffusion_sdpo.demo.pipeline import LATENT_SHAPE, generate_images, load_base_pipeline
from trl_diffusion_sdpo.demo.world import captions


def parts_of_prompts() -> dict[str, list[str]]:
    """The prompts of each part, alternately."""
    texts = [caption.text for caption in captions()]
    return {"selection": texts[::2], "final": texts[1::2]}


def held_out(seed: int, *, smallest: bool) -> dict[str, Dataset]:
    """Held-out pairs of each part's prompts, repeated `HELD_OUT_COPIES` times."""
    pairs = eval_pairs(seed + HELD_OUT_SEED, per_prompt=1 if smallest else 4)
    found = {}
    for part, prompts in parts_of_prompts().items():
        rows = [row for row, prompt in enumerate(pairs["prompt"]) if prompt in set(prompts)]
        found[part] = concatenate_datasets([pairs.select(rows)] * (1 if smallest else HELD_OUT_COPIES))
    return found


def oracle_mean(pipeline: Any, part: str, seed: int, *, smallest: bool) -> float:
    """The oracle's mean score of images for a part's prompts, from the same latents for every run of a seed."""
    prompts = [prompt for prompt in parts_of_prompts()[part] for _ in range(1 if smallest else SAMPLES_PER_PROMPT)]
    generator = torch.Generator().manual_seed(SCORE_SEED + seed)
    latents = randn_tensor((len(prompts), *LATENT_SHAPE), generator)
    with torch.no_grad():
        return float(np.mean(oracle_score(generate_images(pipeline, prompts, latents), prompts)))


def make(run: Run) -> dict[str, Any]:
    """Train, and measure both parts with raw and averaged weights."""
    started = time.monotonic()
    pipeline = load_base_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(run, pipeline, folder)
        trainer.train()
        log, seconds = trainer.state.log_history, time.monotonic() - started
        row: dict[str, Any] = {**asdict(run), "key": run.key, "how": HOW, "seconds": seconds, "measured": {}}
        row["scale"] = [entry["safeguard/scale"] for entry in log if "safeguard/scale" in entry]
        row["budget"] = [entry["budget/scale"] for entry in log if "budget/scale" in entry]
        for part, pairs in held_out(run.seed, smallest=run.push == "smallest").items():
            row["measured"][part] = measure(run, trainer, pipeline, part, pairs)
    return row


def build_trainer(run: Run, pipeline: Any, folder: str, *, reference: Any = None) -> TriedTrainer:
    train = off_policy_pairs(run.seed) if run.pairs == "off_policy" else on_policy_pairs(pipeline, run.seed)
    args = DiffusionSDPOConfig(
        output_dir=folder,
        seed=run.seed,
        use_cpu=True,
        per_device_eval_batch_size=64,
        save_strategy="no",
        logging_steps=0.2,  # of all steps
        report_to="none",
        disable_tqdm=True,
        verify_images="none",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        **{"max_steps": STEPS[run.push], **SHARED, **SETTINGS[run.push], **run.settings},
    )
    probe = eval_pairs(run.seed + PROBE_SEED, per_prompt=1)  # of a budget: other pairs, of all prompts
    if reference is None and args.loss_type == "sft":  # it needs none; with the base, the errors' changes are measured
        reference = load_base_pipeline()
    adapter = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK) if run.push == "lora" else None
    trainer = TriedTrainer(pipeline, reference, args, train, probe, peft_config=adapter, **run.tried)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(run: Run, trainer: TriedTrainer, pipeline: Any, part: str, pairs: Dataset) -> dict[str, dict[str, Any]]:
    """One part, with raw and averaged weights."""
    smallest = run.push == "smallest"
    metrics = trainer.evaluate(pairs)
    scores = {"raw": oracle_mean(pipeline, part, run.seed, smallest=smallest)}
    with trainer.average.active(trainer.model):  # switches an averaged adapter on
        averaged = pipeline
        if run.push != "lora":
            averaged = load_base_pipeline()
            averaged.register_modules(unet=trainer.average.second.module)
        scores["ema"] = oracle_mean(averaged, part, run.seed, smallest=smallest)
    return {
        weights: {"oracle": scores[weights], **changes(metrics, prefix)}
        for weights, prefix in (("raw", "eval"), ("ema", "eval_ema"))
    }


def changes(metrics: dict[str, float], prefix: str) -> dict[str, Any]:
    """Changes of the errors in an evaluation, absolute, and by noise bin relative to the reference's error."""
    found: dict[str, Any] = {"winner": metrics[f"{prefix}_errors/winner_change"]}
    found["loser"] = metrics[f"{prefix}_errors/loser_change"]
    for name in ("winner", "loser"):
        found[f"{name}_levels"] = [
            metrics.get(f"{prefix}_errors/{name}_change_relative@{noise_bin}") for noise_bin in range(NUM_NOISE_BINS)
        ]
    return found


# ---- Many runs ----------------------------------------------------------------------------------------------------


def ends_with_newline(file: Path) -> bool:
    """Whether a file is empty or ends with a complete line."""
    return not file.stat().st_size or file.read_bytes().endswith(b"\n")


def work(run: Run) -> dict[str, Any]:
    """A run's row, or its error, so that the others continue."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        return make(run)
    except Exception as error:
        return {"key": run.key, "error": f"{type(error).__name__}: {error}"}


def make_all(runs: list[Run], file: Path, workers: int) -> None:
    """Make the runs that the file lacks, and append each row when it is finished."""
    file.parent.mkdir(parents=True, exist_ok=True)
    there = rows_of(file)
    missing = [run for run in runs if not run.is_made(there.get(run.key))]
    print(f"{len(runs)} runs, {len(missing)} to make", flush=True)
    started, failed = time.monotonic(), []
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=20) as pool:
        for done, row in enumerate(pool.imap_unordered(work, missing), 1):
            if "error" in row:
                failed.append(row["key"])
                print(f"{done}/{len(missing)} {row['key']} FAILED: {row['error']}", flush=True)
                continue
            with file.open("a", encoding="utf-8") as out:
                out.write(("" if ends_with_newline(file) else "\n") + json.dumps(row) + "\n")
            raw = row["measured"]["selection"]["raw"]
            passed = time.monotonic() - started
            print(
                f"{done}/{len(missing)} {row['key']}: oracle {raw['oracle']:.3f}, winner {raw['winner']:+.4f}, "
                f"{passed / done * (len(missing) - done) / 60:.0f} min to go",
                flush=True,
            )
    if failed:
        raise SystemExit(f"{len(failed)} of {len(missing)} runs failed and have no row: {', '.join(failed)}.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--plan", choices=plans(), default="front", help="which runs to make")
    parser.add_argument("--file", type=Path, default=Path("bench_output/front.jsonl"), help="file of the rows")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--part", choices=PARTS, default="selection", help="part of the report")
    parser.add_argument("--folder", type=Path, default=Path("bench_output"), help="folder of the plots")
    options = parser.parse_args(arguments)
    if options.command == "run":
        make_all(plans()[options.plan], options.file, options.workers)
    else:
        report(options.file, options.part, options.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
