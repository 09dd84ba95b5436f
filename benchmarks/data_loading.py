"""Measure whether data loading is fast enough: time and memory until the first step, and pairs per second.

Rows have the columns of Pick-a-Pic. They refer to a few JPEG files of real size, so that a million rows fit on a disk.
Rows are read in three ways, each in a new process: map-style, map-style again with the index that the first process has
kept, and as a stream. Time to the first step is from the construction of a trainer with a small random pipeline to the
end of its first step, in seconds of wall and of CPU time. Private memory is what a process shares with no other.

Decoding is compared with the transforms of usual scripts (decode, resize the shorter side, flip, crop). Both take
turns, and the CPU time of one thread is measured.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from PIL import Image, ImageFilter
from tqdm.auto import tqdm
from transformers import TrainerCallback

WAYS = ("map", "again", "stream")
CHUNK = 10_000  # rows per write
PROMPTS = 58_000  # as many as in Pick-a-Pic
FILES = 16
SIDE_OF_A_STEP = 16  # image side in pixels; small, so that the step itself takes little time
FLAT = 1.1  # allowed growth of start-up memory, from the fewest to the most rows


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.measure:
        print(json.dumps(first_step(Path(options.measure), options.way)))
        return
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        files = write_images(Path(folder), options.side)
        started = [row for rows in options.rows for row in start_up(Path(folder), rows, files, options)]
        decoding = decode_in_turns(files, options)
        loading = [load(Path(folder), files, workers, options) for workers in tqdm(options.workers, desc="Workers")]
    for row in started:
        fewest = next(other for other in started if other["way"] == row["way"])
        row["ratio"] = row["rss"] / fewest["rss"]
        row["trainer_ratio"] = (row["rss"] - row["opened"]) / (fewest["rss"] - fewest["opened"])
    print(table(started, decoding, loading))
    names = ("rows", "side", "resolution", "workers", "pairs", "rounds")
    settings = {name: str(getattr(options, name)) for name in names}
    content = {"settings": settings, "start_up": started, "decoding": decoding, "loading": loading}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 10_000, 100_000, 1_000_000])
    parser.add_argument("--side", type=int, default=768, help="shorter side of the JPEG files, in pixels")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--pairs", type=int, default=256, help="pairs that are loaded with each number of workers")
    parser.add_argument("--rounds", type=int, default=24, help="pairs that are decoded in turns")
    parser.add_argument("--quick", action="store_true", help="the smallest form, in seconds")
    parser.add_argument("--folder", type=Path, help="where the rows are written; a temporary folder if unset")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data_loading.json"))
    # used by the child process, which measures one way to read rows
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.workers, options.side, options.resolution = [100, 3000], [0, 1], 64, 32
        options.pairs, options.rounds = 16, 4
    options.rows = sorted(options.rows)
    return options


# ---- Rows -----------------------------------------------------------------------------------------------------------


def write_images(folder: Path, side: int) -> list[str]:
    """Write random images with soft edges and some noise, in portrait or square format."""
    generator, files = np.random.default_rng(0), []
    for number in range(FILES):
        size = (side, side * (3 + number % 2) // 3)
        coarse = generator.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).filter(ImageFilter.GaussianBlur(2))
        noisy = np.asarray(image).astype(np.int16) + generator.integers(-6, 7, (size[1], size[0], 1))
        file = folder / f"{number}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
        files.append(str(file))
    return files


def write_rows(file: Path, count: int, files: list[str]) -> None:
    generator = np.random.default_rng(1)
    names = pa.array(files)
    with ArrowWriter(path=str(file)) as writer:
        for start in tqdm(range(0, count, CHUNK), desc=f"Writing {count} rows", leave=False):
            size = min(CHUNK, count - start)
            first, gap = generator.integers(0, len(files), size), generator.integers(1, len(files), size)
            label = generator.choice([0.0, 0.5, 1.0], size, p=[0.44, 0.12, 0.44])
            columns = {
                "caption": [f"an image of the subject with number {n}" for n in generator.integers(0, PROMPTS, size)],
                "jpg_0": names.take(pa.array(first)),
                "jpg_1": names.take(pa.array((first + gap) % len(files))),
                "label_0": label,
                "label_1": 1.0 - label,
                "has_label": np.ones(size, dtype=bool),
            }
            writer.write_table(pa.table(columns))
        writer.finalize()


# ---- Until the first step -------------------------------------------------------------------------------------------


def start_up(folder: Path, rows: int, files: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure time and memory until the first step for every way to read rows, each in a new process."""
    file = folder / f"{rows}.arrow"
    write_rows(file, rows, files)
    rows_of_ways = []
    for way in tqdm(WAYS, desc=f"{rows} rows", leave=False):
        command = [sys.executable, __file__, "--measure", str(file), "--way", way]
        caches = {"HF_DATASETS_CACHE": str(folder / "cache"), "XDG_CACHE_HOME": str(folder)}
        environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        rows_of_ways.append({"rows": rows, "way": way, **json.loads(done.stdout.splitlines()[-1])})
    file.unlink()
    return rows_of_ways


def first_step(file: Path, way: str) -> dict[str, float]:
    """Return the seconds from the construction of a trainer to the end of its first step, and the process's memory
    then, in MiB."""
    from random_pipeline import build_pipeline

    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    pipeline = build_pipeline("tiny", SIDE_OF_A_STEP)
    closed = memory("VmRSS")
    if way == "stream":  # a stream maps no files into memory, like a stream from the Hub
        data: Any = datasets.load_dataset("arrow", data_files=str(file), split="train", streaming=True)
    else:
        data = datasets.Dataset.from_file(str(file))
    with tempfile.TemporaryDirectory() as folder:
        args = DiffusionSDPOConfig(
            folder,
            max_steps=1,
            per_device_train_batch_size=1,
            resolution=SIDE_OF_A_STEP,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        opened, start = memory("VmRSS") - closed, time.perf_counter()
        cpu, private = time.process_time(), memory("RssAnon")
        trainer = DiffusionSDPOTrainer(pipeline, None, args, data)
        constructed, after = time.perf_counter(), AfterTheFirstStep()
        trainer.add_callback(after)
        trainer.train()
    taken = {"seconds": after.time - start, "constructing": constructed - start, "cpu": after.cpu - cpu}
    return {**taken, "opened": opened, **after.memory, "private": after.memory["private"] - private}


class AfterTheFirstStep(TrainerCallback):
    """Records time and memory (MiB) at the end of the first step, while sampler, index and batches are in memory."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.time, self.cpu = time.perf_counter(), time.process_time()
        self.memory = {"rss": memory("VmRSS"), "peak": memory("VmHWM"), "private": memory("RssAnon")}


def memory(name: str) -> float:
    """Return an entry of Linux's `/proc/self/status` in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


# ---- Decoding and loading -------------------------------------------------------------------------------------------


def decode_in_turns(files: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of CPU time per pair, as a median over rounds, and the median ratio of the rounds."""
    from trl_diffusion_sdpo.data import PairTransform, decode_image

    transform = PairTransform(options.resolution, center_crop=False, random_flip=True)
    contestants = {
        "ours": partial(our_pair, transform, decode_image),
        "usual": partial(usual_pair, options.resolution),
    }
    contents = [Path(file).read_bytes() for file in files]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    generator = random.Random(0)
    for number in tqdm(range(options.rounds + 2), desc="Decoding"):
        pair = contents[number % len(contents)], contents[(number + 1) % len(contents)]
        for name in generator.sample(list(contestants), len(contestants)):
            start = time.process_time()
            contestants[name](*pair)
            if number >= 2:
                seconds[name].append(time.process_time() - start)
    medians = {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}
    each = zip(seconds["ours"], seconds["usual"], strict=True)
    return medians | {"ratio": statistics.median(one / other for one, other in each)}


def our_pair(transform: Any, decode: Any, first: bytes, second: bytes) -> Any:
    from trl_diffusion_sdpo.data import PairDraws

    return transform(decode(first), decode(second), PairDraws(0.3, 0.6, 0.2, 0.5, 1)).pixel_values


def usual_pair(side: int, first: bytes, second: bytes) -> Any:
    """Decode two images to bytes as training scripts do in the data loader."""
    import torch

    pixels = []
    for content in (first, second):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        scale = side / min(image.size)
        image = image.resize(tuple(int(length * scale) for length in image.size), Image.Resampling.BILINEAR)
        left, top = (image.width - side) // 3, (image.height - side) // 3
        image = image.crop((left, top, left + side, top + side)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    return torch.stack(pixels)


def load(folder: Path, files: list[str], workers: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the pairs per second of wall time, measured after the first batch."""
    from torch.utils.data import DataLoader

    from trl_diffusion_sdpo.data import PairOptions, PairTransform, PreferenceCollator, prepare_dataset

    file = folder / "loaded.arrow"
    if not file.is_file():
        write_rows(file, 2 * options.pairs + 200, files)
    table = datasets.Dataset.from_file(str(file))
    prepared = prepare_dataset(table, PairOptions(PairTransform(options.resolution), verify_images="none"))
    batches = iter(DataLoader(prepared, 8, num_workers=workers, collate_fn=PreferenceCollator()))
    next(batches)
    start, pairs = time.perf_counter(), 0
    while pairs < options.pairs:
        pairs += len(next(batches)["seeds"])
    return {"workers": workers, "pairs_per_second": pairs / (time.perf_counter() - start)}


# ---- Results --------------------------------------------------------------------------------------------------------


def table(started: list[dict[str, Any]], decoding: dict[str, float], loading: list[dict[str, float]]) -> str:
    lines = [
        "| rows | read | to the first step | CPU | private memory | memory | of the fewest rows | without opening |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in started:
        lines.append(
            f"| {row['rows']} | {row['way']} | {row['seconds']:.1f} s | {row['cpu']:.1f} s | "
            f"{row['private']:.0f} MiB | {row['rss']:.0f} MiB | {row['ratio']:.3f} | {row['trainer_ratio']:.3f} |"
        )
    worst = max(row["trainer_ratio"] for row in started)
    lines.append(
        "\n`datasets` maps pages of a file when it opens it, before there is a trainer. Without these, memory grows by "
        f"{worst - 1:.1%} from the fewest rows to the most ({'within' if worst <= FLAT else 'above'} {FLAT - 1:.0%})."
    )
    lines.append(
        f"A pair is decoded to bytes in {decoding['ours']:.2f} ms, by the usual transforms in {decoding['usual']:.2f} "
        f"ms: {decoding['ratio']:.3f} of it.\n\n"
        "| workers | pairs a second |\n|---|---|"
    )
    lines += [f"| {row['workers']} | {row['pairs_per_second']:.0f} |" for row in loading]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
