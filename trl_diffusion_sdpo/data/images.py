"""Decodes whatever an image column may hold. What a row names is not trusted: a path may lead to a device, a pipe or
another machine, and a small file may unfold to any size. Whatever goes wrong is one unusable image, with the reason."""

import io
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from fsspec.core import url_to_fs
from fsspec.utils import infer_compression
from PIL import Image, ImageOps, UnidentifiedImageError

from ..suggestions import did_you_mean

MIN_SIDE = 8  # a VAE turns 8 pixels into one latent: below that there is nothing to encode
MAX_ASPECT_RATIO = 64  # beyond it, resizing by the shorter side blows up the longer one past any memory
MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 178_956_970  # where Pillow refuses by default; half a gigabyte as RGB

# Pillow knows formats that run other programs, such as EPS; a data set from elsewhere gets none of these.
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# What a row may name without being asked for: this machine's files, members of archives, and files of the Hub, which is
# how `datasets` names the images of a set that it streams from there.
SCHEMES = ("file", "hf", "zip", "tar")


def settled_schemes(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Schemes of URLs in one form, wherever they were given.

    Args:
        value (`str` or `Sequence[str]`, *optional*): One or several, such as `"s3"`, `"S3"` or `"s3://"`.

    Returns:
        `tuple[str, ...]`: As fsspec names them, each once.

    Raises:
        ValueError: If fsspec knows no such scheme.
    """
    given = [value] if isinstance(value, str) else list(value or ())
    known = fsspec.available_protocols()
    schemes: dict[str, None] = {}
    for word in given:
        scheme = str(word).removesuffix("://").lower()
        if scheme not in known:
            raise ValueError(
                "`image_schemes` must be schemes of URLs that fsspec knows (`fsspec.available_protocols()`), such as "
                f"s3; got {word!r}.{did_you_mean(scheme, known)}"
            )
        schemes[scheme] = None
    return tuple(schemes)


class UndecodableImageError(ValueError):
    """An image that cannot be used, with the reason."""


@dataclass(frozen=True)
class ImageReader:
    """Opens and decodes the images of rows.

    Args:
        schemes (`tuple[str, ...]`): Of URLs that rows may name, also within chains such as `zip://a.png::hf://...`.
    """

    schemes: tuple[str, ...] = SCHEMES

    def decode(self, value: Any) -> Image.Image:
        """An upright RGB image from whatever an image column may hold.

        Transparency is laid on white, 16-bit grey is scaled to 8 bits, EXIF rotation is applied.

        Args:
            value (`PIL.Image.Image`, `bytes`, `str`, `os.PathLike` or `dict`): A `str` is a local path or a URL of one
                of `schemes`; a `dict` has `"bytes"` and `"path"` (bytes go first), as an undecoded `datasets.Image`
                has.

        Raises:
            UndecodableImageError: With the reason: damaged, missing, too small, too long, too large, of unknown kind,
                or at a place where rows may not send this machine.
        """
        try:
            image = self._open(value)
            if image.width * image.height > MAX_PIXELS:
                raise UndecodableImageError(f"{_size(image)} is too large: {MAX_PIXELS} pixels at most")
            image.load()
            image = _to_rgb(ImageOps.exif_transpose(image))
        except UndecodableImageError:
            raise
        except UnidentifiedImageError as error:
            raise UndecodableImageError("is of no image format that Pillow knows") from error
        except Exception as error:  # decoders and file systems raise every kind, and no row may end the run
            raise UndecodableImageError(f"cannot be decoded ({type(error).__name__}: {error})") from error
        short, long = sorted(image.size)
        if short < MIN_SIDE:
            raise UndecodableImageError(f"{_size(image)} is too small: sides of {MIN_SIDE} pixels at least")
        if long > MAX_ASPECT_RATIO * short:
            raise UndecodableImageError(f"{_size(image)} is too long: {MAX_ASPECT_RATIO} to 1 at most")
        return image

    def slot(self, images: Sequence[Any], slot: int) -> Image.Image:
        """One of a row's images, decoded; the error names the slot."""
        if slot >= len(images):
            raise UndecodableImageError(f"image {slot} is missing: the row has {len(images)} images")
        try:
            return self.decode(images[slot])
        except UndecodableImageError as error:
            raise UndecodableImageError(f"image {slot} {error}") from error

    def problem(self, image: Any) -> str:
        """Why an image cannot be used; empty if it can."""
        try:
            self.decode(image)
        except UndecodableImageError as error:
            return str(error)
        return ""

    def _open(self, value: Any) -> Image.Image:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
            if not value:
                raise UndecodableImageError("is missing: neither bytes nor a path")
        if isinstance(value, Image.Image):
            return value
        if isinstance(value, str | os.PathLike):
            value = self._read(os.fspath(value))
        if isinstance(value, bytes | bytearray | memoryview):
            return Image.open(io.BytesIO(value), formats=FILE_FORMATS)
        if value is None:
            raise UndecodableImageError("is missing: got None")
        raise UndecodableImageError(
            f"is of unknown kind {type(value).__name__}: expected a PIL image, bytes, a path or a dict of both"
        )

    def _read(self, path: str) -> bytes:
        """What stands at a path or URL, which is not opened before it is known to be harmless."""
        if "://" not in path:
            _check_file(path, MAX_FILE_BYTES)
            with open(path, "rb") as file:
                return _bounded(file.read(MAX_FILE_BYTES + 1))
        hops = path.split("::")
        for place, hop in enumerate(hops):
            scheme = _scheme(hop)
            if scheme not in self.schemes and not (scheme == "" and place == len(hops) - 1):
                raise UndecodableImageError(
                    f"is at {scheme or hop}://, which rows may not have opened (`image_schemes` allows more): {path}"
                )
            if place > 1:
                raise UndecodableImageError(f"is in an archive within an archive: {path}")
            if place and _scheme(hops[place - 1]) == "tar" and infer_compression(hop) is not None:
                raise UndecodableImageError(
                    f"is in a compressed archive, which would be unpacked whole to find it: {path}. Pack it as .tar"
                )
            if scheme in ("", "file"):
                _check_file(url_to_fs(hop)[1], MAX_FILE_BYTES if len(hops) == 1 else None)
        with fsspec.open(path, "rb") as file:
            return _bounded(file.read(MAX_FILE_BYTES + 1))


def decode_image(value: Any) -> Image.Image:
    """[`ImageReader.decode`] with the schemes that need not be asked for."""
    return ImageReader().decode(value)


def _scheme(hop: str) -> str:
    """Of one hop of a chain; empty for a plain path. fsspec takes a bare word for a scheme."""
    scheme, separator, _ = hop.partition("://")
    return "" if not separator and re.search("[^a-z]", hop) else scheme


def _check_file(path: str, most: int | None) -> None:
    """Refuse what is no regular file, before it is opened: a pipe would wait for ever, a device never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UndecodableImageError(f"is no regular file: {path}")
    if most is not None and status.st_size > most:
        raise UndecodableImageError(f"is too large a file: {status.st_size} bytes, {most} at most: {path}")


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise UndecodableImageError(f"is too large a file: more than {MAX_FILE_BYTES} bytes")
    return data


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _wide_grey(image)
    if image.mode == "F":
        raise UndecodableImageError(
            "is of mode F: floating-point images have no agreed range, save it in 8 or 16 bits"
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _wide_grey(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would clip everything above 255 to white."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise UndecodableImageError("is of mode I with values outside 16 bits: save it in 8 or 16 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
