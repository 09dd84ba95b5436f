"""Images and distinct prompts that are encoded in a second: by the networks alone, by batch size, and into a cache.

Seconds are of CPU time on one thread, or of the wall on CUDA. Those of a cache are the seconds of a trainer's set-up
that encodes, less those of one that finds all encoded: decoding, checksums and files are included. Images are not
mirrored. The images of the pairs whose prompts are timed are encoded before, by a trainer that is not timed.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset
from matplotlib import pyplot as plt
from proportions import Proportions
from random_pipeline import random_pairs
from safeguard_overhead import environment
from step_time import LATENTS, arguments_of, name_files, size_of
from tqdm.auto import tqdm
from turns import now

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.families import find_family

KINDS = ("images", "prompts")
BATCHES = {"images": (1, 2, 4, 8, 16), "prompts": (1, 4, 16, 64)}
SMALLEST_BATCHES = {"images": (1, 2), "prompts": (1, 4)}
QUICK_BATCHES = {"images": (1, 2, 4), "prompts": (1, 4, 16)}
QUICK_IMAGES = 8
PIXELS_BESIDE_PROMPTS = 16  # side of the images in the rows whose prompts are timed


def cached_rate(kind: str, size: Proportions, options: argparse.Namespace, folder: Path) -> float:
    """Of encoding into a cache, at the batch sizes that it chooses."""
    count = options.images if kind == "images" else 8 * options.images
    # The first trainer of a process imports what others find, and is not counted. For images it encodes one row
    # elsewhere; for prompts it encodes the images of all rows, of which the cache has one copy for each row.
    if kind == "images":
        pairs = [{**pair, "prompt": "one"} for pair in random_pairs(count // 2, size.pixels)]
        first, folder_of_first = pairs[:1], "images, not counted"
    else:
        size = replace(size, pixels=PIXELS_BESIDE_PROMPTS)
        pair = random_pairs(1, size.pixels)[0]
        pairs = [{**pair, "prompt": f"number {number}"} for number in range(count)]
        first, folder_of_first = [{**pair, "prompt": "one"} for _ in range(count)], kind
    seconds = []
    for rows, name in ((first, folder_of_first), (pairs, kind), (pairs, kind)):
        data = Dataset.from_list(rows)
        args = arguments_of(LATENTS | {"random_flip": False}, size, options, folder / name)
        pipeline, began = size.build(), now(options.device)
        DiffusionSDPOTrainer(pipeline, None, args, data)
        seconds.append(now(options.device) - began)
    return count / (seconds[1] - seconds[2])


def batches_of(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Batch sizes of the networks alone, by kind."""
    return SMALLEST_BATCHES if options.smallest else QUICK_BATCHES if options.quick else BATCHES


@torch.no_grad()
def bare_rates(size: Proportions, options: argparse.Namespace, bar: tqdm) -> dict[str, dict[int, float]]:
    """Of VAE and text encoder alone, by batch size; the median of some calls after a first one."""
    family = find_family(size.build().to(options.device))
    rates: dict[str, dict[int, float]] = {}
    for kind in KINDS:
        for batch in batches_of(options)[kind]:
            call = encoding_call(kind, batch, family, size)
            call()
            seconds = []
            for _ in range(options.rounds):
                began = now(options.device)
                call()
                seconds.append(now(options.device) - began)
            rates.setdefault(kind, {})[batch] = batch / statistics.median(seconds)
            bar.update()
    return rates


def encoding_call(kind: str, batch: int, family: Any, size: Proportions) -> Callable[[], Any]:
    if kind == "prompts":
        return lambda: family.encode_prompts([f"number {number}" for number in range(batch)])
    pixels = torch.rand(batch, 3, size.pixels, size.pixels, device=family.pipeline.vae.device) * 2 - 1
    return lambda: family.image_moments(pixels)


def plot(bare: dict[str, dict[int, float]], cached: dict[str, float], file: Path) -> None:
    """Rates by batch size, and a line for the cache."""
    matplotlib.use("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(panels, KINDS, strict=True):
        network = {"images": "VAE", "prompts": "text encoder"}[kind]
        axes.plot(list(bare[kind]), list(bare[kind].values()), "o-", label=f"{network} alone")
        axes.axhline(cached[kind], color="tab:red", linestyle="--", label="into a cache")
        axes.set(xscale="log", xlabel="batch size", ylabel=f"{kind} a second")
        axes.set_xticks(list(bare[kind]), [str(batch) for batch in bare[kind]])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def table(bare: dict[str, dict[int, float]], cached: dict[str, float]) -> str:
    lines = ["| what | batch | a second |", "|---|---|---|"]
    for kind in KINDS:
        lines += [f"| {kind} | {batch} | {rate:.2f} |" for batch, rate in bare[kind].items()]
        lines.append(f"| {kind} | into a cache | {cached[kind]:.2f} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", choices=["sd15", "sdxl"], default="sd15", help="the small pipeline's shape")
    parser.add_argument("--images", type=int, help="encoded into a cache; eight times as many prompts (default: 32)")
    parser.add_argument("--rounds", type=int, help="timed calls of each batch size (default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--smallest", action="store_true", help="networks so small that the rates mean nothing")
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer images, one round")
    parser.add_argument("--output", type=Path, help="file for all numbers (default: in bench_output)")
    parser.add_argument("--plot", type=Path, help="file for the plot (default: in bench_output)")
    options = parser.parse_args(arguments)
    options.images = options.images or (QUICK_IMAGES if options.quick else 32)
    options.rounds = options.rounds or (1 if options.quick else 3)
    name_files(options, "encode_throughput")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    size = size_of(options.published, "full", options)
    total = sum(map(len, batches_of(options).values())) + len(KINDS)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="measurement") as bar:
        bare, cached = bare_rates(size, options, bar), {}
        for kind in KINDS:
            cached[kind] = cached_rate(kind, size, options, Path(folder))
            bar.update()
    report = {"environment": environment(options), "published": options.published, "bare": bare, "cached": cached}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(bare, cached, options.plot)
    print(table(bare, cached))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
