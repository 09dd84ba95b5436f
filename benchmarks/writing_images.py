"""Measure what it costs `evaluate` and `pairs generate` to write images: in the loop that draws them, or in a thread
beside it, with Pillow's usual compression or with level 1.

A drawing GPU is imitated by waiting. Ways take turns in random order. Wall time is what an image takes beyond drawing,
CPU time that of the process.
"""

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from safeguard_overhead import environment
from tqdm.auto import tqdm

from trl_diffusion_sdpo.tools.evaluation import images
from trl_diffusion_sdpo.utils.files import write_atomically

USUAL_LEVEL = 6  # of compression, in Pillow
WAYS = {  # (compression, whether a thread writes)
    "level 6, in the loop": (USUAL_LEVEL, False),
    "level 1, in the loop": (images.PNG_LEVEL, False),
    "level 1, in a thread": (images.PNG_LEVEL, True),
}
BEFORE = next(iter(WAYS))


@contextlib.contextmanager
def writing_in_the_loop():
    def write(batch: Sequence[images.ImageToWrite]) -> None:
        for path, *image in batch:
            write_atomically(path, images.png_bytes(*image))

    yield write


def measure(way: str, drawn: Sequence[Image.Image], folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Draw and write batches, and return wall and CPU seconds per image, and its bytes."""
    level, in_thread = WAYS[way]
    images.PNG_LEVEL = level
    count = options.batches * len(drawn)
    wall, cpu = time.perf_counter(), time.process_time()
    with images.writing_images() if in_thread else writing_in_the_loop() as write:
        for batch in range(options.batches):
            time.sleep(options.draw * len(drawn))
            write([(folder / f"{batch}-{i}.png", image, "a prompt", i) for i, image in enumerate(drawn)])
    return {
        "wall": (time.perf_counter() - wall) / count - options.draw,
        "cpu": (time.process_time() - cpu) / count,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()) / count,
    }


def random_image(side: int, seed: int) -> Image.Image:
    """Return an image with soft edges and some grain, which compresses about as a photograph does."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (side // 32, side // 32, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST).filter(ImageFilter.GaussianBlur(8))
    noisy = np.asarray(smooth).astype(np.int16) + generator.integers(-4, 5, (side, side, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for way in WAYS:
        measured = {name: [one[way][name] for one in rounds] for name in ("wall", "cpu", "bytes")}
        ratios = [one[way]["cpu"] / one[BEFORE]["cpu"] for one in rounds]
        rows.append({"way": way, **measured, "cpu_ratio": quartiles(ratios)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| An image | wall, ms | CPU, ms | CPU, ratio (quartiles) | MB |", "|---|---|---|---|---|"]
    for row in rows:
        wall, cpu, size = (statistics.median(row[name]) for name in ("wall", "cpu", "bytes"))
        low, middle, high = row["cpu_ratio"]
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {row['way']} | {1000 * wall:.0f} | {1000 * cpu:.0f} | {ratio} | {size / 1e6:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024, help="of the images, in pixels")
    parser.add_argument("--draw", type=float, default=0.5, help="seconds that drawing an image takes")
    parser.add_argument("--batch", type=int, default=4, help="images that are drawn at once")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/writing_images.json"))
    options = parser.parse_args(arguments)
    shuffled = random.Random(0)
    drawn = [random_image(options.side, seed) for seed in range(options.batch)]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(options.rounds), unit="round"):
            turns = shuffled.sample(list(WAYS), len(WAYS))
            rounds.append({way: measure(way, drawn, Path(folder), options) for way in turns})
    rows = summary(rounds)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    options.device = "cpu"
    report = {"settings": settings, "environment": environment(options), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
