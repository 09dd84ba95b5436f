"""Keys that tell images apart without decoding them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image


def image_key(image: Any) -> str:
    """Return a string that changes when the image changes. The image is not decoded.

    The key of a local file consists of its absolute path, size, modification time and change time. The file itself is
    not read. Every tool that replaces a file changes one of these values. No tool can set the change time back.

    Args:
        image (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, `dict` or `None`): A value of an image column. A
            `dict` has the keys `"bytes"` and `"path"`; bytes take precedence.

    Returns:
        `str`: One line, starting with `file`, `missing`, `url`, `bytes` or `pixels`.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if image is None:
        return "missing"
    if isinstance(image, bytes | bytearray | memoryview):
        return f"bytes {hashlib.sha256(image).hexdigest()}"
    if isinstance(image, Image.Image):
        digest = hashlib.sha256(f"{image.mode} {image.size} {image.getexif().get(0x0112, 1)}\n".encode())
        digest.update(image.tobytes())
        return f"pixels {digest.hexdigest()}"
    if not isinstance(image, str | os.PathLike):
        return f"unknown {type(image).__name__}"
    name = os.fspath(image)
    if "://" in name:
        return f"url {name}"
    path = os.path.abspath(name)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return f"missing {path}"
    return f"file {path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
