"""Aspect-ratio buckets: image sizes of about equal area, each pair's bucket, and an order of pairs in which all images
of a batch have one size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import isqrt
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ..utils.errors import UserError
from .images import Size

MIN_AREA = 0.9  # smallest area of a size, as a share of `resolution`'s
ORDER = 1  # last of four numbers that seed an epoch's order; three numbers seed a pair, so seeds differ


@dataclass(frozen=True)
class AspectRatioBuckets:
    """Image sizes with at most the area of `resolution` and aspect ratios up to `max_aspect_ratio`.

    For every shorter side that is a multiple of `step`, the longer one is the largest multiple of `step` that keeps
    both limits. Sizes with less than nine tenths of the area of `resolution` are left out. Every size exists as
    portrait and landscape, and `resolution` is always one of them.

    At 1024 pixels in steps of 64, all sizes are in the list of SDXL (https://huggingface.co/papers/2307.01952,
    appendix I).

    Args:
        resolution (`tuple[int, int]`): Height and width of the training size, in pixels; the largest area.
        step (`int`): All sides, except those of `resolution`, are multiples of this many pixels.
        max_aspect_ratio (`float`): Largest ratio of the longer to the shorter side.

    Raises:
        ValueError: If `step` is below 1, the aspect ratio of `resolution` exceeds `max_aspect_ratio`, or `resolution`
            is the only size.
    """

    resolution: Size
    step: int = 64
    max_aspect_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.step < 1:
            raise UserError(f"`step` of `bucket_kwargs` must be at least 1 pixel, got {self.step}.")
        short, long = sorted(self.resolution)
        if long > self.max_aspect_ratio * short:
            raise UserError(
                "`max_aspect_ratio` of `bucket_kwargs` must allow the aspect ratio of `resolution`, "
                f"{long / short:.3g}; got {self.max_aspect_ratio}. Raise `max_aspect_ratio`, or choose a squarer "
                "`resolution`."
            )
        if len(self.sizes) == 1:
            raise UserError(
                f"`aspect_ratio_buckets` needs several sizes. With `step={self.step}` and "
                f"`max_aspect_ratio={self.max_aspect_ratio}` in `bucket_kwargs`, {self.resolution} is the only size. "
                "Use a smaller `step` or a larger `max_aspect_ratio`, or leave `aspect_ratio_buckets` off."
            )

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes as `(height, width)`, from the widest to the tallest."""
        height, width = self.resolution
        area = height * width
        by_ratio: dict[Fraction, Size] = {}
        for short in range(self.step, isqrt(area) + 1, self.step):
            long = min(area // short, int(self.max_aspect_ratio * short + 1e-6)) // self.step * self.step
            if long >= short and long * short >= MIN_AREA * area:
                by_ratio |= {Fraction(long, short): (long, short), Fraction(short, long): (short, long)}
        by_ratio |= {Fraction(height, width): (height, width), Fraction(width, height): (width, height)}
        return tuple(size for _, size in sorted(by_ratio.items()))

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """Return each pair's bucket: the size that is nearest, in log aspect ratio, to the mean of the two images.

        Of two that are equally near, the squarer one. The computation uses integers, so all machines choose the same.

        Args:
            sizes (`np.ndarray` of shape `(P, 4)`, int64): Height and width of the winner and of the loser, in pixels.

        Returns:
            `np.ndarray` of shape `(P,)`, uint16: Indices into `sizes`.
        """
        heights = sizes[:, 0] * sizes[:, 2]
        widths = sizes[:, 1] * sizes[:, 3]
        numbers = np.zeros(len(sizes), dtype=np.uint16)
        for (height, width), (next_height, next_width) in pairwise(self.sizes):
            # Products of sides, in integers, compare in the same order as mean log aspect ratios.
            beyond, within = heights * (width * next_width), widths * (height * next_height)
            upright = height * next_height >= width * next_width
            numbers += beyond > within if upright else beyond >= within
        return numbers


@dataclass(frozen=True)
class PairSizes:
    """Bucket of each pair: the size at which it trains."""

    sizes: tuple[Size, ...]  # `(height, width)` of each bucket
    numbers: np.ndarray  # index of each pair's bucket in `sizes`, `(P,)`

    def fingerprint(self) -> str:
        """Return a hash of the sizes and of each pair's bucket, the same on all machines."""
        digest = hashlib.sha256(repr(self.sizes).encode())
        digest.update(np.ascontiguousarray(self.numbers, dtype="<u2").data)
        return digest.hexdigest()[:16]

    def left_out(self, group: int, *, shuffled: bool) -> dict[Size, int]:
        """Return how many pairs of each bucket are in no group of `group` pairs, in any epoch, if incomplete groups are
        dropped. In shuffled data, these are only pairs of buckets smaller than `group`."""
        counts = np.bincount(self.numbers, minlength=len(self.sizes))
        never = np.where(counts < group, counts, 0) if shuffled else counts % group
        return {size: count for size, count in zip(self.sizes, never.tolist(), strict=True) if count}


class PairKey(NamedTuple):
    """Key of an item in a batch of one size."""

    pair: int  # index of the pair
    is_repeated: bool  # whether the pair only fills up the batch, so that evaluations ignore it


class BucketSampler(Sampler[PairKey]):
    """Orders pairs so that every `group` consecutive ones have the same size.

    Pairs are shuffled, and each bucket's are cut into groups. Groups come in the order of their first pair. If needed,
    the first pairs of a bucket fill up its last group.

    Args:
        pairs ([`PairSizes`]): Bucket of each pair.
        group (`int`): Number of pairs in one step of all processes together.
        seed (`int`): Seed of the shuffling.
        epoch (`Callable[[], int]`, *optional*): Returns the current epoch. Without it, pairs are not shuffled.
        drop_last (`bool`): Whether to leave out an incomplete last group of a bucket instead of filling it.

    Raises:
        ValueError: If `drop_last` leaves no group.
    """

    def __init__(
        self,
        pairs: PairSizes,
        group: int,
        *,
        seed: int,
        epoch: Callable[[], int] | None = None,
        drop_last: bool = False,
    ) -> None:
        self._pairs = pairs
        self._group = group
        self._seed = seed
        self._epoch = epoch
        self._drop_last = drop_last
        counts = np.bincount(pairs.numbers)
        self._length = int((counts // group if drop_last else -(-counts // group)).sum()) * group
        if not self._length:
            raise UserError(
                f"`dataloader_drop_last=True` leaves no batch, because a step needs {group} pairs of one size, and no "
                "bucket has so many pairs. Use a smaller `per_device_train_batch_size`, or set "
                "`dataloader_drop_last=False`."
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[PairKey]:
        pairs, are_repeated = self._groups()
        yield from map(PairKey, pairs.ravel().tolist(), are_repeated.ravel().tolist())

    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of each group, `(groups, group)`, and a mask of the repeated ones that fill up a group."""
        order = np.arange(len(self._pairs.numbers))
        if self._epoch is not None:
            order = np.random.default_rng([self._seed, self._epoch(), 0, ORDER]).permutation(order)
        numbers = self._pairs.numbers[order]
        by_bucket = np.argsort(numbers, kind="stable")
        positions = []
        repeated = []
        for members in np.split(by_bucket, np.cumsum(np.bincount(numbers))[:-1]):
            count = len(members) // self._group if self._drop_last else -(-len(members) // self._group)
            filled = np.resize(members, count * self._group)  # repeats the first pairs of the bucket
            positions.append(filled)
            repeated.append(np.arange(len(filled)) >= len(members))
        groups = np.concatenate(positions).reshape(-1, self._group)
        as_met = np.argsort(groups[:, 0])
        return order[groups[as_met]], np.concatenate(repeated).reshape(-1, self._group)[as_met]
