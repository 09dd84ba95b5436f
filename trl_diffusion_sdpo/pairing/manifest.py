"""The list of a folder's images. `manifest.jsonl` has one line for each image: its path, its prompt and other columns.

`evaluate` writes such a file too, with the column `model`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import FILE_FORMATS
from ..utils.files import write_atomically

MANIFEST_FILE = "manifest.jsonl"
MAX_PROMPT = 20_000  # characters


@dataclass(frozen=True)
class ListedImage:
    """An image of a folder.

    Args:
        name (`str`): Path of the file, relative to the folder.
        prompt (`str`): Its prompt. Images of one prompt are compared with one another.
        facts (`Mapping[str, Any]`): Its other columns, such as `model`, `seed`, `rating` or `score`.
    """

    name: str
    prompt: str
    facts: Mapping[str, Any]


def read_manifest(folder: Path) -> tuple[list[ListedImage], Counter[str]]:
    """Return the images of a folder, and how many lines were left out, by reason.

    Raises:
        `ValueError`: If there is no such file, or a line is no JSON object.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"There is no {path}. `pairs from-images {folder}` writes it for a folder of images.")
    images: dict[str, ListedImage] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(read_json_lines(path, path.read_bytes()), 1):
        name = row.pop("image", None)
        prompt = row.pop("prompt", None)
        if not isinstance(name, str):
            raise ValueError(f"{path}, line {number}: `image` must be the path of an image, got {name!r}.")
        reason = _reason(folder, name, prompt)
        if not reason and name in images:
            reason = "listed twice"
        if reason:
            left_out[reason] += 1
        else:
            images[name] = ListedImage(name, prompt, row)
    return list(images.values()), left_out


def write_manifest(folder: Path, images: Iterable[ListedImage]) -> None:
    """Write the list of a folder's images."""
    rows = [{"image": image.name, "prompt": image.prompt, **image.facts} for image in images]
    write_atomically(folder / MANIFEST_FILE, json_lines(rows))


def is_inside(folder: Path, name: str) -> bool:
    """Return whether a name is that of a file below the folder. Links that lead out of the folder are refused."""
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a circle of links, a name with a zero byte
        return False


def is_image(path: Path) -> bool:
    """Return whether a file has the name of an image that training reads."""
    return Image.registered_extensions().get(path.suffix.lower()) in FILE_FORMATS


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as lines of JSON."""
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def read_json_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Return the rows of a file with one JSON object a line. The path is for messages.

    Raises:
        `ValueError`: If a line is anything else.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}. Repair or remove the line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}.")
        rows.append(row)
    return rows


def _reason(folder: Path, name: str, prompt: Any) -> str:
    """Return why an image cannot be used, or an empty string."""
    if not is_inside(folder, name):
        return "outside of the folder"
    if not is_image(folder / name):
        return "no image"
    if not (folder / name).is_file():
        return "without a file"
    if not isinstance(prompt, str) or not prompt.strip():
        return "without a prompt"
    return "with a prompt that is too long" if len(prompt) > MAX_PROMPT else ""
