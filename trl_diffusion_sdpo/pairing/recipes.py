"""Pairs from good images: the images win, and the model makes a loser for each of them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image, ImageDraw, ImageOps
from tqdm.auto import tqdm

from ..evaluation import Candidate
from ..evaluation.images import ImageSettings, check_settings, facts_of, load_candidate, png_bytes
from ..reporting.sample_images import call_options
from ..utils.files import file_facts, write_atomically
from .advice import ALIGNED_ADVICE
from .generate import peers_of_this_run, write_card
from .manifest import ListedImage, json_lines, read_manifest, write_manifest
from .picks import PAIRS_FILE

Recipe = Literal["spin", "partial", "local"]
SIDES = 16  # sides of images become multiples of this many pixels, which every VAE here takes
PURPOSES = {
    "spin": "Each image against one that the model generates for its prompt (SPIN).",
    "partial": "Each image against itself after the model has noised it and denoised it again. Pairs are aligned.",
    "local": "Each image against itself with one region drawn anew by the model (LocalDPO). Pairs are aligned outside "
    "of the region, which is the column `mask`: with it, training counts errors in the region only.",
}


def pairs_from_images(
    recipe: Recipe,
    model: Candidate,
    images: str | Path,
    output_dir: str | Path,
    settings: ImageSettings,
    strength: float = 0.6,
) -> int:
    """Make a loser for each image of a folder, and write `pairs.jsonl`, which training reads.

    An interrupted call continues. If accelerate launches several processes, they share the work.

    Args:
        recipe (`str`): `"spin"` (the loser is generated from the prompt alone), `"partial"` (the winner is noised to
            `strength` and denoised) or `"local"` (a random region of the winner is drawn anew, and its mask kept).
        model (`Candidate`): The model that makes the losers.
        images (`str` or `Path`): Folder of good images with `manifest.jsonl`, which `pairs from-images` writes.
        output_dir (`str` or `Path`): Folder for winners, losers, masks, pairs and a card.
        settings (`ImageSettings`): The first seed, and arguments of the pipeline. With `height` and `width`, winners
            are cropped and resized to these; without, their sides are rounded down to multiples of 16.
        strength (`float`, *optional*, defaults to `0.6`): Noise level to which `"partial"` and `"local"` go back, in
            `(0, 1]`.

    Returns:
        `int`: Number of pairs. Images that cannot be read or are smaller than 16 pixels are counted in the card.

    Raises:
        `ValueError`: If a value is out of range, the folder has no images with prompts, or diffusers has no pipeline
            of this model for the recipe.
    """
    if recipe not in get_args(Recipe):
        raise ValueError(f"`recipe` must be one of {', '.join(get_args(Recipe))}, got {recipe!r}.")
    if not 0 < strength <= 1:
        raise ValueError(f"`strength` must be in (0, 1], got {strength}.")
    source, folder = Path(images), Path(output_dir)
    if source.resolve() == folder.resolve():
        raise ValueError(f"The pairs need a folder of their own, got that of the images, {source}.")
    listed, left_out = read_manifest(source)
    if not listed:
        raise ValueError(f"{source} has no images with prompts. Left out: {dict(left_out)}.")
    peers = peers_of_this_run()
    facts = facts_of(model, None, [image.prompt for image in listed], settings)
    files = hashlib.sha256(repr([(image.name, file_facts(source / image.name)) for image in listed]).encode())
    facts |= {"recipe": recipe, "strength": strength, "images": files.hexdigest()}
    peers.first(lambda: check_settings(folder / "images" / "rejected", facts))
    counted = range(len(listed))
    for kind in ("chosen", "mask") if recipe == "local" else ("chosen",):
        _path(folder, kind, 0).parent.mkdir(parents=True, exist_ok=True)
    missing = peers.first(lambda: [index for index in counted if not _path(folder, "rejected", index).is_file()])
    share = missing[peers.index :: peers.count]
    peers.gather_results(lambda: _make(recipe, model, source, listed, folder, settings, strength, share))
    done = [index for index in counted if _path(folder, "rejected", index).is_file()]
    if not done:
        raise ValueError(f"None of the {len(listed)} images of {source} could be read. Look at the files.")
    peers.first(lambda: _write(recipe, model, listed, done, folder, settings, strength))
    return len(done)


def _path(folder: Path, kind: str, index: int) -> Path:
    return folder / "images" / kind / f"{index:05d}.png"


def _make(
    recipe: Recipe,
    model: Candidate,
    source: Path,
    listed: list[ListedImage],
    folder: Path,
    settings: ImageSettings,
    strength: float,
    share: list[int],
) -> None:
    if not share:
        return
    family = load_candidate(model, settings)
    pipeline = _pipeline(recipe, family.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    given = {**(settings.call_kwargs or {}), **(model.call_kwargs or {})}
    size = (given.pop("width", None), given.pop("height", None))
    options = call_options(family, given, "call_kwargs")
    seed = settings.seeds[0]
    for index in tqdm(share, desc=recipe, unit="image"):
        prompt = listed[index].prompt
        winner = _winner(source / listed[index].name, size)
        if winner is None:
            continue
        arguments: dict[str, Any] = {"image": winner, "strength": strength}
        arguments |= {"width": winner.width, "height": winner.height}
        mask = None
        if recipe == "local":
            mask = region(winner.size, np.random.default_rng([index, seed]))
            arguments["mask_image"] = mask
        accepted = inspect.signature(pipeline.__call__).parameters
        arguments = {name: value for name, value in arguments.items() if name in accepted}
        generator = settings.generator(f"{index}\n{prompt}", seed)
        loser = pipeline(prompt=prompt, generator=generator, **arguments, **options).images[0].resize(winner.size)
        if mask is not None:
            loser = Image.composite(loser, winner, mask)
            write_atomically(_path(folder, "mask", index), png_bytes(mask, prompt, seed))
        write_atomically(_path(folder, "chosen", index), png_bytes(winner, prompt, seed))
        write_atomically(_path(folder, "rejected", index), png_bytes(loser, prompt, seed))  # last: then all are there


def _pipeline(recipe: Recipe, pipeline: DiffusionPipeline) -> DiffusionPipeline:
    if recipe == "spin":
        return pipeline
    kind: Callable[[DiffusionPipeline], DiffusionPipeline]
    kind = (AutoPipelineForImage2Image if recipe == "partial" else AutoPipelineForInpainting).from_pipe
    try:
        return kind(pipeline)
    except ValueError as error:
        raise ValueError(
            f"The recipe `{recipe}` needs a pipeline that draws over an image, and diffusers has none for "
            f"{type(pipeline).__name__}. Use `spin`, or another model for the losers."
        ) from error


def _winner(path: Path, size: tuple[int | None, int | None]) -> Image.Image | None:
    """Return an image with sides that a pipeline takes, or None if it cannot be read or is too small."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    width, height = (given or side // SIDES * SIDES for given, side in zip(size, image.size, strict=True))
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS) if min(width, height) > 0 else None


def region(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw a random ellipse whose axes are 0.3 to 0.7 of the image's sides.

    Returns:
        `PIL.Image.Image`: In grey, 255 inside the region and 0 outside.
    """
    axes = np.array(size) * rng.uniform(0.3, 0.7, size=2)
    corner = rng.uniform(0, np.array(size) - axes)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse([*corner, *(corner + axes)], fill=255)
    return mask


def _write(
    recipe: Recipe,
    model: Candidate,
    listed: list[ListedImage],
    done: list[int],
    folder: Path,
    settings: ImageSettings,
    strength: float,
) -> None:
    rows, images = [], []
    for index in done:
        row: dict[str, Any] = {"prompt": listed[index].prompt, "seed": settings.seeds[0]}
        for kind in ("chosen", "rejected", *(("mask",) if recipe == "local" else ())):
            row[kind] = _path(folder, kind, index).relative_to(folder).as_posix()
        rows.append(row)
        images += [ListedImage(str(row[kind]), listed[index].prompt, {}) for kind in ("chosen", "rejected")]
    write_manifest(folder, images)
    write_atomically(folder / PAIRS_FILE, json_lines(rows))
    facts: dict[str, object] = {
        "Recipe": recipe,
        "Model": model.model if isinstance(model.model, str) else type(model.model).__name__,
        "Unreadable images that were left out": len(listed) - len(done),
    }
    if recipe == "spin":
        write_card(folder, PURPOSES[recipe], facts, len(rows))
    else:
        write_card(folder, PURPOSES[recipe], {**facts, "Strength": strength}, len(rows), ALIGNED_ADVICE)
