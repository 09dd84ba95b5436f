"""Decoding, resizing and cropping agree with hand-made images and hand-derived geometry."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion_sdpo.data import UndecodableImageError, decode_image, pixels_as_floats
from trl_diffusion_sdpo.data.transforms import PairDraws, PairTransform


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def column_image(height, width):
    """Every pixel's red value is its column, its green value its row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None, :], np.arange(height)[:, None]
    return Image.fromarray(pixels)


def draws(top=0.0, left=0.0, flip=0.9):
    return PairDraws(top, left, flip, dropout=0.9, seed=0)


def huge_png():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_value_gives_the_same_image(tmp_path):
    image = noise_image(10, 12)
    data, path = encoded(image), tmp_path / "image.png"
    path.write_bytes(data)
    values = [
        image, data, bytearray(data), str(path), path, path.as_uri(), {"bytes": data, "path": "gone.png"},
        {"bytes": None, "path": str(path)},
    ]  # fmt: skip
    for value in values:
        decoded = decode_image(value)
        assert decoded.mode == "RGB"
        assert np.array_equal(np.asarray(decoded), np.asarray(image))


def test_transparent_images_are_composited_on_white():
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.paste((255, 0, 0, 255), (0, 0, 4, 8))
    rgba.paste((0, 0, 0, 51), (0, 4, 4, 8))  # a fifth of black on white: 204
    decoded = decode_image(encoded(rgba))
    assert decoded.getpixel((7, 0)) == (255, 255, 255)
    assert decoded.getpixel((0, 0)) == (255, 0, 0)
    assert decoded.getpixel((0, 7)) == (204, 204, 204)
    assert decode_image(Image.new("LA", (8, 8), (10, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_grey_bilevel_and_cmyk_become_rgb():
    assert decode_image(encoded(Image.new("L", (8, 8), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encoded(Image.new("1", (8, 8), 1))).getpixel((0, 0)) == (255, 255, 255)
    cmyk = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert cmyk.getpixel((0, 0)) == (255, 0, 0)


def test_sixteen_bit_grey_is_scaled_instead_of_clipped():
    levels = np.full((8, 8), 257 * 100, dtype=np.uint16)
    levels[0, 0], levels[0, 1] = 65535, 25572  # 25572 / 257 = 99.502
    decoded = decode_image(encoded(Image.fromarray(levels)))
    assert decoded.getpixel((5, 5)) == (100, 100, 100)
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (100, 100, 100)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (20, 10), "white")
    image.paste("black", (0, 0, 10, 10))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left half comes to the top
    decoded = decode_image(encoded(image, exif=exif))
    assert decoded.size == (10, 20)
    assert decoded.getpixel((5, 2)) == (0, 0, 0)
    assert decoded.getpixel((5, 17)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (encoded(noise_image(64, 64), "JPEG")[:-700], "truncated"),
        (encoded(noise_image(64, 64))[:300], "cannot be decoded"),
        (b"not an image", "image format"),
        (b"", "image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n", "image format"),  # decoded by another program
        (encoded(Image.new("RGB", (1, 1))), "1x1 is too small"),
        (Image.new("RGB", (7, 100)), "7x100 is too small"),
        (Image.new("RGB", (8, 513)), "too long"),
        (huge_png(), "DecompressionBomb"),
        (Image.new("F", (8, 8)), "mode F"),
        ("nowhere/missing.png", "FileNotFoundError"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        (None, "is missing"),
        (3, "unknown kind int"),
    ],
)
def test_unusable_images_are_refused_with_the_reason(value, reason):
    with pytest.raises(UndecodableImageError, match=reason):
        decode_image(value)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (50, 37),
        (20, 31),
        (33, 64),
        (101, 33),
    ],
)
def test_resize_and_centre_crop_are_those_of_torchvision(height, width):
    # torchvision on PIL images: shorter side = size, longer = int(size * longer / shorter), offset int(round(d / 2.0))
    image, size = noise_image(height, width), 32
    long = int(size * max(height, width) / min(height, width))
    new_width, new_height = (size, long) if width <= height else (long, size)
    top, left = int(round((new_height - size) / 2.0)), int(round((new_width - size) / 2.0))
    array = np.asarray(image.resize((new_width, new_height), Image.BILINEAR))[top : top + size, left : left + size]
    expected = torch.from_numpy(array.copy()).permute(2, 0, 1)

    result = PairTransform(size)(image, image, draws(0.7, 0.7))
    assert torch.equal(result.pixel_values, torch.stack([expected, expected]))
    assert result.original_sizes == ((height, width), (height, width))
    assert result.crop_top_lefts == ((top, left), (top, left))


def test_bytes_become_floats_by_division_and_not_by_a_rounded_reciprocal():
    every = np.arange(256, dtype=np.float32)
    expected = (every / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    floats = pixels_as_floats(torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8))
    assert floats.dtype == torch.float32 and floats.shape == (2, 2, 8, 8)
    assert np.array_equal(floats.flatten().numpy(), expected)
    assert floats.min() == -1 and floats.max() == 1
    reciprocal = (every * (np.float32(1) / np.float32(255)) - np.float32(0.5)) / np.float32(0.5)
    assert not np.array_equal(reciprocal, expected)


def test_a_random_crop_is_at_the_drawn_offset():
    image = column_image(16, 40)
    transform = PairTransform(16, center_crop=False)
    result = transform(image, image, draws(left=0.5))  # 24 free columns, 25 places: int(12.5) = 12
    assert result.crop_top_lefts == ((0, 12), (0, 12))
    assert result.pixel_values[0, 0, 0].tolist() == list(range(12, 28))
    assert transform(image, image, draws(left=0.0)).crop_top_lefts[0] == (0, 0)
    assert transform(image, image, draws(left=1 - 1e-9)).crop_top_lefts[0] == (0, 24)


def test_images_of_different_sizes_are_cropped_at_the_same_relative_offset():
    result = PairTransform(16, center_crop=False)(column_image(16, 24), column_image(16, 40), draws(left=0.25))
    assert result.crop_top_lefts == ((0, 2), (0, 6))  # int(0.25 * 9) and int(0.25 * 25)
    assert result.original_sizes == ((16, 24), (16, 40))


def test_both_images_are_mirrored_or_none():
    small, large = column_image(16, 16), column_image(32, 32)
    transform = PairTransform(16, random_flip=True)
    plain = transform(small, large, draws(flip=0.5)).pixel_values
    mirrored = transform(small, large, draws(flip=0.49)).pixel_values
    assert torch.equal(mirrored[0], plain[0].flip(-1))
    assert torch.allclose(mirrored[1].float(), plain[1].flip(-1).float(), atol=1)
    assert not torch.equal(mirrored[0], plain[0])


def test_draws_are_a_function_of_seed_epoch_and_row():
    assert PairDraws.from_key(1, 2, 3) == PairDraws.from_key(1, 2, 3)
    others = [PairDraws.from_key(*key) for key in [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (3, 2, 1)]]
    assert len({other.seed for other in others}) == 6
    assert all(0 <= other.seed < 2**63 for other in others)


# ---- JPEG files decoded at a fraction of their size ------------------------------------------------------------------
