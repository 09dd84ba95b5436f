"""Compare the scorers with the original packages, on a machine with network.

Each original package needs its own environment, because they need other versions of transformers. Let it write its
scores to a JSON file. This script scores the same images and compares both.

    python benchmarks/check_scorers.py IMAGES.csv originals.json

`IMAGES.csv` has the columns `image` (a path) and `prompt`. `originals.json` maps each scorer's name to its scores in
the order of the rows, such as `{"hpsv2.1": [0.271, ...]}`. The package `hpsv2` pads images, so use `--preprocess pad`
to compare with it.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trl_diffusion_sdpo import load_scorer

# Largest allowed difference from the original score. The originals compute in half precision.
TOLERANCES = {
    "pickscore": 0.05,
    "hpsv2": 0.001,
    "hpsv2.1": 0.001,
    "image_reward": 0.02,
    "clip_score": 0.001,
    "aesthetic": 0.02,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file with the columns `image` and `prompt`")
    parser.add_argument("originals", type=Path, help="JSON file of the original scores")
    parser.add_argument("--preprocess", choices=["crop", "pad"], default="crop", help="of the CLIP scorers")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    with args.table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = [Image.open(args.table.parent / row["image"]) for row in rows]
    is_close = True
    for name, originals in json.loads(args.originals.read_text(encoding="utf-8")).items():
        settings = {"preprocess": args.preprocess} if name.startswith(("hps", "clip", "pick")) else {}
        scores = load_scorer(name, device=args.device, **settings)(images, [row["prompt"] for row in rows])
        is_close &= compare(name, scores.tolist(), originals)
    return 0 if is_close else 1


def compare(name: str, ours: Sequence[float], originals: Sequence[float]) -> bool:
    """Print the largest difference of a scorer's scores, and return whether it is within the tolerance."""
    difference = max(abs(score - original) for score, original in zip(ours, originals, strict=True))
    print(f"{name:20} largest difference {difference:.5f}, tolerance {TOLERANCES[name]}")
    return difference <= TOLERANCES[name]


if __name__ == "__main__":
    sys.exit(main())
