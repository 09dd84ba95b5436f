"""The sizes of aspect-ratio buckets, how much of an image they crop, and how long the sizes of images take to read.

Plots the first two. Measures the last on random images of `--pixels` that lie in an Arrow table on disk, as JPEG and as
PNG, in CPU time: of their headers alone, and, for comparison, of decoding them.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import datasets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from trl_diffusion_sdpo.data import AspectRatioBuckets
from trl_diffusion_sdpo.data.checking import ALONE
from trl_diffusion_sdpo.data.image_sizes import read_sizes
from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.data.tables import ArrowSource

SQUARE, BUCKETS, OTHERS = "#c0392b", "#2471a3", "#b0b0b0"
RATIOS = np.geomspace(0.4, 2.5, 801)


def sizes_within(area: int, step: int, least: float, max_ratio: float) -> list[tuple[int, int]]:
    """All sizes of multiples of a step whose area is at least a share of `area`: at 1024 pixels SDXL's list."""
    sides = range(step, int(area**0.5 * max_ratio**0.5) + step, step)
    return [(height, width) for height in sides for width in sides if least * area <= height * width <= area
            and max(height, width) <= max_ratio * min(height, width)]  # fmt: skip


def cropped(ratios: np.ndarray, sizes) -> np.ndarray:
    """Share of an image's area that the nearest of some sizes crops, by the image's height to its width."""
    targets = np.array([height / width for height, width in sizes])
    distances = np.abs(np.log(ratios)[:, None] - np.log(targets))
    return 1 - np.exp(-distances.min(axis=1))


def plot(file: Path) -> None:
    buckets = AspectRatioBuckets((1024, 1024)).sizes
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    widths = np.linspace(460, 2100, 200)
    left.plot(widths, 1024**2 / widths, color="black", linewidth=0.8, label="area of 1024 x 1024")
    others = [size for size in sizes_within(1024**2, 64, 0.9, 4) if size not in buckets]
    left.scatter(*zip(*((w, h) for h, w in others), strict=True), s=14, color=OTHERS, label="further sizes of SDXL")
    left.scatter(*zip(*((w, h) for h, w in buckets), strict=True), s=30, color=BUCKETS, label="buckets (defaults)")
    for height, width in buckets:
        label = f"{width} x {height}"
        left.annotate(label, (width, height), xytext=(6, 4), textcoords="offset points", fontsize=7)
    left.set(title="Sizes at resolution 1024", xlabel="width, pixels", ylabel="height, pixels")
    left.legend(loc="upper right", fontsize=8)
    for label, sizes, color in (
        ("square", [(1024, 1024)], SQUARE),
        ("buckets at 512", AspectRatioBuckets((512, 512)).sizes, OTHERS),
        ("buckets at 1024", buckets, BUCKETS),
    ):
        right.plot(1 / RATIOS, 100 * cropped(RATIOS, sizes), color=color, label=label)
    right.set_xscale("log")
    ticks = {
        "1:2": 0.5,
        "9:16": 9 / 16,
        "2:3": 2 / 3,
        "3:4": 0.75,
        "1:1": 1,
        "4:3": 4 / 3,
        "3:2": 1.5,
        "16:9": 16 / 9,
        "2:1": 2,
    }
    right.set_xticks(list(ticks.values()), list(ticks), fontsize=8)
    right.minorticks_off()
    right.set(title="Cropped of an image", xlabel="width to height of the image", ylabel="% of its area", ylim=(0, 60))
    right.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def measure(rows: int, pixels: int) -> None:
    """Prints microseconds an image."""
    reader, generator = ImageReader(), np.random.default_rng(0)
    coarse = generator.integers(0, 256, (pixels // 8, pixels // 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC)
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        data = datasets.Dataset.from_dict(
            {"prompt": ["a"] * rows, "chosen": [buffer.getvalue()] * rows, "rejected": [buffer.getvalue()] * rows}
        )
        with tempfile.TemporaryDirectory() as folder:
            data.save_to_disk(folder)
            source = ArrowSource(datasets.load_from_disk(folder), None, False)
            index = np.stack([np.arange(rows), np.zeros(rows), np.arange(rows), np.ones(rows)], axis=1).astype(
                np.int64
            )
            start = time.process_time()
            read_sizes(source, index, reader, 1, ALONE)
            header = (time.process_time() - start) / (2 * rows)
        start = time.process_time()
        for _ in tqdm(range(20), desc=f"decoding {kind}", disable=None):
            reader.decode(buffer.getvalue())
        decoded = (time.process_time() - start) / 20
        size = len(buffer.getvalue()) / 1e6
        print(f"{kind}, {size:.2f} MB: {1e6 * header:.0f} us an image, decoded {1e6 * decoded:.0f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300, help="pairs whose sizes are read; 0 for the plot alone")
    parser.add_argument("--pixels", type=int, default=1024, help="side of the images")
    parser.add_argument(
        "--plot", type=Path, default=Path("bench_output/aspect_ratios.png"), help="where the plot goes"
    )
    args = parser.parse_args()
    matplotlib.use("Agg")
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(args.plot)
    print(f"Wrote {args.plot}.")
    if args.rows:
        measure(args.rows, args.pixels)


if __name__ == "__main__":
    main()
