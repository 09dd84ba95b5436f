"""Decoding of images from the values of image columns.

Paths and URLs in rows are not trusted. They may name a device, a pipe or another host. A small file may decompress to
any size.

A bad image raises `UndecodableImageError`, and its row is left out. A storage that fails repeatedly raises
`UnreadableImageError`, and the run ends. The run does not continue without the image, because the image may be good and
leaving it out would change the training.
"""

import errno
import io
import os
import re
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
import pyarrow
import torch
from fsspec.core import url_to_fs
from fsspec.utils import infer_compression
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..utils.files import check_regular_file
from ..utils.hints import did_you_mean
from ..utils.secrets import without_secrets

MIN_SIDE = 8  # because a VAE encodes 8 x 8 pixels to one latent
MAX_ASPECT_RATIO = 64  # images are resized by the shorter side, so the longer side of a strip would not fit in memory
MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 178_956_970  # default limit of Pillow; half a gigabyte as RGB

# Formats such as EPS are missing, because Pillow decodes them by running other programs.
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Schemes that rows may use by default: local files, members of archives, and files of the Hub. The scheme `hf` is
# needed because `datasets` names the images of a set that it streams from the Hub by such URLs.
SCHEMES = ("file", "hf", "zip", "tar")

READ_AGAIN = (1.0, 5.0)  # seconds before an image is read again after an error that may pass
HOW_TO_GO_ON = (
    "The image may be good, so it is not left out. When the storage answers again, start the run again, with "
    "`resume_from_checkpoint` if it has saved a checkpoint. If it never does, remove the row from the data set."
)
# Errors caused by the path or by missing permission. Other errors with a number may be temporary.
PERMANENT_ERRORS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
    *(errno.EACCES, errno.EPERM),
)
PERMANENT_STATUSES = (400, 401, 403, 404, 405, 410, 414, 451)  # HTTP status codes
DAMAGED_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError)
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width

FAST = "fast"
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    FAST: Image.Resampling.BILINEAR,
}

FULL_SIZE: Any = object()  # key in `Image.info`; an object, because files can set string keys

Size = tuple[int, int]
Covering = Callable[[int, int], Size]  # from `(height, width)` of an image to the size that it is resized to
Result = TypeVar("Result")


class UndecodableImageError(ValueError):
    """Error for an image that cannot be used. Passwords in URLs are removed from the message."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class UnreadableImageError(ValueError):
    """Error for a storage that failed repeatedly. The image may be good."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def parse_schemes(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Parse `image_schemes` and return the names that fsspec uses, without repeats.

    `"s3"`, `"S3"` and `"s3://"` all become `"s3"`.

    Raises:
        ValueError: If fsspec knows no such scheme, or a package that it needs is not installed.
    """
    words = [value] if isinstance(value, str) else list(value or ())
    schemes: dict[str, None] = {}
    for word in words:
        scheme = str(word).removesuffix("://").lower()
        if scheme not in fsspec.available_protocols():
            raise ValueError(
                "`image_schemes` must be URL schemes from `fsspec.available_protocols()`, such as s3; got "
                f"{word!r}.{did_you_mean(scheme, fsspec.available_protocols())}"
            )
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise ValueError(f"`image_schemes={word!r}` needs a package that is not installed: {error}.") from error
        schemes[scheme] = None
    return tuple(schemes)


@dataclass(frozen=True)
class ImageReader:
    """Reader that opens and decodes the images of rows. After a temporary error, it reads the image again.

    Args:
        schemes (`tuple[str, ...]`): URL schemes that rows may use, also in chains such as `zip://a.png::hf://...`.
    """

    schemes: tuple[str, ...] = SCHEMES

    def decode(self, value: Any, covering: Covering | None = None) -> Image.Image:
        """Decode the value of an image column into an upright RGB image.

        Transparent images are composited on white. 16-bit grey is scaled to 8 bits. EXIF rotation is applied.

        Args:
            value (`PIL.Image.Image`, `bytes`, `str`, `os.PathLike` or `dict`): A `str` is a local path or a URL of one
                of `schemes`. A `dict` has the keys `"bytes"` and `"path"`, like an undecoded `datasets.Image`; bytes
                take precedence.
            covering (`Callable`, *optional*): Function that returns the size that the image will be resized to. To
                save time, a JPEG at least twice as large is then decoded at a half, a quarter or an eighth of its
                size. [`full_size`] returns its size in the file.

        Raises:
            UndecodableImageError: If the image is damaged, missing, too small, too long, too large, or of an unknown
                type, or if the scheme of its URL is not allowed.
            UnreadableImageError: If the storage failed repeatedly.
        """
        return _read_patiently(partial(self._decode, covering=covering), value)

    def size(self, value: Any) -> tuple[int, int]:
        """Return `(height, width)` of the image that `decode` would return, by reading the header only.

        Damaged pixels are not detected. If a PNG stores its rotation after the pixels, the rotation is not seen.

        Raises:
            UndecodableImageError: Like `decode`, if the header shows the problem.
            UnreadableImageError: If the storage failed repeatedly.
        """
        return _read_patiently(self._size, value)

    def decode_at(self, images: Sequence[Any], index: int, covering: Covering | None = None) -> Image.Image:
        """Decode one of the images of a row. Errors name the index of the image."""
        return _at(partial(self.decode, covering=covering), images, index)

    def _decode(self, value: Any, covering: Covering | None = None) -> Image.Image:
        with self._opened(value) as image:
            if covering is not None and image is not value and image.format == "JPEG":
                return _draft(image, covering)
            image.load()
            image = _to_rgb(_upright(image))
            _check_sides(*image.size)
            return image

    def _size(self, value: Any) -> tuple[int, int]:
        with self._opened(value) as image:
            if image.format == "TIFF":  # Pillow itself rotates a TIFF while decoding
                image.load()
                width, height = _upright(image).size
            else:
                height, width = _upright_size(image)
            _check_sides(width, height)
        return height, width

    @contextmanager
    def _opened(self, value: Any) -> Iterator[Image.Image]:
        """Open an image, and check its number of pixels before they are decoded."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, Image.Image):
            _check_pixels(value)
            yield value
            return
        if isinstance(value, str | os.PathLike):
            path = os.fspath(value)
            value = self._download(path) if "://" in path else _check_file(path, MAX_FILE_BYTES)
        elif isinstance(value, bytes | bytearray | memoryview):
            value = pyarrow.BufferReader(value)  # without a copy
        elif value is None:
            raise UndecodableImageError("is missing: neither bytes nor a path")
        else:
            raise UndecodableImageError(
                f"is of unknown kind {type(value).__name__}: expected a PIL image, bytes, a path or a dict of both"
            )
        with Image.open(value, formats=FILE_FORMATS) as image:
            _check_pixels(image)
            yield image

    def _download(self, url: str) -> io.BytesIO:
        """Read the bytes at a URL, or of a member of an archive. The URL is checked before it is opened."""
        hops = url.split("::")
        for depth, hop in enumerate(hops):
            scheme = _scheme(hop)
            if scheme not in self.schemes and not (scheme == "" and depth == len(hops) - 1):
                raise UndecodableImageError(
                    f"is at {scheme or hop}://, which rows may not have opened (`image_schemes` allows more): {url}"
                )
            if depth > 1:
                raise UndecodableImageError(f"is in an archive within an archive: {url}")
            if depth and _scheme(hops[depth - 1]) == "tar" and infer_compression(hop) is not None:
                raise UndecodableImageError(
                    f"is in a compressed archive, all of which would be unpacked to find it: {url}. Pack it as .tar"
                )
            if scheme in ("", "file"):
                _check_file(url_to_fs(hop)[1], MAX_FILE_BYTES if len(hops) == 1 else None)
        try:
            with fsspec.open(url, "rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except Exception as error:
            raise _storage_error(error) from None  # the traceback of `error` may show the password in the URL
        if len(content) > MAX_FILE_BYTES:
            raise UndecodableImageError(f"is too large a file: more than {MAX_FILE_BYTES} bytes")
        return io.BytesIO(content)


decode_image = ImageReader().decode  # uses the default schemes


def as_undecodable(error: Exception, what: str) -> UndecodableImageError | UnreadableImageError:
    """Convert an error raised while an image was read to an image error. `what` begins the message."""
    if isinstance(error, UndecodableImageError | UnreadableImageError):
        return error
    if isinstance(error, UnidentifiedImageError):
        return UndecodableImageError("is not an image format that Pillow can read")
    may_pass = isinstance(error, MemoryError | TimeoutError | ConnectionError)
    if (
        isinstance(error, OSError) and error.errno is not None
    ):  # for damaged images, decoders raise OSError without a number
        may_pass = error.errno not in PERMANENT_ERRORS
    if may_pass:
        return UnreadableImageError(f"cannot be read ({type(error).__name__}: {error})")
    return UndecodableImageError(f"{what} ({type(error).__name__}: {error})")


def _read_patiently(read: Callable[[Any], Result], value: Any) -> Result:
    """Return `read(value)`. Convert any failure to one of the two errors of this module, and name the file in it."""
    for pause in (*READ_AGAIN, None):
        try:
            return read(value)
        except (
            Exception
        ) as error:  # decoders and file systems raise errors of any type, and a bad row must not stop the run
            failure = as_undecodable(error, "cannot be decoded")
            reason = str(failure)
            name = value.get("path") if isinstance(value, Mapping) else value
            if isinstance(name, str | os.PathLike) and without_secrets(os.fspath(name)) not in reason:
                reason = f"{reason}: {os.fspath(name)}"
            if isinstance(failure, UndecodableImageError):
                raise UndecodableImageError(reason) from (None if failure is error else error)
            if pause is None:
                raise UnreadableImageError(f"{reason}, {len(READ_AGAIN) + 1} times. {HOW_TO_GO_ON}") from error
        time.sleep(pause)
    raise AssertionError


def _at(read: Callable[[Any], Result], images: Sequence[Any], index: int) -> Result:
    if index >= len(images):
        raise UndecodableImageError(f"image {index} is missing: the row has {len(images)} images")
    try:
        return read(images[index])
    except (UndecodableImageError, UnreadableImageError) as error:
        raise type(error)(f"image {index} {error}") from error


def _scheme(hop: str) -> str:
    """Return the scheme of one part of a chained URL; empty for a plain path. A single word is a scheme for fsspec."""
    scheme, separator, _ = hop.partition("://")
    return "" if not separator and re.search("[^a-z]", hop) else scheme


def _check_file(path: str, max_bytes: int | None) -> str:
    """Return a path after checking that it is a regular file. The file is not opened."""
    try:
        check_regular_file(path, max_bytes)
    except ValueError as error:
        raise UndecodableImageError(str(error)) from None
    return path


def _storage_error(error: Exception) -> UndecodableImageError | UnreadableImageError:
    """Convert an error of a storage library to an image error.

    The error counts as permanent if the file is missing, forbidden or damaged. All other errors count as temporary.
    """
    # The HTTP file system of fsspec raises FileNotFoundError for every failed request. The cause has the real reason.
    cause = (isinstance(error, FileNotFoundError) and error.__cause__) or error
    status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
    if status is None:
        permanent = isinstance(cause, (FileNotFoundError, PermissionError, ValueError, *DAMAGED_ARCHIVE))
    else:
        permanent = status in PERMANENT_STATUSES
    kind = UndecodableImageError if permanent else UnreadableImageError
    answer = "" if status is None else f"HTTP status {status}, "
    return kind(f"cannot be read ({answer}{type(cause).__name__}: {cause})")


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


def full_size(image: Image.Image) -> tuple[int, int]:
    """Return `(height, width)` of an image in its file. With `covering`, the decoded image may be smaller."""
    return image.info.get(FULL_SIZE, (image.height, image.width))


def _draft(image: Image.Image, covering: Covering) -> Image.Image:
    """Decode a JPEG at the smallest scale of 1, 1/2, 1/4 and 1/8 that is at least as large as `covering` returns."""
    height, width = _upright_size(image)
    _check_sides(width, height)
    wanted = covering(height, width)
    image.draft(None, wanted if _is_turned(image) else wanted[::-1])  # Pillow takes (width, height)
    image.load()
    image = _to_rgb(_upright(image))
    image.info[FULL_SIZE] = (height, width)
    return image


def _is_turned(image: Image.Image) -> bool:
    """Return whether the EXIF rotation in the header swaps height and width."""
    # `PngImageFile.getexif` would decode the pixels, to find EXIF data after them.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation) in TURNED


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return `(height, width)` after EXIF rotation, from the header alone."""
    return image.size if _is_turned(image) else (image.height, image.width)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation. An image without rotation is returned itself, because Pillow would copy it."""
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
        return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy an RGB image
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def _wide_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits. The conversion of Pillow would clip all values above 255 to white."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise UndecodableImageError("is of mode I with values outside 16 bits: save it in 8 or 16 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


# ---- From decoded images to pixels


@dataclass(frozen=True)
class PairDraws:
    """All random numbers of one pair in one epoch. They are drawn together: disabling one changes no other.

    Attributes:
        top, left (`float` in `[0, 1)`): Crop offset as a fraction of the free space. Images of different sizes are
            therefore cropped at the same relative position.
        flip (`float` in `[0, 1)`): The pair is mirrored if this is below 0.5.
        dropout (`float` in `[0, 1)`): The prompt is emptied if this is below the dropout probability.
        seed (`int` in `[0, 2**63)`): Seed of the pair's noise and timestep.
    """

    top: float
    left: float
    flip: float
    dropout: float
    seed: int

    @classmethod
    def from_key(cls, seed: int, epoch: int, row: int) -> "PairDraws":
        """Draw the numbers of a pair from a non-negative key. They are equal on every machine and in every process."""
        generator = np.random.default_rng([seed, epoch, row])
        top, left, flip, dropout = generator.random(4).tolist()
        return cls(top, left, flip, dropout, int(generator.integers(0, 2**63 - 1, endpoint=True)))


class PairPixels(NamedTuple):
    """Transformed pair, winner first."""

    pixel_values: torch.Tensor  # (2, 3, H, W), uint8 RGB
    original_sizes: tuple[Size, Size]  # (height, width) before resizing
    crop_top_lefts: tuple[Size, Size]  # (top, left) in the resized, possibly mirrored, image
    is_mirrored: bool


def pixels_as_floats(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels to the floats that the VAE takes, `(x / 255 - 0.5) / 0.5`. The result is bit-equal on all devices.

    Args:
        pixels (`torch.Tensor` of any shape, uint8): On any device. Tensors of another dtype are assumed to be in
            `[-1, 1]` and returned unchanged.

    Returns:
        `torch.Tensor` of the same shape, float32 in `[-1, 1]`, on the same device.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    return pixels.float().div_(white(pixels.device)).sub_(0.5).div_(0.5)


@lru_cache(maxsize=16)
def white(device: torch.device) -> torch.Tensor:
    """Return 255 as a tensor, because CUDA divides by a Python scalar with a rounded reciprocal."""
    return torch.full((), 255.0, device=device)


class PairTransform:
    """Transform that resizes, flips and crops both images of a pair with the same random numbers.

    The resized image keeps its aspect ratio and covers the target. For a square target, the shorter side becomes
    `resolution` and the longer side is rounded down, like torchvision's `Resize(int)` on PIL images.

    Args:
        resolution (`int` or `tuple[int, int]`): Side of the square target, or `(height, width)`.
        center_crop (`bool`): Crop at the center instead of at random.
        random_flip (`bool`): Mirror half of the pairs.
        interpolation (`str`): `"bilinear"`, `"bicubic"`, `"lanczos"` or `"fast"`. `fast` is bilinear, but resizes
            the cropped part only. It also decodes JPEG files at a fraction of their size if that covers the target (see
            [`PairTransform.covering`]).
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        *,
        center_crop: bool = True,
        random_flip: bool = False,
        interpolation: str = "bilinear",
    ) -> None:
        size = tuple(resolution) if isinstance(resolution, tuple | list) else (resolution, resolution)
        if len(size) != 2 or any(not isinstance(side, int) or side < MIN_SIDE for side in size):
            raise ValueError(
                f"`resolution` must be one or two (height, width) integers of at least {MIN_SIDE}, got {resolution!r}."
            )
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {sorted(INTERPOLATIONS)}, got {interpolation!r}.")
        self.height, self.width = size
        self.center_crop, self.random_flip, self.interpolation = center_crop, random_flip, interpolation

    def __call__(
        self, winner: Image.Image, loser: Image.Image, draws: PairDraws | None = None, target: Size | None = None
    ) -> PairPixels:
        """Transform two RGB images of any sizes into pixels. Without `draws`, crop at the center and do not flip.
        `target`, as `(height, width)`, replaces `resolution`."""
        pixels, corners = zip(*(self.image(image, draws, target) for image in (winner, loser)), strict=True)
        sizes = full_size(winner), full_size(loser)
        return PairPixels(torch.stack(pixels), sizes, corners, self.mirrors(draws))

    def mirrors(self, draws: PairDraws | None) -> bool:
        """Whether the images of a pair with these draws are mirrored."""
        return draws is not None and self.random_flip and draws.flip < 0.5

    def covering(self, target: Size | None = None) -> Covering | None:
        """Return the argument `covering` of [`ImageReader.decode`], or `None` if images are decoded at full size."""
        return partial(self.resized_size, target=target) if self.interpolation == FAST else None

    def resized_size(self, height: int, width: int, target: Size | None = None) -> Size:
        """Return the smallest `(height, width)` that covers the target and has the aspect ratio of the image."""
        target_height, target_width = (self.height, self.width) if target is None else target
        if width * target_height <= height * target_width:  # the width determines the scale
            return target_width * height // width, target_width
        return target_height, target_height * width // height

    def image(
        self, image: Image.Image, draws: PairDraws | None = None, target: Size | None = None
    ) -> tuple[torch.Tensor, Size]:
        """Return the pixels `(3, H, W)` of an image, and the top left corner of the crop."""
        height, width = self.resized_size(*full_size(image), target)
        mirrors = self.mirrors(draws)
        target_height, target_width = (self.height, self.width) if target is None else target
        top, left = self._corner(height - target_height, width - target_width, draws)
        if self.interpolation == FAST:
            # Find the crop in the decoded image, before it is mirrored.
            first = width - target_width - left if mirrors else left
            down, across = image.height / height, image.width / width
            box = (first * across, top * down, (first + target_width) * across, (top + target_height) * down)
            image = image.resize((target_width, target_height), INTERPOLATIONS[FAST], box)
            image = ImageOps.mirror(image) if mirrors else image
        else:
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
            image = ImageOps.mirror(image) if mirrors else image
            image = image.crop((left, top, left + target_width, top + target_height))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
        return pixels.contiguous(), (top, left)

    def _corner(self, free_height: int, free_width: int, draws: PairDraws | None) -> Size:
        if draws is None or self.center_crop:
            return round(free_height / 2), round(free_width / 2)
        return int(draws.top * (free_height + 1)), int(draws.left * (free_width + 1))
