"""A person's own images: their prompts, ratings and duplicates, as the manifest of a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.images import FILE_FORMATS, MAX_FILE_BYTES, ImageReader, UndecodableImageError, UnreadableImageError
from ..utils.files import check_regular_file
from .image_prompts import prompt_in_metadata, rating_in_metadata
from .manifest import MANIFEST_FILE, MAX_PROMPT, ListedImage, is_image, is_inside, read_manifest, write_manifest

LIKED = ("liked", "likes", "favorites", "favourites", "good", "best", "winners", "chosen")
DISLIKED = ("disliked", "dislikes", "bad", "worst", "losers", "rejected")
THUMBNAIL = (16, 16)
NEARLY_EQUAL = 8  # levels of 255 by which each cell of two thumbnails may differ
_COUNTER = re.compile(r"([ _-]*\(?\b\d+\)?[ _-]*)+$")


@dataclass
class ListingReport:
    """What was found in a folder of images.

    Args:
        folder (`Path`): The folder.
        images (`int`): Images in the manifest.
        prompts (`int`): Their distinct prompts.
        comparable (`int`): Prompts with at least two images.
        rated (`int`): Images with a rating.
        left_out (`Counter[str]`): Images that are not in the manifest, by reason.
        sources (`Counter[str]`): Where prompts came from.
    """

    folder: Path
    images: int = 0
    prompts: int = 0
    comparable: int = 0
    rated: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"{self.folder / MANIFEST_FILE}: {self.images} images of {self.prompts} prompts, of which "
            f"{self.comparable} have two images or more; {self.rated} images are rated."
        ]
        lines += [f"  {count} prompts from {source}" for source, count in self.sources.items()]
        lines += [f"  left out: {count} images {reason}" for reason, count in self.left_out.items()]
        return "\n".join(lines)


def list_images(
    folder: Path,
    *,
    liked: tuple[str, ...] = LIKED,
    disliked: tuple[str, ...] = DISLIKED,
    from_names: bool = False,
) -> ListingReport:
    """Write the manifest of a folder of images, and return what was found.

    The prompt of an image is in a text file of its name, or in its metadata, as A1111, Forge, ComfyUI and SwarmUI write
    them. Images in the subfolders `liked` have the rating 1, those in `disliked` -1, and others 0 if their prompt has
    images in such a folder. If the prompt has star ratings in metadata, they come first.

    Of images of one prompt that look equal, the largest is kept, with the highest rating of all.

    Args:
        folder (`Path`): The folder. Images in subfolders are read too.
        liked, disliked (`tuple[str, ...]`): Names of subfolders.
        from_names (`bool`): Whether an image without another prompt takes its name as its prompt.

    Raises:
        `ValueError`: If the folder belongs to `evaluate`, cannot be written to, or has no image with a prompt.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if (folder / MANIFEST_FILE).is_file() and any("model" in image.facts for image in read_manifest(folder)[0]):
        raise ValueError(f"{folder} has images that `evaluate` generated, and is ready for `pairs pick`.")
    report = ListingReport(folder)
    found: dict[str, list[_Found]] = {}
    for path in _images_below(folder):
        name = path.relative_to(folder).as_posix()
        try:
            image = _read(folder, name, from_names)
        except _LeftOutError as error:
            report.left_out[str(error)] += 1
            continue
        image.like = _like(path.relative_to(folder), liked, disliked)
        report.sources[image.source] += 1
        found.setdefault(image.prompt, []).append(image)
    listed = []
    for prompt, images in found.items():
        if any(image.like for image in images) and all(image.rating is None for image in images):
            for image in images:
                image.rating = image.like
        kept = _without_duplicates(images)
        report.left_out["that look like another one of their prompt"] += len(images) - len(kept)
        listed += [
            ListedImage(image.name, prompt, {} if image.rating is None else {"rating": image.rating}) for image in kept
        ]
        report.comparable += len(kept) > 1
        report.rated += sum(image.rating is not None for image in kept)
    report.left_out = +report.left_out
    report.images, report.prompts = len(listed), len(found)
    if not listed:
        reasons = "".join(f" {count} images {reason}." for reason, count in report.left_out.items())
        raise ValueError(
            f"{folder} has no image with a prompt.{reasons} Put the prompt of a.png into a.txt, or pass `--from_names`."
        )
    try:
        write_manifest(folder, listed)
    except OSError as error:
        raise ValueError(f"{folder / MANIFEST_FILE} cannot be written: {error}.") from error
    return report


class _LeftOutError(Exception):
    """Error for an image that is not listed. The message is the reason."""


@dataclass
class _Found:
    name: str
    prompt: str
    source: str
    pixels: int
    thumbnail: np.ndarray
    rating: float | None
    like: int = 0


def _images_below(folder: Path) -> Iterator[Path]:
    """Yield all images below a folder, sorted. Hidden files and links to folders are not followed."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith(".") and is_image(Path(name)))


def _read(folder: Path, name: str, from_names: bool) -> _Found:
    path = folder / name
    if not is_inside(folder, name):
        raise _LeftOutError("outside of the folder")
    try:
        check_regular_file(path, MAX_FILE_BYTES)
        with Image.open(path, formats=FILE_FORMATS) as opened:
            metadata, rating = prompt_in_metadata(opened), rating_in_metadata(opened)
        image = ImageReader().decode(path)
    except (UndecodableImageError, UnreadableImageError):
        raise _LeftOutError("that cannot be decoded") from None
    except Exception:  # Pillow raises errors of many types for damaged files, and one file must not stop the others
        raise _LeftOutError("with damaged metadata or pixels") from None
    for prompt, source in (
        (_caption(path), "text files"),
        metadata,
        (_words_of(path) if from_names else "", "names of files"),
    ):
        if len(prompt) > MAX_PROMPT:
            raise _LeftOutError(f"with a prompt of more than {MAX_PROMPT} characters")
        if prompt:
            thumbnail = np.asarray(image.resize(THUMBNAIL, Image.Resampling.BOX), dtype=np.int16)
            return _Found(name, prompt, source, image.width * image.height, thumbnail, rating)
    raise _LeftOutError("without a prompt")


def _caption(path: Path) -> str:
    """Return the text of the file beside an image, or an empty string if there is none."""
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        return ""
    if caption.stat().st_size > 4 * MAX_PROMPT:
        raise _LeftOutError(f"with a text file of more than {4 * MAX_PROMPT} bytes")
    try:
        return " ".join(caption.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        raise _LeftOutError("with a text file that is not in UTF-8") from None


def _words_of(path: Path) -> str:
    """Return the name of a file as words: `a_red_fox_00012.png` is "a red fox"."""
    return " ".join(_COUNTER.sub("", path.stem).replace("_", " ").split())


def _like(path: Path, liked: tuple[str, ...], disliked: tuple[str, ...]) -> int:
    folders = {part.lower() for part in path.parts[:-1]}
    return int(bool(folders.intersection(liked))) - int(bool(folders.intersection(disliked)))


def _without_duplicates(images: list[_Found]) -> list[_Found]:
    """Return images of one prompt without those that look like a larger one.

    Small thumbnails in colour are compared, cell by cell. Usual perceptual hashes (`imagehash`) see no colour, so that
    they would take a red and a blue version for equal, and average over the image, so that a mended hand would be lost.
    """
    kept: list[_Found] = []
    for image in sorted(images, key=lambda image: (-image.pixels, image.name)):
        seen = np.array([other.thumbnail for other in kept]).reshape(-1, *image.thumbnail.shape)
        alike = np.abs(seen - image.thumbnail).reshape(len(kept), -1).max(1, initial=0) <= NEARLY_EQUAL
        if not alike.any():
            kept.append(image)
            continue
        twin = kept[int(alike.argmax())]
        ratings = [rating for rating in (twin.rating, image.rating) if rating is not None]
        twin.rating = max(ratings, default=None)
    return sorted(kept, key=lambda image: image.name)
