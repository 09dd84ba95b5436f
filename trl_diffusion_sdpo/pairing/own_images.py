"""Write a manifest for a folder of images that a person has: find prompts and ratings, and leave out duplicates."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.images import FILE_FORMATS, MAX_FILE_BYTES, ImageReader, check_regular_file
from .image_prompts import prompt_in_metadata, rating_in_metadata
from .manifest import MANIFEST_FILE, MAX_PROMPT, ListedImage, is_image, is_inside, read_manifest, write_manifest

# Names of subfolders of liked and disliked images, in lower case.
LIKED = ("liked", "likes", "favorites", "favourites", "good", "best", "winners", "chosen")
DISLIKED = ("disliked", "dislikes", "bad", "worst", "losers", "rejected")
THUMBNAIL = (16, 16)
NEARLY_EQUAL = 8  # largest difference of two equal thumbnails in any pixel and channel, on a scale of 0 to 255
_COUNTER = re.compile(r"(?:[ _-]+\(?\d+\)?)*[ _-]*$")


@dataclass
class _OwnImage:
    name: str
    prompt: str
    pixels: int
    thumbnail: np.ndarray
    rating: float | None
    like: int  # 1 in a subfolder of liked images, -1 in a subfolder of disliked images, else 0


class _LeftOutError(Exception):
    """Error for an image that is left out of the manifest. The message says which images are left out."""


def list_images(folder: Path, *, from_names: bool = False) -> list[str]:
    """Write the manifest of a folder of images, and return a report as lines of text.

    The prompt of `a.png` is read from the text file `a.txt`, or from metadata that A1111, Forge, ComfyUI or SwarmUI
    wrote into the image. An image's rating is the number of stars in its metadata. If no image of a prompt has stars,
    images in a subfolder `liked` (or another name in `LIKED`) have rating 1, images in a subfolder `disliked` (or
    another name in `DISLIKED`) have rating -1, and the other images of the prompt have rating 0. If no image of the
    prompt is in such a subfolder either, the images of the prompt have no rating.

    If several images of one prompt look equal, the manifest lists only the largest one, with the highest rating among
    these images.

    Args:
        folder (`Path`): The folder. Images in subfolders are read too.
        from_names (`bool`): Whether the file name of an image becomes its prompt if no other prompt is found.

    Raises:
        `ValueError`: If the folder is missing, is the output folder of `evaluate`, cannot be written to, or has no
            image with a prompt.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Check the path.")
    if (folder / MANIFEST_FILE).is_file() and any("model" in image.facts for image in read_manifest(folder)[0]):
        raise ValueError(
            f"`pairs from-images` is for your own images, but `evaluate` generated the images of {folder}. Run "
            "`pairs pick` on this folder without `pairs from-images`."
        )
    left_out: Counter[str] = Counter()
    by_prompt: dict[str, list[_OwnImage]] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = {part.lower() for part in Path(parent).relative_to(folder).parts}
        like = int(not inside.isdisjoint(LIKED)) - int(not inside.isdisjoint(DISLIKED))
        for path in (Path(parent, file) for file in sorted(files)):
            if path.name.startswith(".") or not is_image(path):
                continue
            try:
                image = _read(folder, path, like, from_names)
            except _LeftOutError as error:
                left_out[str(error)] += 1
                continue
            by_prompt.setdefault(image.prompt, []).append(image)
    listed: list[ListedImage] = []
    several = 0
    for prompt, images in by_prompt.items():
        if any(image.like for image in images) and all(image.rating is None for image in images):
            for image in images:
                image.rating = image.like
        distinct = _without_duplicates(images)
        left_out["images that look like another image of the same prompt"] += len(images) - len(distinct)
        several += len(distinct) > 1
        for image in distinct:
            listed.append(ListedImage(image.name, prompt, {} if image.rating is None else {"rating": image.rating}))
    reasons = [f"  left out: {count} {reason}" for reason, count in left_out.items() if count]
    if not listed:
        raise ValueError(
            "\n".join([f"{folder} has no image with a prompt.", *reasons])
            + "\nWrite the prompt of a.png into a.txt, or pass `--from_names` to use the file names as prompts."
        )
    try:
        write_manifest(folder, listed)
    except OSError as error:
        raise ValueError(
            f"{folder / MANIFEST_FILE} cannot be written: {error}. Use a folder that you can write to."
        ) from error
    rated = sum("rating" in image.facts for image in listed)
    return [
        f"{folder / MANIFEST_FILE}: {len(listed)} images of {len(by_prompt)} prompts. {several} of the prompts "
        f"have at least two images. {rated} images have a rating.",
        *reasons,
    ]


def _read(folder: Path, path: Path, like: int, from_names: bool) -> _OwnImage:
    """Return an image with its prompt and rating. Raise `_LeftOutError` if the manifest must not list the image."""
    name = path.relative_to(folder).as_posix()
    if not is_inside(folder, name):
        raise _LeftOutError("images outside of the folder")
    try:
        check_regular_file(path, MAX_FILE_BYTES)
        with Image.open(path, formats=FILE_FORMATS) as opened:
            metadata = prompt_in_metadata(opened)
            rating = rating_in_metadata(opened)
        image = ImageReader().decode(path)
    except Exception:  # Pillow raises errors of many types for damaged files, and one file must not stop the others
        raise _LeftOutError("images that cannot be read") from None
    named = " ".join(_COUNTER.sub("", path.stem).replace("_", " ").split()) if from_names else ""
    prompt = _caption(path) or metadata or named
    if not prompt:
        raise _LeftOutError("images without a prompt")
    if len(prompt) > MAX_PROMPT:
        raise _LeftOutError(f"images with a prompt of more than {MAX_PROMPT} characters")
    thumbnail = np.asarray(image.resize(THUMBNAIL, Image.Resampling.BOX), dtype=np.int16)
    return _OwnImage(name, prompt, image.width * image.height, thumbnail, rating, like)


def _caption(path: Path) -> str:
    """Return the text of the file beside an image, or an empty string if there is none."""
    caption = path.with_suffix(".txt")
    try:
        check_regular_file(caption, 4 * MAX_PROMPT)
        return " ".join(caption.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        raise _LeftOutError(f"images whose text file is not UTF-8 or has more than {4 * MAX_PROMPT} bytes") from None


def _without_duplicates(images: list[_OwnImage]) -> list[_OwnImage]:
    """Return the images of one prompt without those that look like a larger image of the prompt.

    Colour thumbnails of 16 x 16 pixels are compared pixel by pixel. The usual perceptual hashes, such as those of
    `imagehash`, ignore colour, so they would drop a blue version of a red image. These hashes also average over large
    areas, so they would drop an image that differs only in a repaired hand.
    """
    distinct: list[_OwnImage] = []
    for image in sorted(images, key=lambda image: (-image.pixels, image.name)):
        seen = np.array([other.thumbnail for other in distinct]).reshape(len(distinct), image.thumbnail.size)
        alike = np.abs(seen - image.thumbnail.ravel()).max(1, initial=0) <= NEARLY_EQUAL
        if alike.any():
            twin = distinct[int(alike.argmax())]
            twin.rating = max((one.rating for one in (twin, image) if one.rating is not None), default=None)
        else:
            distinct.append(image)
    return sorted(distinct, key=lambda image: image.name)
