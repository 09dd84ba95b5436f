"""Decodes the values of image columns. Paths and URLs in rows are not trusted: they may name a device, a pipe or
another host, and a small file may decompress to any size. Every failure is an `UndecodableImageError`."""

import errno
import io
import os
import re
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow
from fsspec.core import url_to_fs
from fsspec.utils import infer_compression
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ..utils.hints import did_you_mean

MIN_SIDE = 8  # a VAE encodes 8 x 8 pixels to one latent
MAX_ASPECT_RATIO = 64  # an image is resized by its shorter side: the longer one would exceed any memory
MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 178_956_970  # Pillow's default limit; half a gigabyte as RGB

# Without the formats that Pillow decodes by running other programs, such as EPS.
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Schemes that rows may use by default: local files, members of archives, and files of the Hub, which is how `datasets`
# names the images of a set that it streams from there.
SCHEMES = ("file", "hf", "zip", "tar")


def parse_schemes(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """fsspec's names of the schemes of `image_schemes`, such as `"s3"`, `"S3"` or `"s3://"`, without repeats.

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


Result = TypeVar("Result")

TURNED = (5, 6, 7, 8)  # EXIF orientations under which height and width change places


# What is wrong with a path itself, or with the permission to read it. Other errors of the system, of the network and of
# memory may pass.
OF_THE_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
    *(errno.EACCES, errno.EPERM),
)
# HTTP statuses that do not pass by waiting; 408, 425 and 429 do, as those from 500 on.
LASTING_STATUSES = frozenset(range(400, 500)) - {408, 425, 429}
HTTP_CLIENTS = ("aiohttp", "requests", "httpx", "httpx2", "huggingface_hub")
READ_AGAIN = (1.0, 5.0)  # seconds until an image that could not be read is read again
HOW_TO_GO_ON = (
    "The image may be good, so it is not left out. When it can be read, start again; if it never can, remove its row "
    "from the data set."
)

OF_AN_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError)


class UndecodableImageError(ValueError):
    """An image that cannot be used, with the reason."""


class UnreadableImageError(UndecodableImageError):
    """An image that could not be read, for a reason that may pass: the image itself may be good."""


def read_again(read: Callable[[], Result]) -> Result:
    """What `read` returns; after an error that may pass, it is called again.

    Raises:
        UnreadableImageError: After the last of `READ_AGAIN`, with what to do.
    """
    for seconds in READ_AGAIN:
        try:
            return read()
        except UnreadableImageError:
            time.sleep(seconds)
    try:
        return read()
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{error}, {1 + len(READ_AGAIN)} times. {HOW_TO_GO_ON}") from error


@dataclass(frozen=True)
class ImageReader:
    """Opens and decodes the images of rows.

    Args:
        schemes (`tuple[str, ...]`): URL schemes that rows may use, also in chains such as `zip://a.png::hf://...`.
    """

    schemes: tuple[str, ...] = SCHEMES

    def decode(self, value: Any) -> Image.Image:
        """The value of an image column as an upright RGB image.

        Transparent images are composited on white, 16-bit grey is scaled to 8 bits, EXIF rotation is applied.

        Args:
            value (`PIL.Image.Image`, `bytes`, `str`, `os.PathLike` or `dict`): A `str` is a local path or a URL of one
                of `schemes`; a `dict` has `"bytes"` and `"path"` (bytes take precedence), as an undecoded
                `datasets.Image` has.

        Raises:
            UndecodableImageError: With the reason: damaged, missing, too small, too long, too large, of an unknown
                type, or at a URL whose scheme is not allowed.
        """
        with _failures_as_undecodable(value):
            image = self._open(value)
            _check_pixels(image)
            image.load()
            image = _to_rgb(_upright(image))
            _check_sides(*image.size)
        return image

    def size(self, value: Any) -> tuple[int, int]:
        """`(height, width)` of the image that `decode` would give, read from its header; pixels may still be damaged.

        Raises:
            UndecodableImageError: As `decode`, for what a header shows.
        """
        with _failures_as_undecodable(value), self._header(value) as image:
            _check_pixels(image)
            width, height = image.size
            if isinstance(image, TiffImageFile):  # some versions of Pillow turn the size at once, others when decoding
                width, height = (
                    int(image.tag_v2[tag]) for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)
                )
            if _orientation(image) in TURNED:
                width, height = height, width
            _check_sides(width, height)
        return height, width

    def decode_at(self, images: Sequence[Any], index: int) -> Image.Image:
        """One of a row's images, decoded; the error names its index."""
        return _at(self.decode, images, index)

    def size_at(self, images: Sequence[Any], index: int) -> tuple[int, int]:
        """`size` of one of a row's images; the error names its index."""
        return _at(self.size, images, index)

    def problem(self, image: Any) -> str:
        """Why an image cannot be used; empty if it can.

        Raises:
            UnreadableImageError: If it could not be read repeatedly, though it may be good.
        """
        try:
            read_again(partial(self.decode, image))
        except UnreadableImageError:
            raise
        except UndecodableImageError as error:
            return str(error)
        return ""

    @contextmanager
    def _header(self, value: Any) -> Iterator[Image.Image]:
        """An image whose pixels are not read; bytes are not copied, and of a local file only the beginning is read."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | bytearray | memoryview):
            value = pyarrow.BufferReader(value)
        elif isinstance(value, str | os.PathLike) and "://" not in os.fspath(value):
            _check_file(os.fspath(value), MAX_FILE_BYTES)
        else:
            yield self._open(value)
            return
        with Image.open(value, formats=FILE_FORMATS) as image:
            yield image

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
        """The bytes at a path or URL, which is checked before it is opened."""
        if "://" not in path:
            _check_file(path, MAX_FILE_BYTES)
            with open(path, "rb") as file:
                return _bounded(file.read(MAX_FILE_BYTES + 1))
        hops = path.split("::")
        for depth, hop in enumerate(hops):
            scheme = _scheme(hop)
            if scheme not in self.schemes and not (scheme == "" and depth == len(hops) - 1):
                raise UndecodableImageError(
                    f"is at {scheme or hop}://, which rows may not have opened (`image_schemes` allows more): {path}"
                )
            if depth > 1:
                raise UndecodableImageError(f"is in an archive within an archive: {path}")
            if depth and _scheme(hops[depth - 1]) == "tar" and infer_compression(hop) is not None:
                raise UndecodableImageError(
                    f"is in a compressed archive, all of which would be unpacked to find it: {path}. Pack it as .tar"
                )
            if scheme in ("", "file"):
                _check_file(url_to_fs(hop)[1], MAX_FILE_BYTES if len(hops) == 1 else None)
        with _failures_as_unreadable(), fsspec.open(path, "rb") as file:
            return _bounded(file.read(MAX_FILE_BYTES + 1))


decode_image = ImageReader().decode  # with the default schemes


def _at(read: Callable[[Any], Result], images: Sequence[Any], index: int) -> Result:
    if index >= len(images):
        raise UndecodableImageError(f"image {index} is missing: the row has {len(images)} images")
    try:
        return read(images[index])
    except UndecodableImageError as error:
        raise type(error)(f"image {index} {error}") from error


def _scheme(hop: str) -> str:
    """The scheme of one part of a chained URL, empty for a plain path. fsspec takes a bare word as a scheme."""
    scheme, separator, _ = hop.partition("://")
    return "" if not separator and re.search("[^a-z]", hop) else scheme


def _check_file(path: str, max_bytes: int | None) -> None:
    """Refuse anything but a regular file before it is opened: reading a pipe blocks, and a device has no end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UndecodableImageError(f"is no regular file: {path}")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UndecodableImageError(f"is too large a file: {status.st_size} bytes, {max_bytes} at most: {path}")


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise UndecodableImageError(f"is too large a file: more than {MAX_FILE_BYTES} bytes")
    return data


@contextmanager
def _failures_as_undecodable(value: Any) -> Iterator[None]:
    """Any failure of an image as an `UndecodableImageError` that names its file, if it has one."""
    try:
        with _any_as_undecodable():
            yield
    except UndecodableImageError as error:
        name = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(name, str | os.PathLike) or os.fspath(name) in str(error):
            raise
        raise type(error)(f"{error}: {os.fspath(name)}") from error


@contextmanager
def _any_as_undecodable() -> Iterator[None]:
    try:
        yield
    except UndecodableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableImageError("is of no image format that Pillow knows") from error
    except Exception as error:  # decoders and file systems raise any type; a bad row must not stop the run
        raise as_undecodable(error, "cannot be decoded") from error


def as_undecodable(error: Exception, what: str) -> UndecodableImageError:
    """The error of an image for any that was raised while it was read or decoded; `what` says what cannot be done."""
    kind = UnreadableImageError if _may_pass(error) else UndecodableImageError
    return kind(f"{what} ({type(error).__name__}: {error})")


def _may_pass(error: Exception) -> bool:
    """Whether an error is of the system or of memory. Decoders raise `OSError` without a number for damaged images."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in OF_THE_PATH
    return isinstance(error, MemoryError | TimeoutError | ConnectionError)


@contextmanager
def _failures_as_unreadable() -> Iterator[None]:
    """Libraries of storages have errors of their own: whatever they raise may pass, unless nothing is there, it may
    not be read, or what is there is damaged."""
    try:
        yield
    except Exception as error:
        # fsspec's HTTP file system says of every request that fails, whatever the reason, that there is no file.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and _is_of_http(error.__cause__) else error
        status = _http_status(cause)
        if status in LASTING_STATUSES:
            raise UndecodableImageError(f"cannot be read: the server's answer has HTTP status {status}") from error
        if status is None and isinstance(cause, (FileNotFoundError, PermissionError, ValueError, *OF_AN_ARCHIVE)):
            raise
        raise UnreadableImageError(f"cannot be read ({type(cause).__name__}: {cause})") from error


def _http_status(error: Any) -> int | None:
    """The status of a server's answer: aiohttp's errors have it themselves, others in their response."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_http(error: Any) -> bool:
    return isinstance(error, TimeoutError) or type(error).__module__.partition(".")[0] in HTTP_CLIENTS


def _check_pixels(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UndecodableImageError(f"{width}x{height} is too large: {MAX_PIXELS} pixels at most")


def _check_sides(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise UndecodableImageError(f"{width}x{height} is too small: sides of {MIN_SIDE} pixels at least")
    if long > MAX_ASPECT_RATIO * short:
        raise UndecodableImageError(f"{width}x{height} is too long: {MAX_ASPECT_RATIO} to 1 at most")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation by which `decode` turns an image; its pixels are read only where they must be."""
    if isinstance(image, PngImageFile) and image.fp is not None and not _has_late_metadata(image.fp):
        exif = Image.Image.getexif(image)  # `PngImageFile.getexif` decodes an image for what may come after its pixels
    else:
        exif = image.getexif()
    return exif.get(ExifTags.Base.Orientation, 1)


def _has_late_metadata(file: Any) -> bool:
    """Whether a PNG has texts or EXIF, which hold the orientation, after its pixels."""
    place, end, chunk, after, found = file.tell(), file.seek(0, os.SEEK_END), 8, False, False
    while chunk + 8 <= end and not found:
        file.seek(chunk)
        length, kind = struct.unpack(">I4s", file.read(8))
        found = after and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        after |= kind == b"IDAT"
        chunk += length + 12  # with its length, kind and checksum
    file.seek(place)
    return found


def _upright(image: Image.Image) -> Image.Image:
    """With its EXIF rotation applied; the same object if it has none, of which Pillow would make a copy."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _wide_grey(image)
    if image.mode == "F":
        raise UndecodableImageError(
            "is of mode F: floating-point images have no agreed range, save it in 8 or 16 bits"
        )
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _wide_grey(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's conversion clips everything above 255 to white."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise UndecodableImageError("is of mode I with values outside 16 bits: save it in 8 or 16 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
