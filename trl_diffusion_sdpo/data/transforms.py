"""Transforms from images to batches. Both images of a pair are resized, flipped and cropped in the same way, and B
pairs are stacked into a batch. All random numbers come from `PairDraws`. They depend only on seed, epoch and row."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps

from .images import MIN_SIDE, Covering, full_size

FAST = "fast"
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    FAST: Image.Resampling.BILINEAR,
}

Size = tuple[int, int]


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
        return PairPixels(torch.stack(pixels), (full_size(winner), full_size(loser)), corners)

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
        mirrors = draws is not None and self.random_flip and draws.flip < 0.5
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


class Encoded(Protocol):
    """Pairs and prompts that were encoded before training."""

    def pair(self, pair: int, draws: PairDraws | None, epoch: int, loser: int | None = None) -> dict[str, Any]:
        """Return the entries that replace pixels in an item. `loser` is another pair whose loser the item has."""

    def conditioning(self, prompt: str) -> dict[str, Any]:
        """Return the entries of an item that depend on its prompt."""


class ItemMaker:
    """Maker of items. It stores the epoch that random numbers depend on. With `noise_draws`, random numbers repeat
    after that many epochs."""

    def __init__(
        self,
        transform: PairTransform,
        prompt_dropout: float,
        seed: int,
        training: bool,
        noise_draws: int | None = None,
    ) -> None:
        if not 0.0 <= prompt_dropout <= 1.0:
            raise ValueError(f"`prompt_dropout` must be in [0, 1], got {prompt_dropout}. It is a probability.")
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        self.transform, self.prompt_dropout, self.seed, self.training = transform, prompt_dropout, seed, training
        self.noise_draws = noise_draws
        self.epoch: torch.Tensor | int = torch.zeros(1, dtype=torch.long)
        if training:
            self.epoch.share_memory_()  # so that persistent workers see changes; it keeps a file open

    @property
    def draw(self) -> int:
        """Number of the current draw. It is the epoch, or the epoch modulo `noise_draws`."""
        if not self.training:
            return 0
        return int(self.epoch) if self.noise_draws is None else int(self.epoch) % self.noise_draws

    def repeating(self, noise_draws: int) -> "ItemMaker":
        """Return a maker whose random numbers repeat after `noise_draws` epochs."""
        return ItemMaker(self.transform, self.prompt_dropout, self.seed, self.training, noise_draws)

    def in_epoch(self, epoch: int) -> "ItemMaker":
        """Return a maker with a fixed epoch. Other processes cannot change this epoch."""
        maker = copy.copy(self)
        maker.epoch = epoch
        return maker

    def for_evaluation(self) -> "ItemMaker":
        """Return a maker without augmentation. Its seeds do not depend on the epoch."""
        return ItemMaker(self.transform, 0.0, self.seed, training=False)

    def set_epoch(self, epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"`epoch` must not be negative, got {epoch}.")
        cast(torch.Tensor, self.epoch).fill_(int(epoch))

    def item_of(
        self,
        row: int,
        prompts: Sequence[str],
        read: Callable[[PairDraws | None, int], dict[str, Any]],
        epoch: int | None = None,
    ) -> dict[str, Any]:
        """Return an item.

        Args:
            row (`int`): Number of the pair.
            prompts (`Sequence[str]`): The prompt, or those of winner and loser. Both are emptied or neither.
            read (`Callable`): Function of draws (`None` in an evaluation) and an epoch. It returns the image entries.
            epoch (`int`, *optional*): Epoch that replaces the current epoch. Repeating streams pass it.
        """
        epoch = 0 if not self.training else self.draw if epoch is None else epoch
        draws = PairDraws.from_key(self.seed, epoch, row)
        item = read(draws if self.training else None, epoch)
        is_emptied = self.training and draws.dropout < self.prompt_dropout
        for name, prompt in zip(("prompt", "loser_prompt"), prompts, strict=False):
            item[name] = "" if is_emptied else prompt
        return item | {"seed": draws.seed, "row": row}


@dataclass
class PreferenceCollator:
    """Collator of items of `PreferenceDataset` and `PreferenceIterableDataset`.

    Returns a `dict` with

    - `rows` (`torch.LongTensor` of shape `(B,)`): the first entry, because accelerate and transformers read the batch
      size from it; here this is the number of pairs;
    - `pixel_values` (`torch.Tensor` of shape `(2B, 3, H, W)`, uint8): winners, then losers. The trainer converts them
      to floats in `[-1, 1]` on the device, one micro-batch at a time; another collator may return such floats;
    - `prompts` (`list[str]` of length B; of length 2B, winners first, if losers have their own prompts);
    - `original_sizes`, `crop_top_lefts` (`torch.LongTensor` of shape `(2B, 2)`): `(height, width)` and `(top, left)`;
    - `seeds` (`list[int]` of length B): on the host, where generators are seeded;
    - `counted` (`int`), if repeated pairs may fill up the batch: the number of pairs before the repeated ones;
    - `scores` (`torch.FloatTensor` of shape `(2B,)`), if the data set has score columns;
    - `pair_weights` (`torch.FloatTensor` of shape `(B,)`), if training pairs have weights;
    - `ref_errors` (`torch.FloatTensor` of shape `(2TB,)`), if reference errors were computed before training.
      First come the winners at the first of T draws of timestep and noise, then at the second and so on, then losers.

    Encoded pairs have `moments` (`torch.Tensor` of shape `(2B, ...)`) and `target_size` (`(height, width)` of the
    pixels) in place of `pixel_values`, `conditioning` (tensors of shape `(B, ...)`, padded at the end by zeros) and
    `host_conditioning` (lists of length B). For 2B prompts, the last two have length 2B.

    Raises:
        ValueError: If there are no items, or only some of them have scores.
    """

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if not items:
            raise ValueError("A batch needs at least one pair, got none.")
        batch = {
            "rows": torch.tensor([item["row"] for item in items], dtype=torch.long),
            **_images(items),
            "prompts": [item["prompt"] for item in items]
            + [item["loser_prompt"] for item in _with_two_prompts(items)],
            "original_sizes": torch.tensor(_winners_first(items, "original_sizes"), dtype=torch.long),
            "crop_top_lefts": torch.tensor(_winners_first(items, "crop_top_lefts"), dtype=torch.long),
            "seeds": [item["seed"] for item in items],
        }
        if "repeated" in items[0]:
            batch["counted"] = sum(not item["repeated"] for item in items)
        scored = sum("scores" in item for item in items)
        if scored not in (0, len(items)):
            raise ValueError(f"Either all pairs of a batch have scores or none has, got {scored} of {len(items)}.")
        if scored:
            batch["scores"] = torch.tensor(_winners_first(items, "scores"), dtype=torch.float32)
        if "pair_weight" in items[0]:
            batch["pair_weights"] = torch.tensor([item["pair_weight"] for item in items], dtype=torch.float32)
        if "ref_errors" in items[0]:
            errors = torch.stack([item["ref_errors"] for item in items])  # (B, T, 2)
            batch["ref_errors"] = errors.permute(2, 1, 0).flatten()
        return batch


def _images(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the pixels, or moments and conditioning, of a batch. All images of a batch have the same size."""
    name = "moments" if "moments" in items[0] else "pixel_values"
    batch: dict[str, Any] = {name: torch.cat(torch.stack([item[name] for item in items], dim=1).unbind())}
    if name == "moments":
        batch["target_size"] = items[0]["target_size"]
        prompts = [*items, *(item["loser_conditioning"] for item in _with_two_prompts(items))]
        for kind, join in (("conditioning", padded), ("host_conditioning", list)):
            if kind in items[0]:
                batch[kind] = {key: join([prompt[kind][key] for prompt in prompts]) for key in items[0][kind]}
    return batch


def _with_two_prompts(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all items if losers have their own prompts, and an empty list if they share the winners' prompts."""
    with_two = [item for item in items if "loser_prompt" in item]
    if len(with_two) not in (0, len(items)):
        raise ValueError(
            f"All losers of a batch have their own prompt or none has, got {len(with_two)} of {len(items)}."
        )
    return with_two


def check_reference_errors(errors: np.ndarray, draws: int, pairs: int) -> None:
    """Raise `ValueError` if errors do not have the shape `(draws, pairs, T, 2)`."""
    if errors.shape[:2] != (draws, pairs) or errors.shape[3:] != (2,):
        raise ValueError(
            f"Errors of a reference must have the shape ({draws}, {pairs}, T, 2) of {draws} draws and {pairs} pairs; "
            f"got {errors.shape}."
        )


def padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors `(T, ...)` of different lengths into one tensor `(B, longest T, ...)`, padded with zeros."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    joined = rows[0].new_zeros(len(rows), max(map(len, rows)), *rows[0].shape[1:])
    for padded_row, row in zip(joined, rows, strict=True):
        padded_row[: len(row)] = row
    return joined


def _winners_first(items: list[dict[str, Any]], key: str) -> list[Any]:
    return [item[key][side] for side in (0, 1) for item in items]
