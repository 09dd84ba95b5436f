"""Decodes images from the values of image columns.

Paths and URLs in rows are checked before they are read: they may name a device, a pipe or any host. Sizes are checked
before pixels are decoded: a small file may decompress to any size.

A bad image raises `UndecodableImageError`, which skips its pair. Storage that does not answer raises
`UnreadableImageError`, which ends the run: the image may be good.
"""

import errno
import io
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
from fsspec.core import url_to_fs
from fsspec.utils import infer_compression
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..utils.errors import UserError
from ..utils.hints import did_you_mean
from ..utils.secrets import without_secrets

MIN_SIDE = 8  # a VAE encodes 8 x 8 pixels to one latent
MAX_ASPECT_RATIO = 64  # beyond it, resized images would not fit in memory
MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 178_956_970  # default limit of Pillow; half a gigabyte of RGB pixels

# Formats that Pillow may decode. For EPS and others, it would run other programs.
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Suffixes of common formats that are not read.
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jxl")
# URL schemes that rows may use by default: local files, members of archives, and files of the Hub, whose images
# `datasets` streams as `hf`.
SCHEMES = ("file", "hf", "zip", "tar")

HOW_TO_GO_ON = "The image may be good, so it is not skipped. Resume the run when the storage answers again."
# `errno` values of a wrong path or a missing permission. Others may be temporary.
PERMANENT_ERRORS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EACCES,
    errno.EPERM,
)
ABSENT_OR_DAMAGED = (
    FileNotFoundError,
    PermissionError,
    ValueError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    KeyError,
)
# Begins the bytes that replace an image in memory that cannot be stored. The reason follows.
BAD_IMAGE = b"trl-diffusion-sdpo: bad image: "
# aiohttp's errors for a redirect to another scheme than HTTP, and for endless redirects. aiohttp is optional.
BAD_REDIRECTS = ("RedirectClientError", "TooManyRedirects")
SYSTEM_FOLDERS = ("/proc/", "/sys/")  # made by the kernel; reading some of their files fails
INSIDE = 128  # grey value from which a pixel of a mask is inside
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width

Size = tuple[int, int]


class _ImageError(UserError):
    """Base class of errors for images. Their messages show no passwords in URLs."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class UndecodableImageError(_ImageError):
    """The image cannot be decoded or used."""


class UnreadableImageError(_ImageError):
    """The storage of an image does not answer. The image may be good."""


def parse_schemes(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return `image_schemes` as a tuple.

    Raises:
        ValueError: If fsspec does not know a scheme, or its package is not installed.
    """
    schemes = [value] if isinstance(value, str) else list(value or ())
    for scheme in schemes:
        if scheme not in fsspec.available_protocols():
            raise UserError(
                "`image_schemes` must be URL schemes from `fsspec.available_protocols()`, such as s3; got "
                f"{scheme!r}.{did_you_mean(str(scheme), fsspec.available_protocols())}"
            )
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise UserError(f"`image_schemes={scheme!r}` needs a package that is not installed: {error}.") from error
    return tuple(schemes)


@dataclass(frozen=True)
class ImageReader:
    """Opens and decodes the images of rows.

    Args:
        schemes (`tuple[str, ...]`): URL schemes that rows may use, also chained as in `zip://a.png::hf://...`.
    """

    schemes: tuple[str, ...] = SCHEMES

    def decode(self, value: Any) -> Image.Image:
        """Decode the value of an image column into an upright RGB image.

        Transparent images get a white background. 16-bit grey is scaled to 8 bits. EXIF rotation is applied.

        Args:
            value (`PIL.Image.Image`, `bytes`, `str`, `os.PathLike` or `dict`): A `str` is a local path, or a URL with
                one of `schemes`. A `dict` has the keys `"bytes"`, which take precedence, and `"path"`, like an
                undecoded `datasets.Image`.

        Raises:
            UndecodableImageError: If the image is damaged, missing, too small, too elongated, too large or of an
                unknown type, or the scheme of its URL is not allowed.
            UnreadableImageError: If its storage does not answer.
        """
        with _image_errors(value), self._opened(value) as image:
            image.load()
            decoded = _to_rgb(_upright(image))
            _check_sides(decoded.height, decoded.width)
            return decoded

    def size(self, value: Any) -> Size:
        """Return the `(height, width)` that `decode` would give the image, from the header of the file only.

        Damaged pixels stay unseen, and so does a PNG's EXIF rotation if it is stored after the pixels. For what the
        header shows, it raises the same errors as `decode`.
        """
        with _image_errors(value), self._opened(value) as image:
            if image.format == "TIFF":  # Pillow itself rotates a TIFF while decoding
                image.load()
                image = _upright(image)
                height = image.height
                width = image.width
            else:
                height, width = _upright_size(image)
            _check_sides(height, width)
            return height, width

    def decode_mask(self, value: Any) -> Image.Image:
        """Decode a mask into a grey image. Raise `UndecodableImageError` if all pixels are below `INSIDE`."""
        try:
            mask = self.decode(value).convert("L")
        except UndecodableImageError as error:
            raise UndecodableImageError(f"has a mask that {error}") from None
        if not (np.asarray(mask) >= INSIDE).any():
            raise UndecodableImageError(f"has a mask without a pixel of at least {INSIDE}: paint the inside white")
        return mask

    @contextmanager
    def _opened(self, value: Any) -> Iterator[Image.Image]:
        """Open an image and check its number of pixels before they are decoded."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, Image.Image):
            _check_pixels(value)
            yield value
            return
        if isinstance(value, str | os.PathLike):
            path = os.fspath(value)
            if "://" in path:
                value = self._download(path)
            else:
                check_regular_file(path, MAX_FILE_BYTES)
        elif isinstance(value, bytes | bytearray | memoryview):
            if bytes(value[: len(BAD_IMAGE)]) == BAD_IMAGE:
                raise UndecodableImageError(bytes(value[len(BAD_IMAGE) :]).decode())
            value = pyarrow.BufferReader(value)  # without a copy
        elif value is None:
            raise UndecodableImageError("is missing: the row has neither bytes nor a path")
        else:
            raise UndecodableImageError(
                f"is of unknown kind {type(value).__name__}: expected a PIL image, bytes, a path, or a dict with "
                "the key `bytes` or `path`"
            )
        with Image.open(value, formats=FILE_FORMATS) as image:
            _check_pixels(image)
            yield image

    def _download(self, url: str) -> io.BytesIO:
        """Read the file at a URL, perhaps a member of an archive. The URL is checked first."""
        hops = url.split("::")
        for depth, hop in enumerate(hops):
            scheme = _scheme(hop)
            if scheme not in self.schemes and not (scheme == "" and depth == len(hops) - 1):
                raise UndecodableImageError(
                    f"has the URL scheme {scheme or hop}, which rows may not use unless `image_schemes` names it: {url}"
                )
            if depth > 1:
                raise UndecodableImageError(f"is in an archive within an archive: {url}")
            if depth and _scheme(hops[depth - 1]) == "tar" and infer_compression(hop) is not None:
                raise UndecodableImageError(
                    f"is in a compressed archive, which would have to be unpacked completely: {url}. Use a plain .tar"
                )
            if scheme in ("", "file"):
                check_regular_file(url_to_fs(hop)[1], MAX_FILE_BYTES if len(hops) == 1 else None)
        try:
            with fsspec.open(url, "rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except Exception as error:
            # fsspec raises FileNotFoundError for every failed HTTP request; the HTTP status is in its cause.
            cause = (isinstance(error, FileNotFoundError) and error.__cause__) or error
            status = getattr(cause, "status", None)
            is_refused = status is not None and 400 <= status < 500 and status not in (408, 429)
            is_misled = any(base.__name__ in BAD_REDIRECTS for base in type(cause).__mro__)
            is_absent = is_refused or is_misled or isinstance(cause, ABSENT_OR_DAMAGED)
            kind = UndecodableImageError if is_absent else UnreadableImageError
            raise kind(f"cannot be read ({type(cause).__name__}: {cause})") from None
        if len(content) > MAX_FILE_BYTES:
            raise UndecodableImageError(f"is in too large a file: more than {MAX_FILE_BYTES} bytes")
        return io.BytesIO(content)


decode_image = ImageReader().decode  # uses the default schemes


@contextmanager
def _image_errors(value: Any) -> Iterator[None]:
    """Turn every error into `UndecodableImageError` or `UnreadableImageError`, with the file's name.

    The original traceback is dropped: it may show the password in a URL.
    """
    try:
        yield
    except Exception as error:  # decoders raise anything, and a bad image must not stop the run
        kind: type[Exception] = UndecodableImageError
        message = f"cannot be decoded ({type(error).__name__}: {error})"
        if isinstance(error, UndecodableImageError | UnreadableImageError):
            kind, message = type(error), str(error)
        elif isinstance(error, UnidentifiedImageError):
            message = "is not an image format that Pillow can read"
        elif _may_pass(error):
            kind = UnreadableImageError
            message = f"cannot be read ({type(error).__name__}: {error})"
        name = value.get("path") if isinstance(value, Mapping) else value
        if isinstance(name, str | os.PathLike) and without_secrets(os.fspath(name)) not in message:
            message = f"{message}: {os.fspath(name)}"
        if kind is UnreadableImageError:
            message = f"{message}. {HOW_TO_GO_ON}"
        raise kind(message) from None


def _may_pass(error: Exception) -> bool:
    """Return whether reading an image may succeed later, after this `error`."""
    if isinstance(error, OSError) and error.errno is not None:  # damaged images raise OSError without errno
        return error.errno not in PERMANENT_ERRORS
    return isinstance(error, MemoryError | TimeoutError | ConnectionError)


def as_list(value: Any) -> list[Any]:
    """Return the value of an image column, an image or a list of images, as a list."""
    return value if isinstance(value, list) else [value]


def is_image(path: Path) -> bool:
    """Return whether a file has the suffix of a format in `FILE_FORMATS`."""
    return Image.registered_extensions().get(path.suffix.lower()) in FILE_FORMATS


def is_unread_image(path: Path) -> bool:
    """Return whether a file has the suffix of a common image format that is not read."""
    return path.suffix.lower() in UNREAD_SUFFIXES


def check_regular_file(path: str | os.PathLike, max_bytes: int | None) -> None:
    """Raise `UndecodableImageError`, before it is opened, if a path is not a regular file of at most `max_bytes`.
    Reading a pipe would block, and reading a device such as `/dev/zero` would never end."""
    status = os.stat(path)
    if os.path.realpath(path).startswith(SYSTEM_FOLDERS):
        raise UndecodableImageError(f"is a file of the operating system: {os.fspath(path)}")
    if not stat.S_ISREG(status.st_mode):
        raise UndecodableImageError(f"is not a regular file: {os.fspath(path)}")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UndecodableImageError(
            f"is too large a file: {status.st_size} bytes, {max_bytes} at most: {os.fspath(path)}"
        )


def _scheme(hop: str) -> str:
    """Return the scheme of a part of a chained URL, or `""` for a path. A single word is a scheme, as in fsspec."""
    scheme, separator, _ = hop.partition("://")
    return "" if not separator and re.search("[^a-z]", hop) else scheme


def _check_pixels(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UndecodableImageError(f"{width}x{height} is too large: {MAX_PIXELS} pixels at most")


def _check_sides(height: int, width: int) -> None:
    short, long = sorted((width, height))
    if short < MIN_SIDE:
        raise UndecodableImageError(f"{width}x{height} is too small: both sides must have at least {MIN_SIDE} pixels")
    if long > MAX_ASPECT_RATIO * short:
        raise UndecodableImageError(
            f"{width}x{height} is too long: the longer side may be at most {MAX_ASPECT_RATIO} times the shorter side"
        )


def _upright_size(image: Image.Image) -> Size:
    """Return `(height, width)` after EXIF rotation, from the header only."""
    # `PngImageFile.getexif` would decode all pixels to search for EXIF data after the pixels.
    is_turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in TURNED
    return image.size if is_turned else (image.height, image.width)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation. Without one, return the image itself, where Pillow would copy it."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Scale 16 bits to 8: Pillow's conversion would turn all values above 255 into white.
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise UndecodableImageError("has pixels beyond 16 bits (mode I): save the image in 8 or 16 bits")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise UndecodableImageError(
            "has floating-point pixels (mode F), which have no common range of values: save the image in 8 or 16 bits"
        )
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would make a copy
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")
