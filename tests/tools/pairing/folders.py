"""Folders of images with a manifest."""

import json
from pathlib import Path

from PIL import Image


def write_folder(folder: Path, rows: list[dict], side: int = 16) -> Path:
    """Write a manifest and images. Image k has the grey level 10 k."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        path = folder / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (10 * number % 256,) * 3).save(path)
    (folder / "manifest.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder
