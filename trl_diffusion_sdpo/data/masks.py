"""Masks of pairs: the regions in which errors count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .images import ImageReader, PairTransform, Size, UndecodableImageError

INSIDE = 128  # grey value from which a pixel is within a mask


def decode_masks(reader: ImageReader, stored: Sequence[Any]) -> list[Image.Image]:
    """Decode the masks of winner and loser. One mask for both is decoded once.

    Raises:
        UndecodableImageError: If a mask is missing or cannot be decoded, or has no pixel of at least `INSIDE`.
    """
    winner, loser = stored
    first = _decode(reader, winner)
    return [first, first if loser == winner else _decode(reader, loser)]


def _decode(reader: ImageReader, value: Any) -> Image.Image:
    try:
        mask = reader.decode(value).convert("L")
    except UndecodableImageError as error:
        raise UndecodableImageError(f"has a mask that {error}") from error
    if not (np.asarray(mask) >= INSIDE).any():
        raise UndecodableImageError(f"has a mask without a pixel of at least {INSIDE}: white (255) is inside")
    return mask


def place_masks(masks: Sequence[Image.Image], item: dict[str, Any], transform: PairTransform) -> torch.Tensor:
    """Resize, mirror and crop masks as the images of an item were.

    Args:
        masks (`Sequence` of two `PIL.Image.Image`): Masks of winner and loser, of their images' sizes, in grey.
        item (`dict`): Item with `original_sizes`, `crop_top_lefts`, `is_mirrored`, and `target_size` or `pixel_values`.
        transform (`PairTransform`): Transform of the images.

    Returns:
        `torch.Tensor` of shape `(2, 1, H, W)`, uint8: 1 inside the masks and 0 outside.

    Raises:
        UndecodableImageError: If a mask and its image have different sizes.
    """
    target = tuple(item["target_size"] if "target_size" in item else item["pixel_values"].shape[-2:])
    place = partial(_place, transform=transform, target=target, is_mirrored=item["is_mirrored"])
    placed = [place(*each) for each in zip(masks, item["original_sizes"], item["crop_top_lefts"], strict=True)]
    return torch.from_numpy(np.stack(placed)[:, None])


def check_mask_size(mask: Image.Image, size: Size) -> None:
    """Raise `UndecodableImageError` if a mask does not have the `(height, width)` of its image."""
    if (mask.height, mask.width) != tuple(size):
        raise UndecodableImageError(
            f"has a mask of {mask.height} x {mask.width} pixels, and its image has {size[0]} x {size[1]}: they must "
            "be equal"
        )


def _place(
    mask: Image.Image, size: Size, corner: Size, *, transform: PairTransform, target: Size, is_mirrored: bool
) -> np.ndarray:
    check_mask_size(mask, size)
    height, width = transform.resized_size(*size, target)
    resized = mask.resize((width, height), Image.Resampling.NEAREST)
    resized = ImageOps.mirror(resized) if is_mirrored else resized
    top, left = corner
    return (np.asarray(resized)[top : top + target[0], left : left + target[1]] >= INSIDE).astype(np.uint8)
