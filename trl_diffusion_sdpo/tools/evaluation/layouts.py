"""Save the images of an evaluation in the folders and with the file names that benchmarks expect.

A layout is a function that takes prompts and seeds, and returns the files of one model: path in the model's folder ->
text, or the prompt index and seed of each image in the file. A layout is called before any image is generated, and
raises `ValueError` if the prompts lack information that the benchmark needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from PIL import Image

from .images import image_path
from .prompts import PromptList

STYLES = ("anime", "concept-art", "paintings", "photo")


Files = dict[str, str | list[tuple[int, int]]]


def geneval(prompts: PromptList, seeds: Sequence[int]) -> Files:
    """Return the files for GenEval. Pass the model's folder to GenEval's script `evaluation/evaluate_images.py`.

    The prompts must be those of GenEval's `evaluation_metadata.jsonl`. GenEval's authors use four seeds.

    Source: https://github.com/djghosh13/geneval
    """
    files: Files = {}
    for number, (index, entry) in enumerate(prompts.rows):
        if not isinstance(entry, dict) or "tag" not in entry or not isinstance(entry.get("include"), list):
            raise ValueError(
                f"The layout `geneval` needs prompts with the keys `tag` and `include`, got {entry!r}. Use the prompts "
                "in GenEval's evaluation_metadata.jsonl."
            )
        metadata = {"prompt": prompts.prompts[index], **entry}
        files[f"{number:05d}/metadata.jsonl"] = json.dumps(metadata)
        for sample, seed in enumerate(seeds):
            files[f"{number:05d}/samples/{sample:04d}.png"] = [(index, seed)]
    return files


def dpg(prompts: PromptList, seeds: Sequence[int]) -> Files:
    """Return the files for DPG-Bench. Each prompt has one file: a single image or, with two to four seeds, a grid of
    images. Pass the model's folder to DPG-Bench's script as `--image-root-path`.

    The prompts must be those of `dpg_bench.csv`, in which a prompt has one row for each question about it. The authors
    of DPG-Bench use four seeds, in a grid of two by two images.

    Source: https://github.com/TencentQQGYLab/ELLA
    """
    if len(seeds) > 4:
        raise ValueError(
            f"The layout `dpg` has a grid of at most four images per prompt, got {len(seeds)} seeds. Use at most four "
            "seeds."
        )
    items: dict[str, int] = {}
    for index, entry in prompts.rows:
        item = str(entry.get("item_id") or "") if isinstance(entry, dict) else ""
        # The benchmark cuts file names at the first dot.
        is_name = item and "." not in item and PurePath(item).name == item
        if not is_name or items.get(item, index) != index:
            raise ValueError(
                f"The layout `dpg` needs prompts with a key `item_id`, which must be a unique file name without a dot, "
                f"got {entry!r}. Use the prompts in DPG-Bench's dpg_bench.csv."
            )
        items[item] = index
    return {f"{item}.png": [(index, seed) for seed in seeds] for item, index in items.items()}


def t2i_compbench(prompts: PromptList, seeds: Sequence[int]) -> Files:
    """Return the files for T2I-CompBench. Pass the model's folder as T2I-CompBench's `--out_dir` and `--outpath`.

    File names contain the prompts. The authors of T2I-CompBench use ten seeds.

    Source: https://github.com/Karine-Huang/T2I-CompBench
    """
    files: Files = {}
    for index, _ in prompts.rows:
        for seed in seeds:
            name = f"{prompts.prompts[index]}_{len(files):06d}.png"
            if name.count("_") > 1 or PurePath(name).name != name or len(name.encode()) > 255:
                raise ValueError(
                    "The layout `t2i-compbench` names files by their prompts, so a prompt must have neither `_` nor "
                    f"`/` and at most 244 bytes, got {prompts.prompts[index]!r}. Remove this prompt."
                )
            files[f"samples/{name}"] = [(index, seed)]
    return files


def hpsv2(prompts: PromptList, seeds: Sequence[int]) -> Files:
    """Return the files for the benchmark of HPSv2. Pass the model's folder to the function `hpsv2.evaluate`.

    The prompts must be those of `anime.json`, `concept-art.json`, `paintings.json` or `photo.json`, or each must have a
    key `style` with the name of one of these files. A file's number is the position of its prompt among the prompts of
    the same style. The benchmark reads one image of each prompt, so only the first seed is used.

    Source: https://github.com/tgxs002/HPSv2
    """
    if prompts.empty:
        raise ValueError(
            "The layout `hpsv2` numbers the prompts, so no prompt may be empty, got "
            f"{prompts.empty} empty prompts. Use the benchmark's prompts unchanged."
        )
    files: Files = {}
    numbers: Counter[str] = Counter()
    for index, entry in prompts.rows:
        style = entry["style"] if isinstance(entry, dict) and "style" in entry else prompts.name
        if style not in STYLES:
            raise ValueError(
                f"The layout `hpsv2` needs a style for each prompt: one of {', '.join(STYLES)}. Got {style!r}. Name "
                "the file of prompts by its style, or add a key `style` to each prompt."
            )
        files[f"{style}/{numbers[style]:05d}.jpg"] = [(index, seeds[0])]
        numbers[style] += 1
    return files


LAYOUTS: dict[str, Callable[[PromptList, Sequence[int]], Files]] = {
    "geneval": geneval,
    "dpg": dpg,
    "t2i-compbench": t2i_compbench,
    "hpsv2": hpsv2,
}


def write_layout(folder: Path, layout: str, models: Sequence[str], files: Files) -> None:
    """Write the files of a layout for each model into `<folder>/<layout>/<model>`. A PNG file with one image is a hard
    link to the generated image if the file system supports hard links, and a copy otherwise."""
    for model in models:
        for path, content in files.items():
            target = folder / layout / model / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # writing into a hard link would change the original image
            if isinstance(content, str):
                target.write_text(content, encoding="utf-8")
                continue
            sources = [image_path(folder, model, *image) for image in content]
            if len(sources) > 1:
                _grid(sources).save(target)
            elif target.suffix == ".png":
                try:
                    os.link(sources[0], target)
                except FileExistsError:  # another call has just written it
                    continue
                except OSError:
                    shutil.copyfile(sources[0], target)
            else:
                Image.open(sources[0]).convert("RGB").save(target)


def _grid(sources: Sequence[Path]) -> Image.Image:
    """Return a grid of two by two images, filled row by row with up to four square images."""
    tiles = [Image.open(source) for source in sources]
    side = tiles[0].width
    if any(tile.size != (side, side) for tile in tiles):
        raise ValueError(
            f"The layout `dpg` needs square images of equal size, got {[tile.size for tile in tiles]}. Set `height` "
            "and `width` to the same number."
        )
    grid = Image.new("RGB", (2 * side, 2 * side))
    for number, tile in enumerate(tiles):  # pasting reads the file and closes it
        grid.paste(tile, (number % 2 * side, number // 2 * side))
    return grid
