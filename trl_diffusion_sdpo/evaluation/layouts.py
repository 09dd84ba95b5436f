"""Arrange the images of an evaluation in the folders that benchmarks read.

A layout is a function of the prompts and seeds that returns the files of one model. It raises `ValueError` if the
prompts lack what the benchmark needs, before any image is generated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from .images import image_path
from .prompts import PromptList

STYLES = ("anime", "concept-art", "paintings", "photo")


@dataclass(frozen=True)
class LayoutFile:
    """A file of a layout: an image, a grid of two to four images, or text.

    Args:
        path (`str`): Path relative to the model's folder.
        images (`tuple[tuple[int, int], ...]`): Prompt index and seed of each image.
        text (`str`): Contents of a text file.
    """

    path: str
    images: tuple[tuple[int, int], ...] = ()
    text: str = ""


def geneval(prompts: PromptList, seeds: Sequence[int]) -> list[LayoutFile]:
    """Return the files of GenEval, for the folder that `evaluation/evaluate_images.py` takes.

    The prompts are those of its `evaluation_metadata.jsonl`. Its authors use four seeds.

    Source: https://github.com/djghosh13/geneval
    """
    files: list[LayoutFile] = []
    for number, (index, entry) in enumerate(prompts.rows):
        if not isinstance(entry, dict) or "tag" not in entry or not isinstance(entry.get("include"), list):
            raise ValueError(
                f"The layout `geneval` needs the keys `tag` and `include` of each prompt, got {entry!r}. Use GenEval's "
                "evaluation_metadata.jsonl."
            )
        metadata = {"prompt": prompts.prompts[index], **entry}
        files.append(LayoutFile(f"{number:05d}/metadata.jsonl", text=json.dumps(metadata)))
        for sample, seed in enumerate(seeds):
            files.append(LayoutFile(f"{number:05d}/samples/{sample:04d}.png", ((index, seed),)))
    return files


def dpg(prompts: PromptList, seeds: Sequence[int]) -> list[LayoutFile]:
    """Return the files of DPG-Bench: one image or grid of each prompt, for `--image-root-path`.

    The prompts are those of its `dpg_bench.csv`, which has one row for each question. Its authors use four seeds in a
    grid of two by two.

    Source: https://github.com/TencentQQGYLab/ELLA
    """
    if len(seeds) > 4:
        raise ValueError(f"The layout `dpg` has up to four images for each prompt, got {len(seeds)} seeds.")
    items: dict[str, int] = {}
    for index, entry in prompts.rows:
        item = str(entry.get("item_id") or "") if isinstance(entry, dict) else ""
        is_name = item and "." not in item and PurePath(item).name == item  # the benchmark cuts it at the first dot
        if not is_name or items.get(item, index) != index:
            raise ValueError(
                f"The layout `dpg` needs a key `item_id` that names the file of each prompt, got {entry!r}. Use "
                "DPG-Bench's dpg_bench.csv."
            )
        items[item] = index
    return [LayoutFile(f"{item}.png", tuple((index, seed) for seed in seeds)) for item, index in items.items()]


def t2i_compbench(prompts: PromptList, seeds: Sequence[int]) -> list[LayoutFile]:
    """Return the files of T2I-CompBench, for the folder that its `--out_dir` and `--outpath` take.

    The file's name is the prompt. The authors use ten seeds.

    Source: https://github.com/Karine-Huang/T2I-CompBench
    """
    files: list[LayoutFile] = []
    for index, _ in prompts.rows:
        for seed in seeds:
            name = f"{prompts.prompts[index]}_{len(files):06d}.png"
            if name.count("_") > 1 or PurePath(name).name != name or len(name.encode()) > 255:
                raise ValueError(
                    "The layout `t2i-compbench` names files by their prompts, so a prompt must have neither `_` nor "
                    f"`/` and at most 244 bytes, got {prompts.prompts[index]!r}. Remove this prompt."
                )
            files.append(LayoutFile(f"samples/{name}", ((index, seed),)))
    return files


def hpsv2(prompts: PromptList, seeds: Sequence[int]) -> list[LayoutFile]:
    """Return the files of HPSv2's benchmark, for the folder that `hpsv2.evaluate` takes.

    The prompts are those of its `anime.json`, `concept-art.json`, `paintings.json` or `photo.json`, or have a key
    `style` with such a name. A file's number is the position of its prompt within its style. The benchmark reads one
    image of each prompt, that of the first seed.

    Source: https://github.com/tgxs002/HPSv2
    """
    if prompts.empty:
        raise ValueError(f"The layout `hpsv2` numbers prompts, and {prompts.empty} of them are empty. Remove these.")
    files: list[LayoutFile] = []
    numbers: Counter[str] = Counter()
    for index, entry in prompts.rows:
        style = entry["style"] if isinstance(entry, dict) and "style" in entry else prompts.name
        if style not in STYLES:
            raise ValueError(
                f"The layout `hpsv2` needs a style of each prompt, which is one of {', '.join(STYLES)}, got {style!r}. "
                "Name the file of prompts by its style, or add a key `style`."
            )
        files.append(LayoutFile(f"{style}/{numbers[style]:05d}.jpg", ((index, seeds[0]),)))
        numbers[style] += 1
    return files


LAYOUTS: dict[str, Callable[[PromptList, Sequence[int]], list[LayoutFile]]] = {
    "geneval": geneval,
    "dpg": dpg,
    "t2i-compbench": t2i_compbench,
    "hpsv2": hpsv2,
}


def write_layout(folder: Path, layout: str, models: Sequence[str], files: Sequence[LayoutFile]) -> None:
    """Write the files of a layout for each model, into `<folder>/<layout>/<model>`. Images are hard links if the file
    system has them.
    """
    for model in models:
        for file in files:
            target = folder / layout / model / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # never write into a file that an image is linked to
            sources = [image_path(folder, model, *image) for image in file.images]
            if not sources:
                target.write_text(file.text, encoding="utf-8")
            elif len(sources) > 1:
                _grid(sources).save(target)
            elif target.suffix == ".png":
                _link(sources[0], target)
            else:
                with Image.open(sources[0]) as image:
                    image.convert("RGB").save(target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _grid(sources: Sequence[Path]) -> Image.Image:
    """Return up to four square images, row by row, on a canvas of two by two."""
    tiles: list[Any] = [Image.open(source) for source in sources]
    side = tiles[0].width
    if any(tile.size != (side, side) for tile in tiles):
        raise ValueError(f"The layout `dpg` needs square images of one size, got {[tile.size for tile in tiles]}.")
    grid = Image.new("RGB", (2 * side, 2 * side))
    for number, tile in enumerate(tiles):
        grid.paste(tile, (number % 2 * side, number // 2 * side))
        tile.close()
    return grid
