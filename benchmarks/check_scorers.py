"""Compare the scorers with the original packages, on a machine with network.

Each original package needs its own environment, because they need other versions of transformers. Let it write its
scores to a JSON file. This script scores the same images and compares both.

    python benchmarks/check_scorers.py score IMAGES.csv --output ours.json
    python benchmarks/check_scorers.py compare ours.json originals.json

`IMAGES.csv` has the columns `image` (a path) and `prompt`. `originals.json` maps each scorer's name to its scores in
the order of the rows, such as `{"hpsv2.1": [0.271, ...]}`. The package `hpsv2` pads images, so use `--preprocess pad`
to compare with it.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

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
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="score images with this package")
    score.add_argument("table", type=Path, help="CSV file with the columns `image` and `prompt`")
    score.add_argument("--output", type=Path, required=True)
    score.add_argument("--scorers", nargs="+", default=list(TOLERANCES))
    score.add_argument("--preprocess", choices=["crop", "pad"], default="crop", help="of the CLIP scorers")
    score.add_argument("--device", default="cuda")
    compare = commands.add_parser("compare", help="compare two files of scores")
    compare.add_argument("ours", type=Path)
    compare.add_argument("originals", type=Path)
    args = parser.parse_args()
    return score_images(args) if args.command == "score" else compare_scores(args.ours, args.originals)


def score_images(args: argparse.Namespace) -> int:
    with args.table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = [Image.open(args.table.parent / row["image"]) for row in rows]
    prompts = [row["prompt"] for row in rows]
    scores = {}
    for name in tqdm(args.scorers, desc="Scorers"):
        settings = {"preprocess": args.preprocess} if name.startswith(("hps", "clip", "pick")) else {}
        scores[name] = load_scorer(name, device=args.device, **settings)(images, prompts).tolist()
    args.output.write_text(json.dumps(scores, indent=1), encoding="utf-8")
    return 0


def compare_scores(ours_path: Path, originals_path: Path) -> int:
    """Print the largest difference of each scorer and return 1 if one exceeds its tolerance."""
    ours = json.loads(ours_path.read_text(encoding="utf-8"))
    originals = json.loads(originals_path.read_text(encoding="utf-8"))
    wrong = False
    for name, scores in originals.items():
        if len(scores) != len(ours[name]):
            raise ValueError(f"{name} has {len(ours[name])} scores here and {len(scores)} in {originals_path}.")
        difference = max(abs(one - other) for one, other in zip(ours[name], scores, strict=True))
        wrong |= difference > TOLERANCES[name]
        print(f"{name:20} largest difference {difference:.5f}, tolerance {TOLERANCES[name]}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
