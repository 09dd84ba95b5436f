"""Resizes, crops and flips decoded images, with the same random numbers for both images of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from .images import INSIDE, Size, UndecodableImageError

INTERPOLATION = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class PairDraws:
    """All random numbers of one pair in one epoch. All are always drawn, so that switching off flips, for example,
    changes no other.

    Attributes:
        top, left (`float` in `[0, 1)`): Offset of the crop, as a fraction of the largest possible one. The same
            fractions apply to both images, even if their sizes differ.
        flip (`float` in `[0, 1)`): Below 0.5, both images are mirrored if flips are on.
        dropout (`float` in `[0, 1)`): Below `prompt_dropout`, the prompt is emptied.
        seed (`int` in `[0, 2**63)`): Seed of the pair's noise and timestep.
    """

    top: float
    left: float
    flip: float
    dropout: float
    seed: int

    @classmethod
    def from_key(cls, seed: int, epoch: int, row: int) -> PairDraws:
        """Draw a pair's random numbers from `seed`, `epoch` and `row`, the same on all machines."""
        generator = np.random.default_rng([seed, epoch, row])
        top, left, flip, dropout = generator.random(4).tolist()
        return cls(top, left, flip, dropout, int(generator.integers(0, 2**63 - 1, endpoint=True)))


class PairPixels(NamedTuple):
    """Transformed images of a pair, the winner first."""

    pixel_values: torch.Tensor  # (2, 3, H, W), uint8 RGB
    original_sizes: tuple[Size, Size]  # (height, width) before resizing
    crop_top_lefts: tuple[Size, Size]  # (top, left) of the crop in the resized and possibly mirrored image
    is_mirrored: bool


def pixels_as_floats(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels to the VAE's input, `(x / 255 - 0.5) / 0.5`, equal bit by bit on all devices.

    Args:
        pixels (`torch.Tensor` of any shape, uint8): Pixels on any device. Those of another dtype are taken to be in
            `[-1, 1]` already, and returned unchanged.

    Returns:
        `torch.Tensor` of the same shape, float32 in `[-1, 1]`, on the same device.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    return pixels.float().div_(white(pixels.device)).sub_(0.5).div_(0.5)


@lru_cache(maxsize=16)
def white(device: torch.device) -> torch.Tensor:
    """Return 255 as a tensor. CUDA would turn a division by the number 255 into a less exact multiplication."""
    return torch.full((), 255.0, device=device)


class PairTransform:
    """Resizes, flips and crops both images of a pair with the same random numbers.

    Each image is resized to the smallest size with its aspect ratio that covers the target, and then cropped to it. For
    a square target, the shorter side becomes `resolution` and the longer one is rounded down, like in torchvision's
    `Resize(int)` on PIL images.

    Args:
        resolution (`int` or `tuple[int, int]`): Side of the square target, or `(height, width)`.
        center_crop (`bool`): Whether to crop at the center instead of at random.
        random_flip (`bool`): Whether to mirror both images of a pair with probability 0.5.
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        *,
        center_crop: bool = True,
        random_flip: bool = False,
    ) -> None:
        size = tuple(resolution) if isinstance(resolution, tuple | list) else (resolution, resolution)
        self.height, self.width = size
        self.center_crop = center_crop
        self.random_flip = random_flip

    def __call__(
        self, winner: Image.Image, loser: Image.Image, draws: PairDraws | None = None, target: Size | None = None
    ) -> PairPixels:
        """Transform the two RGB images of a pair into pixels. Without `draws`, they are cropped at the center and not
        mirrored. A `target` `(height, width)` replaces `resolution`."""
        pixels, corners = zip(*(self.image(image, draws, target) for image in (winner, loser)), strict=True)
        sizes = (winner.height, winner.width), (loser.height, loser.width)
        return PairPixels(torch.stack(pixels), sizes, corners, self.mirrors(draws))

    def mirrors(self, draws: PairDraws | None) -> bool:
        """Return whether the random numbers of a pair mirror both images."""
        return draws is not None and self.random_flip and draws.flip < 0.5

    def resized_size(self, height: int, width: int, target: Size | None = None) -> Size:
        """Return the smallest `(height, width)` with the image's aspect ratio that covers the target."""
        target_height, target_width = (self.height, self.width) if target is None else target
        if width * target_height <= height * target_width:  # the width determines the scale
            return target_width * height // width, target_width
        return target_height, target_height * width // height

    def image(
        self, image: Image.Image, draws: PairDraws | None = None, target: Size | None = None
    ) -> tuple[torch.Tensor, Size]:
        """Return an image's transformed pixels `(3, H, W)`, and the top left corner of the crop."""
        target = (self.height, self.width) if target is None else target
        height, width = self.resized_size(image.height, image.width, target)
        corner = self._corner(height - target[0], width - target[1], draws)
        image = self.cut(image, corner, target, is_mirrored=self.mirrors(draws))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
        return pixels.contiguous(), corner

    def cut(
        self,
        image: Image.Image,
        corner: Size | None,
        target: Size,
        *,
        is_mirrored: bool,
        resampling: Image.Resampling = INTERPOLATION,
    ) -> Image.Image:
        """Resize an image to cover `target` `(height, width)`, mirror it if `is_mirrored`, and crop it to `target` at
        `corner` `(top, left)`, by default at the center."""
        height, width = self.resized_size(image.height, image.width, target)
        image = image.resize((width, height), resampling)
        image = ImageOps.mirror(image) if is_mirrored else image
        top, left = self._corner(height - target[0], width - target[1], None) if corner is None else corner
        return image.crop((left, top, left + target[1], top + target[0]))

    def is_cut_with_pair(self, source: Size, images: Sequence[Size], target: Size) -> bool:
        """Return whether a source image of this `(height, width)` is cropped with its pair: after resizing, it is as
        large as both `images` of the pair. A crop of any other would show another part than theirs."""
        return {self.resized_size(*source, target)} == {self.resized_size(*image, target) for image in images}

    def _corner(self, free_height: int, free_width: int, draws: PairDraws | None) -> Size:
        if draws is None or self.center_crop:
            return round(free_height / 2), round(free_width / 2)
        return int(draws.top * (free_height + 1)), int(draws.left * (free_width + 1))


def fit_masks(masks: Sequence[Image.Image], item: dict[str, Any], transform: PairTransform) -> torch.Tensor:
    """Resize, mirror and crop the masks of an item like its images.

    Args:
        masks (`Sequence` of two `PIL.Image.Image`): Grey masks of winner and loser, as large as their images.
        item (`dict`): Item with `original_sizes`, `crop_top_lefts`, `is_mirrored`, and `target_size` or `pixel_values`.
        transform (`PairTransform`): Transform of the images.

    Returns:
        `torch.Tensor` of shape `(2, 1, H, W)`, uint8: 1 inside the masks and 0 outside.

    Raises:
        UndecodableImageError: If a mask has another size than its image.
    """
    target = tuple(item["target_size"] if "target_size" in item else item["pixel_values"].shape[-2:])
    fitted = []
    for mask, size, corner in zip(masks, item["original_sizes"], item["crop_top_lefts"], strict=True):
        if (mask.height, mask.width) != tuple(size):
            raise UndecodableImageError(
                f"has a mask of {mask.height} x {mask.width} pixels and an image of {size[0]} x {size[1]} pixels: both "
                "must have the same size"
            )
        options = {"is_mirrored": item["is_mirrored"], "resampling": Image.Resampling.NEAREST}
        mask = transform.cut(mask, corner, target, **options)
        fitted.append((np.asarray(mask) >= INSIDE).astype(np.uint8))
    return torch.from_numpy(np.stack(fitted)[:, None])
