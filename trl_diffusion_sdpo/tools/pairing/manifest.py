"""Read and write `manifest.jsonl`, which lists the images of a folder with their prompts and other columns.

`evaluate` writes it too, with the column `model`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from PIL import Image

from ...data.images import is_image
from ...utils.errors import UserError
from ...utils.files import MANIFEST_FILE, json_lines, write_atomically

MAX_PROMPT = 20_000  # characters
# Columns of `pairs from-images`: the hash of an image's pixels, and the names and hashes of its copies, which are not
# listed. Picks find their images again by these hashes, even after files were renamed.
CONTENT = "sha256"
COPIES = "copies"
RATING = "rating"
OWN_COLUMNS = ("image", "prompt", CONTENT, COPIES, RATING)
# Types of the columns that commands read. A column may be missing.
_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str, NoneType),
    "seed": (int, float, str, NoneType),
    CONTENT: (str, NoneType),
    COPIES: (dict, NoneType),
}


@dataclass(frozen=True)
class ListedImage:
    """An image in a manifest. Images with the same prompt are compared with each other."""

    name: str  # path relative to the folder
    prompt: str
    facts: Mapping[str, Any]  # other columns, such as `model`, `seed`, `rating` or `score`

    @property
    def contents(self) -> list[str]:
        """Hashes of the pixels of the image and its copies, empty if the manifest has none."""
        copies = self.facts.get(COPIES) or {}
        return [*filter(None, [self.facts.get(CONTENT)]), *copies.values()]


def read_manifest(folder: Path) -> tuple[list[ListedImage], Counter[str]]:
    """Return the images in a folder's manifest, and how many lines were skipped, by reason."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"There is no {path}. Run `pairs from-images {folder}`, which writes this file for a folder of images."
        )
    images: dict[str, ListedImage] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(read_json_lines(path, path.read_bytes()), 1):
        name = row.pop("image", None)
        prompt = row.pop("prompt", None)
        if not isinstance(name, str):
            raise UserError(
                f"{path}, line {number}: `image` must be the path of an image, got {name!r}. Correct the line."
            )
        if not is_inside(folder, name):
            left_out["outside of the folder"] += 1
        elif not is_image(folder / name):
            left_out["no image"] += 1
        elif not (folder / name).is_file():
            left_out["without a file"] += 1
        elif not isinstance(prompt, str) or not 0 < len(prompt.strip()) <= MAX_PROMPT:
            left_out[f"without a prompt of 1 to {MAX_PROMPT} characters"] += 1
        elif name in images:
            left_out["listed twice"] += 1
        elif wrong := [column for column, kinds in _TYPES.items() if not isinstance(row.get(column), kinds)]:
            raise UserError(
                f"{path}, line {number}: `{wrong[0]}` must not be {row[wrong[0]]!r}. Write `model` as text and "
                "`seed` as a number, or leave the column out."
            )
        else:
            images[name] = ListedImage(name, prompt, row)
    return list(images.values()), left_out


def write_manifest(folder: Path, images: Iterable[ListedImage]) -> None:
    """Write the manifest of a folder."""
    rows = [{"image": image.name, "prompt": image.prompt, **image.facts} for image in images]
    write_atomically(folder / MANIFEST_FILE, json_lines(rows))


def pixel_hash(image: Image.Image) -> str:
    """Return a hash of an image's size and pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def is_inside(folder: Path, name: str) -> bool:
    """Return whether a path is inside a folder once symbolic links are resolved."""
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # symbolic links in a circle, a name with a zero byte
        return False


def read_json_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Return the rows in the content of a JSON Lines file. Error messages name `path`."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is not valid JSON: {error}. Correct or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number} must be a JSON object, got a {type(row).__name__}. Correct or remove the line."
            )
        rows.append(row)
    return rows
