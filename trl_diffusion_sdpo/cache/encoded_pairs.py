"""Pairs whose images and prompts were encoded before training: which row of a cache is which, and how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.columns import digest_of
from ..data.images import UndecodableImageError
from ..data.pairs import PreferenceDataset
from ..data.transforms import PairDraws
from .shards import ShardStore

MOMENTS, SIZES = "moments", "sizes"  # columns
PLAIN, MIRRORED = PairDraws(0.0, 0.0, 1.0, 1.0, 0), PairDraws(0.0, 0.0, 0.0, 1.0, 0)  # for crops at the center


@dataclass(frozen=True)
class ImageRows:
    """The rows of encoded images: `variants` consecutive ones for each image.

    Without random crops an image has a row, or two if it may be mirrored, in however many pairs it is. With random
    crops it has `crops` rows in each pair, with the crops and flips of the epochs 0 to `crops - 1`; epoch e takes those
    of `e % crops`.

    Args:
        seed (`int`): Of the draws.
        images (`np.ndarray` of shape `(P, 2)`): For winner and loser of each pair, the number of the image.
        places (`np.ndarray` of shape `(I, 2)`): For each image, a pair that it is in, and 0 as winner or 1 as loser.
        flips (`bool`): Whether images may be mirrored.
        crops (`int`, *optional*): Number of random crops; `None` for crops at the center.
    """

    seed: int
    images: np.ndarray
    places: np.ndarray
    flips: bool
    crops: int | None

    @classmethod
    def of(cls, dataset: PreferenceDataset, crops: int) -> ImageRows:
        """The rows of a data set's images; `crops` for each, if it crops at random."""
        flips, random_crops = dataset.augmentations
        if random_crops:
            places = np.stack(np.divmod(np.arange(2 * len(dataset)), 2), axis=1)
            return cls(dataset.seed, np.arange(2 * len(dataset)).reshape(-1, 2), places, flips, crops)
        _, first, numbers = np.unique(dataset.image_numbers().ravel(), return_index=True, return_inverse=True)
        return cls(dataset.seed, numbers.reshape(-1, 2), np.stack(np.divmod(first, 2), axis=1), flips, None)

    @property
    def variants(self) -> int:
        """Rows of an image."""
        return 1 + self.flips if self.crops is None else self.crops

    def __len__(self) -> int:
        return len(self.places) * self.variants

    def draws_of(self, image: int) -> list[PairDraws]:
        """How an image is flipped and cropped in each of its rows."""
        if self.crops is None:
            return [PLAIN, MIRRORED][: self.variants]
        return [PairDraws.from_key(self.seed, epoch, int(self.places[image, 0])) for epoch in range(self.crops)]

    def of_pair(self, pair: int, draws: PairDraws | None, epoch: int, loser: int | None = None) -> list[int]:
        """The rows of winner and loser of a pair, as its draws in an epoch are; `None` for no flip and the center. With
        `loser`, the loser of another pair, as the draws of this pair are.

        Raises:
            ValueError: Without draws, if only random crops are there.
        """
        if self.crops is not None and draws is None:
            raise ValueError(
                "The cache has random crops of these pairs, and their centers are asked for. Pass an `eval_dataset`, "
                "or set `random_crop=False` or `precompute_latents=False`."
            )
        assert loser is None or self.crops is None, "crops are those of an image's own pair"
        variant = 0
        if self.crops is not None:
            variant = epoch % self.crops
        elif self.flips and draws is not None:
            variant = int(draws.flip < 0.5)
        images = self.images[pair, 0], self.images[pair if loser is None else loser, 1]
        return [int(image) * self.variants + variant for image in images]


class EncodedPrompts:
    """The conditioning of distinct prompts, the empty one included.

    Args:
        store ([`ShardStore`]): A row for each prompt, in the order of `digests`.
        digests (`np.ndarray`): Those of the prompts, by `digests_of`.
        on_host (`Sequence[str]`): Tensors that are read on the host.
    """

    def __init__(self, store: ShardStore, digests: np.ndarray, on_host: Sequence[str] = ()) -> None:
        self.store, self._digests, self._on_host = store, digests, on_host

    def read(self, prompt: str) -> dict[str, dict[str, Any]]:
        """`conditioning` of a prompt, without an axis of the batch, and `host_conditioning` as Python numbers.

        Raises:
            ValueError: If the prompt is not in the cache.
        """
        digest = digest_of(prompt)
        row = int(np.searchsorted(self._digests, digest))
        if row == len(self._digests) or self._digests[row] != digest:
            raise ValueError(
                f"The cache was made from other prompts, and lacks {prompt!r}. Start again to rebuild it."
            )
        tensors = self.store.read(row)
        host = {name: tensors.pop(name).tolist() for name in self._on_host}
        return {"conditioning": tensors} | ({"host_conditioning": host} if host else {})


def distinct_prompts(prompts: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Distinct prompts, the empty one included, and their digests, by which they are sorted: int64."""
    digests = {prompt: digest_of(prompt) for prompt in {*prompts, ""}}
    ordered = sorted(digests, key=digests.__getitem__)
    array = np.array([digests[prompt] for prompt in ordered], dtype=np.int64)
    assert (array[1:] != array[:-1]).all(), "two prompts with one digest: odds of 1 to 30 million in a million prompts"
    return ordered, array


class EncodedPairs:
    """What [`~trl_diffusion_sdpo.data.PreferenceDataset`] reads in place of images and prompts.

    Args:
        images ([`ShardStore`]): Rows of [`ImageRows`], with the columns `moments`, as the family's `image_moments`
            returns them for one image, and `sizes`, int32 of shape `(3, 2)`: height and width before any resizing, top
            and left of the crop, height and width of the pixels. Moments of images that could not be decoded are empty.
        rows ([`ImageRows`]): Which row is which.
        prompts ([`EncodedPrompts`]): Their conditioning.
    """

    def __init__(self, images: ShardStore, rows: ImageRows, prompts: EncodedPrompts) -> None:
        self.images, self.rows, self.prompts = images, rows, prompts

    def pair(self, pair: int, draws: PairDraws | None, epoch: int, loser: int | None = None) -> dict[str, Any]:
        """The entries of an item that depend on the images of a pair; with `loser`, on that of another pair.

        Raises:
            UndecodableImageError: If an image could not be decoded when the cache was made.
        """
        found = [self.images.read(row) for row in self.rows.of_pair(pair, draws, epoch, loser)]
        if not all(image[MOMENTS].numel() for image in found):
            raise UndecodableImageError("an image could not be decoded when the cache was made")
        original, corner, target = zip(*(image[SIZES].tolist() for image in found), strict=True)
        return {
            "moments": torch.stack([image[MOMENTS] for image in found]),
            "original_sizes": tuple(map(tuple, original)),
            "crop_top_lefts": tuple(map(tuple, corner)),
            "target_size": tuple(target[0]),
        }

    def conditioning(self, prompt: str) -> dict[str, dict[str, Any]]:
        """The entries of an item that depend on its prompt."""
        return self.prompts.read(prompt)
