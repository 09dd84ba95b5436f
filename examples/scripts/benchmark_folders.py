# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-diffusion-sdpo"]
# ///
"""Arrange the images of an evaluation as GenEval, DPG-Bench, T2I-CompBench or HPSv2's benchmark reads them.

First generate the images of all of the benchmark's prompts, without scorers:

```bash
trl-diffusion-sdpo evaluate --models base=stable-diffusion-v1-5/stable-diffusion-v1-5 tuned=path/to/run \
    --prompts evaluation_metadata.jsonl --seeds 0 1 2 3 --output_dir evaluation
python examples/scripts/benchmark_folders.py geneval evaluation_metadata.jsonl evaluation tuned geneval/tuned
```
"""

import argparse
import csv
import json
import shutil
from collections import defaultdict
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image


def geneval(prompts, images, output):
    """Pass `output` to `evaluation/evaluate_images.py` of https://github.com/djghosh13/geneval (4 seeds)."""
    for number, line in enumerate(prompts.read_text(encoding="utf-8").splitlines()):
        samples = output / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(line)
        for sample, image in enumerate(images[json.loads(line)["prompt"].strip()]):
            shutil.copyfile(image, samples / f"{sample:04d}.png")


def dpg(prompts, images, output):
    """Pass `output` as `--image-root-path` to https://github.com/TencentQQGYLab/ELLA (4 seeds, in a grid)."""
    with open(prompts, newline="", encoding="utf-8") as file:
        prompt_of_item = {row["item_id"]: row["text"] for row in csv.DictReader(file)}
    for item, prompt in prompt_of_item.items():
        make_image_grid([Image.open(image) for image in images[prompt.strip()]], 2, 2).save(output / f"{item}.png")


def t2i_compbench(prompts, images, output):
    """Pass `output` as `--out_dir` and `--outpath` to https://github.com/Karine-Huang/T2I-CompBench (10 seeds)."""
    (output / "samples").mkdir()
    lines = prompts.read_text(encoding="utf-8").splitlines()
    named = [(prompt.strip(), image) for prompt in lines for image in images[prompt.strip()]]
    for number, (prompt, image) in enumerate(named):
        shutil.copyfile(image, output / "samples" / f"{prompt}_{number:06d}.png")


def hpsv2(prompts, images, output):
    """Pass `output` to `hpsv2.evaluate` of https://github.com/tgxs002/HPSv2. The name of the file of prompts is their
    style, such as `anime.json`. HPSv2 reads one image of each prompt."""
    (output / prompts.stem).mkdir()
    for number, prompt in enumerate(json.loads(prompts.read_text(encoding="utf-8"))):
        Image.open(images[prompt.strip()][0]).convert("RGB").save(output / prompts.stem / f"{number:05d}.jpg")


BENCHMARKS = {"geneval": geneval, "dpg": dpg, "t2i-compbench": t2i_compbench, "hpsv2": hpsv2}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("prompts", type=Path, help="the benchmark's own file of prompts")
    parser.add_argument("evaluation", type=Path, help="output folder of `trl-diffusion-sdpo evaluate`")
    parser.add_argument("model", help="name of the model in the evaluation")
    parser.add_argument("output", type=Path, help="new folder")
    args = parser.parse_args(argv)
    images = defaultdict(list)  # prompt -> its images, in the order of the seeds
    for line in (args.evaluation / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["model"] == args.model:
            images[row["prompt"]].append(args.evaluation / row["image"])
    args.output.mkdir(parents=True)
    BENCHMARKS[args.benchmark](args.prompts, dict(images), args.output)


if __name__ == "__main__":
    main()
