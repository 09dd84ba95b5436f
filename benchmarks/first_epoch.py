"""Measure what a first epoch with a latent cache costs: CPU time of a run of one epoch, and the cache on the disk.

Three runs take turns in random order, each with an empty cache: without a cache; with one, which encodes the flips that
the epoch draws; and with one that encodes every image plain and mirrored, as runs of many epochs do. The model and the
pairs are those of the demo. A ratio is a run's CPU time over that of the run without a cache in the same round.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.tools.demo.pairs import off_policy_pairs
from trl_diffusion_sdpo.tools.demo.pipeline import load_base_pipeline
from trl_diffusion_sdpo.trainer import components

RUNS = {"live": {}, "drawn": {"precompute_latents": True}, "all": {"precompute_latents": True}}
WARM_UP = 1  # rounds


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    pairs = off_policy_pairs(0, options.per_prompt)
    epochs = components.epochs_of_run
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    size = dict.fromkeys(RUNS, 0)
    for number in range(options.rounds + WARM_UP):
        for name in random.Random(number).sample(list(RUNS), len(RUNS)):
            components.epochs_of_run = every_flip if name == "all" else epochs
            taken, size[name] = one_epoch(pairs, RUNS[name])
            if number >= WARM_UP:
                seconds[name].append(taken)
    components.epochs_of_run = epochs
    ratios = {
        name: [one / live for one, live in zip(seconds[name], seconds["live"], strict=True)]
        for name in ("drawn", "all")
    }
    content = {"pairs": len(pairs), "torch": torch.__version__, "seconds": seconds, "ratios": ratios, "bytes": size}
    print(json.dumps({name: statistics.median(of) for name, of in ratios.items()}))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per_prompt", type=int, default=6, help="pairs for each of the 72 prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/first_epoch.json"))
    return parser.parse_args(arguments)


def every_flip(*_: Any) -> None:
    return None


def one_epoch(pairs: Any, settings: dict[str, Any]) -> tuple[float, int]:
    """Return the CPU seconds of a run of one epoch, from its trainer's construction, and the bytes of its cache."""
    pipeline = load_base_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        args = DiffusionSDPOConfig(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            resolution=32,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            precompute_dir=f"{folder}/cache",
            **settings,
        )
        began = time.process_time()
        trainer = DiffusionSDPOTrainer(pipeline, None, args, pairs)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        taken = time.process_time() - began
        files = (Path(folder) / "cache").rglob("*.safetensors")
        return taken, sum(file.stat().st_size for file in files if "latents" in file.parts)


if __name__ == "__main__":
    main()
