"""Arrange the images of an evaluation as GenEval, DPG-Bench, T2I-CompBench or HPSv2's benchmark reads them.

Generate images of the benchmark's prompts first, without scorers:

```bash
trl-diffusion-sdpo evaluate --models base=stable-diffusion-v1-5/stable-diffusion-v1-5 tuned=path/to/run \
    --prompts evaluation_metadata.jsonl --seeds 0 1 2 3 --output_dir evaluation
python examples/scripts/benchmark_folders.py geneval evaluation_metadata.jsonl evaluation tuned geneval/tuned
```

A benchmark is a function that returns its files: name -> text, or the images in the file.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image

from trl_diffusion_sdpo import UserError

STYLES = ("anime", "concept-art", "paintings", "photo")


def geneval(prompts, images):
    """Pass the folder to `evaluation/evaluate_images.py` of https://github.com/djghosh13/geneval (4 seeds)."""
    files = {}
    for number, line in enumerate(prompts.read_text(encoding="utf-8").splitlines()):
        entry = json.loads(line)
        if "tag" not in entry or "include" not in entry:
            raise UserError(
                f"GenEval needs `tag` and `include` in each line, got {line}. Use its own file of prompts."
            )
        files[f"{number:05d}/metadata.jsonl"] = line
        for sample, image in enumerate(images[entry["prompt"].strip()]):
            files[f"{number:05d}/samples/{sample:04d}.png"] = [image]
    return files


def dpg(prompts, images):
    """Pass the folder as `--image-root-path` to https://github.com/TencentQQGYLab/ELLA (4 seeds, in a grid)."""
    files = {}
    with open(prompts, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # one for each question about an image
        item = row["item_id"]
        tiles = images[row["text"].strip()]
        is_name = item and "." not in item and "/" not in item  # DPG-Bench cuts a name at its first dot
        if not is_name or files.get(f"{item}.png", tiles) != tiles:
            raise UserError(f"Each `item_id` must have one prompt and neither `.` nor `/`, got {item!r}. Rename it.")
        if len(tiles) > 4:
            raise UserError(f"The grid of DPG-Bench has four images, got {len(tiles)}. Use at most four seeds.")
        with Image.open(tiles[0]) as image:
            width, height = image.size
        if width != height:
            raise UserError(f"DPG-Bench reads square images, got {width}x{height}. Set `height` and `width` alike.")
        files[f"{item}.png"] = tiles
    return files


def t2i_compbench(prompts, images):
    """Pass the folder as `--out_dir` and `--outpath` to https://github.com/Karine-Huang/T2I-CompBench (10 seeds)."""
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    named = [(prompt, image) for prompt in lines if prompt for image in images[prompt]]
    for prompt, _ in named:
        if "_" in prompt or "/" in prompt or len(prompt.encode()) > 244:
            raise UserError(
                "A prompt is part of its images' names, so it must have neither `_` nor `/` and at most 244 bytes, got "
                f"{prompt!r}. Remove it."
            )
    return {f"samples/{prompt}_{number:06d}.png": [image] for number, (prompt, image) in enumerate(named)}


def hpsv2(prompts, images):
    """Pass the folder to `hpsv2.evaluate` of https://github.com/tgxs002/HPSv2, which reads one image of each prompt."""
    style = prompts.stem
    if style not in STYLES:
        raise UserError(f"The file of prompts must be named by a style: {', '.join(STYLES)}. Got {style}. Rename it.")
    listed = json.loads(prompts.read_text(encoding="utf-8"))
    return {f"{style}/{number:05d}.jpg": images[prompt.strip()][:1] for number, prompt in enumerate(listed)}


BENCHMARKS = {"geneval": geneval, "dpg": dpg, "t2i-compbench": t2i_compbench, "hpsv2": hpsv2}


class Images(dict):
    """A model's images by prompt, in the order of their seeds."""

    def __missing__(self, prompt):
        raise UserError(f"The evaluation must have an image of each prompt, got none of {prompt!r}. Generate it.")


def save(files, output):
    for name, content in files.items():
        target = output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            target.write_text(content, encoding="utf-8")
        elif len(content) > 1:
            grid(content).save(target)
        elif target.suffix == ".png":
            shutil.copyfile(content[0], target)
        else:
            Image.open(content[0]).convert("RGB").save(target)


def grid(images):
    """Put up to four images into two rows of two."""
    tiles = [Image.open(image) for image in images]
    empty = Image.new("RGB", tiles[0].size)
    return make_image_grid([*tiles, empty, empty, empty][:4], 2, 2)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("prompts", type=Path, help="the benchmark's own file of prompts")
    parser.add_argument("evaluation", type=Path, help="output folder of `trl-diffusion-sdpo evaluate`")
    parser.add_argument("model", help="name of the model in the evaluation")
    parser.add_argument("output", type=Path, help="new folder")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"{args.output} must be a new folder, and exists")
    images = Images()
    for line in (args.evaluation / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["model"] == args.model:
            images.setdefault(row["prompt"], []).append(args.evaluation / row["image"])
    if not images:
        parser.error(f"the evaluation has no images of a model {args.model!r}")
    try:
        files = BENCHMARKS[args.benchmark](args.prompts, images)
    except UserError as error:
        parser.error(str(error))
    save(files, args.output)


if __name__ == "__main__":
    main()
