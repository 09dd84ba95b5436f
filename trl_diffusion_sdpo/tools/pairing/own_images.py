"""Write a manifest for a folder of your own images: find prompts and ratings, and leave out duplicates."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from ...data.data_report import MAX_EXAMPLES
from ...data.image_folders import OTHER_CAPTION, UNREAD_FORMAT, is_other_caption, read_caption, stem_of
from ...data.images import FILE_FORMATS, MAX_FILE_BYTES, ImageReader, check_regular_file, is_image, is_unread_image
from ...utils.errors import UserError
from ...utils.files import MANIFEST_FILE
from .image_prompts import prompt_in_metadata, rating_in_metadata
from .manifest import (
    CONTENT,
    COPIES,
    MAX_PROMPT,
    OWN_COLUMNS,
    RATING,
    ListedImage,
    is_inside,
    pixel_hash,
    read_json_lines,
    write_manifest,
)
from .picks import PAIRS_FILE, PICKS_FILE, PairsFile, PickLog

# Names of subfolders of liked and disliked images, in lower case.
LIKED = ("liked", "likes", "favorites", "favourites", "good", "best", "winners", "chosen")
DISLIKED = ("disliked", "dislikes", "bad", "worst", "losers", "rejected")
COPIED = "images that look like another image of the same prompt (`--keep_duplicates` lists them too)"
FORMER_RATING = "ratings of the earlier manifest that are not those of stars or subfolders"
COARSE = (16, 16)  # sizes of thumbnails
FINE = (32, 32)
NEARLY_EQUAL = 8  # largest difference of equal thumbnails in any pixel and channel, on a scale of 0 to 255
# Largest relative difference in sharpness of an image and its copy. JPEG or WebP changes it by up to a tenth, a blur
# with a radius of one pixel by a half.
EQUALLY_SHARP = 0.12
_COUNTER = re.compile(r"(?:[ _-]+\(?\d+\)?)*[ _-]*$")


@dataclass
class _OwnImage:
    name: str
    prompt: str
    size: tuple[int, int]
    content: str  # hash of size and pixels
    coarse: np.ndarray  # thumbnail of 16 x 16 pixels, flat
    fine: Image.Image  # thumbnail of 32 x 32 pixels
    sharpness: float  # root mean square of the differences between neighbouring pixels
    rating: float | None
    like: int  # 1 in a subfolder of liked images, -1 in one of disliked images, else 0
    copies: dict[str, str] = field(default_factory=dict)  # names and hashes of its copies, which are not listed


class _LeftOutError(Exception):
    """Error for an image to leave out of the manifest. Its message names the kind."""


def list_images(folder: Path, *, from_names: bool = False, keep_duplicates: bool = False) -> list[str]:
    """Write the manifest of a folder of images, and return a report as lines of text.

    The prompt of `a.png` comes from the text file `a.txt`, or from metadata of A1111, Forge, ComfyUI or SwarmUI. An
    image without either keeps its prompt of an earlier manifest.

    An image's rating is the number of stars in its metadata. If no image of a prompt has stars, those in a subfolder
    `liked` (or another name in `LIKED`) have rating 1, those in `disliked` (or another name in `DISLIKED`) -1, and the
    prompt's others 0. If no image of the prompt is in such a subfolder either, they have no rating.

    Of images of one prompt that look equal, the manifest lists only the largest, with their highest rating. It keeps
    columns that you added to an earlier one. If the folder has picks, its `pairs.jsonl` is written again: they find
    their images by the pixels.

    Args:
        folder (`Path`): The folder. Images in subfolders are read too.
        from_names (`bool`): Whether an image's file name becomes its prompt if no other is found.
        keep_duplicates (`bool`): Whether to list all images that look equal.

    Raises:
        `ValueError`: If the folder is missing, is the output folder of `evaluate`, cannot be written to, or has no
            image with a prompt.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Check the path.")
    manifest = folder / MANIFEST_FILE
    earlier = read_json_lines(manifest, manifest.read_bytes()) if manifest.is_file() else []
    if any("model" in row for row in earlier):
        raise UserError(
            f"`pairs from-images` is for your own images, but `evaluate` generated the images of {folder}. Run "
            "`pairs pick` on this folder without `pairs from-images`."
        )
    # Read the images. The earlier manifest has a prompt for the hash of an image, or for its name if it has no hash.
    prompts = {str(row.get(CONTENT, row.get("image"))): str(row.get("prompt", "")) for row in earlier}
    left_out: dict[str, list[str]] = defaultdict(list)
    by_prompt: dict[str, list[_OwnImage]] = defaultdict(list)
    for path, caption, like in _files(folder):
        try:
            image = _read(folder, path, caption, like, from_names, prompts)
            by_prompt[image.prompt].append(image)
        except _LeftOutError as error:
            left_out[str(error)].append(path.relative_to(folder).as_posix())

    # List each prompt's images with their ratings and what the earlier manifest knew of them.
    listed: list[ListedImage] = []
    several = 0
    present = {image.content for images in by_prompt.values() for image in images}
    rows = _by_content_and_name(earlier, present)
    for prompt, images in by_prompt.items():
        if any(image.like for image in images) and all(image.rating is None for image in images):
            for image in images:
                image.rating = image.like
        kept = images if keep_duplicates else _without_duplicates(images)
        several += len(kept) > 1
        for image in kept:
            for copy in image.copies:
                left_out[COPIED].append(f"{copy} (like {image.name})")
            row = _earlier_row(image, rows)
            if RATING in row and image.rating is None:
                left_out[FORMER_RATING].append(image.name)
            listed.append(ListedImage(image.name, prompt, _facts(image, row)))

    # Write the manifest and the report.
    reasons = []
    for reason, names in left_out.items():
        more = ", ..." if len(names) > MAX_EXAMPLES else ""
        reasons.append(f"  left out: {len(names)} {reason}: {', '.join(names[:MAX_EXAMPLES])}{more}")
    if not listed:
        raise UserError(
            "\n".join([f"{folder} has no image with a prompt.", *reasons])
            + "\nWrite the prompt of a.png into a.txt, or pass `--from_names` to use the file names as prompts."
        )
    try:
        write_manifest(folder, listed)
        pairs = _write_pairs_again(folder, listed)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error}. Use a folder that you can write to.") from error
    rated = sum(RATING in image.facts for image in listed)
    return [
        f"{manifest}: {len(listed)} images of {len(by_prompt)} prompts. {several} of the prompts have at least two "
        f"images. {rated} images have a rating.",
        *reasons,
        *pairs,
    ]


def _files(folder: Path) -> Iterator[tuple[Path, Path | None, int]]:
    """Yield each image or caption of a folder, the text file beside it, and 1 or -1 in a subfolder of liked or disliked
    images."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = {part.lower() for part in Path(parent).relative_to(folder).parts}
        like = int(not inside.isdisjoint(LIKED)) - int(not inside.isdisjoint(DISLIKED))
        paths = [Path(parent, file) for file in sorted(files) if not file.startswith(".")]
        captions = {stem_of(path, folder): path for path in paths if path.suffix.lower() == ".txt"}
        for path in paths:
            if is_image(path) or is_unread_image(path) or is_other_caption(path):
                yield path, captions.get(stem_of(path, folder)), like


def _facts(image: _OwnImage, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of an image: those of this command, and those that you added to its earlier row."""
    facts = {name: value for name, value in earlier.items() if name not in OWN_COLUMNS}
    if image.rating is not None:
        facts[RATING] = image.rating
    facts[CONTENT] = image.content
    known = earlier.get(COPIES) or {} if earlier.get(CONTENT) in (image.content, *image.copies.values()) else {}
    if copies := {**known, **image.copies}:  # picks of a copy stay, even if its file is gone
        facts[COPIES] = copies
    return facts


def _earlier_row(image: _OwnImage, rows: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Return the row of an image or one of its copies in the earlier manifest, or an empty row."""
    contents = [image.content, *image.copies.values()]
    keys = [(image.content, image.name), *((content, "") for content in contents), ("", image.name)]
    return next((rows[key] for key in keys if key in rows), {})


def _by_content_and_name(rows: Iterable[dict[str, Any]], present: set[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the rows of a manifest by their image's hash and name, and by the hash alone; by the name alone if no
    file has its pixels now. `present` has the hashes of all files."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        content = str(row.get(CONTENT, ""))
        name = str(row.get("image"))
        found[content, name] = row
        found[content, ""] = row
        if content not in present:
            found["", name] = row
    return found


def _write_pairs_again(folder: Path, listed: list[ListedImage]) -> list[str]:
    """Write the pairs of a folder with picks again, and return a report as lines of text."""
    if not (folder / PICKS_FILE).is_file():
        return []
    images = {image.name: image for image in listed}
    log = PickLog(folder, images, read_only=True)
    file = PairsFile(folder, images)
    if not log.picks and not file.rated:
        return []
    count, unused = file.write(log)
    lines = [f"{folder / PAIRS_FILE}: {count} pairs, from {len(log.picks)} picks and the ratings."]
    return [*lines, *(f"  not used: {number} picks {reason}" for reason, number in unused.items())]


def _read(
    folder: Path, path: Path, caption: Path | None, like: int, from_names: bool, earlier: Mapping[str, str]
) -> _OwnImage:
    """Return an image with its prompt and rating, or raise `_LeftOutError` if the manifest must not list it."""
    name = path.relative_to(folder).as_posix()
    if is_unread_image(path):
        raise _LeftOutError(f"images {UNREAD_FORMAT}")
    if is_other_caption(path):
        raise _LeftOutError(OTHER_CAPTION)
    if not is_inside(folder, name):
        raise _LeftOutError("images outside of the folder")
    try:
        check_regular_file(path, MAX_FILE_BYTES)
        with Image.open(path, formats=FILE_FORMATS) as opened:
            metadata = prompt_in_metadata(opened)
            rating = rating_in_metadata(opened)
        image = ImageReader().decode(path)
    except Exception:  # Pillow raises many types for damaged files, and one must not stop the others
        raise _LeftOutError("images that cannot be read") from None
    try:
        written = "" if caption is None else read_caption(caption)
    except (OSError, ValueError):
        raise _LeftOutError("images whose text file is not UTF-8 or is too large") from None
    named = " ".join(_COUNTER.sub("", stem_of(Path(path.name))).replace("_", " ").split()) if from_names else ""
    content = pixel_hash(image)
    prompt = written or metadata or named or earlier.get(content) or earlier.get(name, "")
    if not prompt:
        raise _LeftOutError("images without a prompt")
    if len(prompt) > MAX_PROMPT:
        raise _LeftOutError(f"images with a prompt of more than {MAX_PROMPT} characters")
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    return _OwnImage(
        name=name,
        prompt=prompt,
        size=image.size,
        content=content,
        coarse=np.asarray(image.resize(COARSE, Image.Resampling.BOX), dtype=np.int16).ravel(),
        fine=image.resize(FINE, Image.Resampling.BOX),
        sharpness=math.sqrt(sum(float(np.square(np.diff(grey, axis=axis)).mean()) for axis in (0, 1))),
        rating=rating,
        like=like,
    )


def _without_duplicates(images: list[_OwnImage]) -> list[_OwnImage]:
    """Return the images of one prompt without copies of a larger one, and name these copies.

    Colour thumbnails are compared pixel by pixel. The usual perceptual hashes, such as those of `imagehash`, ignore
    colour and average over large areas: they would drop a blue version of a red image, and one that differs only in a
    repaired hand.
    """
    distinct: list[_OwnImage] = []
    for image in sorted(images, key=lambda image: (-image.size[0] * image.size[1], image.name)):
        seen = np.array([other.coarse for other in distinct]).reshape(len(distinct), image.coarse.size)
        alike = np.abs(seen - image.coarse).max(1, initial=0) <= NEARLY_EQUAL
        twins = [distinct[index] for index in np.flatnonzero(alike) if _is_copy(image, distinct[index])]
        if twins:
            twins[0].rating = max((one.rating for one in (twins[0], image) if one.rating is not None), default=None)
            twins[0].copies[image.name] = image.content
        else:
            distinct.append(image)
    return sorted(distinct, key=lambda image: image.name)


def _is_copy(image: _OwnImage, other: _OwnImage) -> bool:
    """Return whether one of two images with equal coarse thumbnails is a copy of the other: resized, or of the same
    size with no difference in detail or sharpness, which may be what you choose by."""
    if image.size != other.size:
        return True
    difference = np.asarray(ImageChops.difference(image.fine, other.fine)).max()
    is_sharper = abs(image.sharpness - other.sharpness) > EQUALLY_SHARP * max(image.sharpness, other.sharpness)
    return bool(difference <= NEARLY_EQUAL and not is_sharper)
