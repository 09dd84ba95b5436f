"""Reads encoded images and prompts, one a row, from a cache on disk that is filled before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.dataset import PreferenceDataset
from ..data.fingerprints import digest_of
from ..data.flips import mirrored
from ..data.images import UndecodableImageError
from ..data.kept_index import kept_arrays
from ..data.permuted_losers import PermutedLosers
from ..data.transforms import PairDraws
from ..utils.errors import UserError
from .shards import ShardStore

MOMENTS = "moments"  # name of a tensor in the row of an image
SIZES = "sizes"  # name of the other one
UNREADABLE = "unreadable"  # tensor that replaces the encoding of an edit if a source image cannot be decoded
SourceKey = tuple[int, int, int]  # row of source images, which of them are cropped with their pair, and its bucket
Edit = tuple[SourceKey, bool, str]  # key of the source images, whether they are mirrored, and prompt
NOT_DRAWN = (
    "A cache has those flips, crops and edits of training pairs that the epochs of the run draw, and {} now needs "
    "others. To train for more epochs, set `num_train_epochs` or `max_steps` before you make the trainer. To evaluate "
    "on training pairs, pass them as `eval_dataset`."
)
PLAIN = PairDraws(0.0, 0.0, 1.0, 1.0, 0)  # for crops at the center
MIRRORED = PairDraws(0.0, 0.0, 0.0, 1.0, 0)


@dataclass(frozen=True)
class ImageRows:
    """Row numbers of encoded images in the cache. Random crops or flips give an image several encodings (variants),
    each with a row of its own.

    Variant v of image i has the row number `v * number_of_images + i`. If crops are centered, variant 0 is the image
    without a flip, and variant 1 the flipped image. If crops are random, variant v has the crop and flip of epoch v,
    and any epoch uses variant `epoch % crops`. Pairs share the rows of a common image only if crops are centered.
    """

    seed: int  # seed of the random crops and flips
    images: np.ndarray  # which of the I images are winner and loser of each of the P pairs, `(P, 2)`
    count: int  # I
    flips: bool  # whether images may be mirrored
    crops: int | None  # number of random crops of each image; `None` if crops are centered

    @classmethod
    def of(cls, dataset: PreferenceDataset, crops: int) -> ImageRows:
        """Assign row numbers to the images of a data set; with random crops, `crops` variants each."""
        flips, random_crops = dataset.augmentations
        small = np.int32 if 2 * len(dataset) <= np.iinfo(np.int32).max else np.int64  # tens of millions of pairs
        if random_crops:
            images = np.arange(2 * len(dataset), dtype=small)
            return cls(dataset.seed, images.reshape(-1, 2), len(images), flips, crops)
        distinct, numbers = np.unique(dataset.image_numbers().ravel(), return_inverse=True)
        return cls(dataset.seed, numbers.astype(small).reshape(-1, 2), len(distinct), flips, None)

    def sources(self) -> np.ndarray:
        """Return, for each image, a pair that contains it, and 1 if it is the loser, else 0: `(I, 2)`."""
        first = np.unique(self.images, return_index=True)[1].astype(self.images.dtype)
        return np.stack(np.divmod(first, 2), axis=1)

    @property
    def variants(self) -> int:
        """Number of variants of each image."""
        if self.crops is not None:
            return self.crops
        return 2 if self.flips else 1

    def __len__(self) -> int:
        return self.variants * self.count

    def drawn(self, epochs: int, losers: PermutedLosers | None, empty: np.ndarray) -> np.ndarray:
        """Return a mask of the rows that training reads in its first `epochs` epochs, `(len(self),)`.

        Args:
            losers (`PermutedLosers`, *optional*): Chooses losers from other pairs.
            empty (`np.ndarray` of shape `(len(self),)`): Mask of the rows of images that cannot be decoded. Others are
                read in place of such losers.
        """
        drawn = np.zeros((self.variants, self.count), dtype=bool)
        if self.crops is not None:
            drawn[:epochs] = True
        else:
            for epoch in range(epochs):
                flipped = mirrored(self.seed, epoch, len(self.images)) & self.flips
                images = np.array(self.images)
                if losers is not None:
                    images[:, 1] = images[losers.of_epoch(epoch), 1]
                for variant in range(self.variants):
                    drawn[variant, images[flipped == variant]] = True
        if losers is not None:
            bad = np.logical_or.reduce(empty.reshape(drawn.shape))[self.images[:, 1]]
            drawn[:, self.images[losers.in_place_of(bad), 1]] = True
        return drawn.ravel()

    def draws_of(self, row: int) -> PairDraws:
        """Return the random numbers that decide how the image in a row is flipped and cropped."""
        variant, image = divmod(row, self.count)
        if self.crops is None:
            return MIRRORED if variant else PLAIN
        return PairDraws.from_key(self.seed, variant, image // 2)

    def of_pair(self, pair: int, draws: PairDraws | None, epoch: int, loser: int | None = None) -> list[int]:
        """Return the row numbers of a pair's winner and loser in an epoch.

        Args:
            draws (`PairDraws`, *optional*): Random numbers of the pair. Pass `None` for a centered crop without a flip.
            loser (`int`, *optional*): Another pair, whose winner is used as this pair's loser.

        Raises:
            ValueError: If `draws` is `None` and the cache contains only random crops.
        """
        if self.crops is not None and draws is None:
            raise UserError(
                "An evaluation needs centered crops, but the cache has only random crops of these pairs. Pass other "
                "pairs as `eval_dataset`, or set `random_crop=False` or `precompute_latents=False`."
            )
        assert loser is None or self.crops is None, "a random crop is drawn for the pair of its image"
        variant = 0
        if self.crops is not None:
            variant = epoch % self.crops
        elif self.flips and draws is not None:
            variant = int(draws.flip < 0.5)
        images = self.images[pair, 0], self.images[pair if loser is None else loser, 1]
        return [variant * self.count + int(image) for image in images]

    def is_mirrored(self, draws: PairDraws | None, epoch: int, pair: int) -> bool:
        """Return whether a pair's images are mirrored in an epoch. For the arguments, see `of_pair`."""
        if self.crops is not None:
            draws = PairDraws.from_key(self.seed, epoch % self.crops, pair)
        return self.flips and draws is not None and draws.flip < 0.5


def rows_and_digests(dataset: PreferenceDataset, crops: int, data: Mapping[str, Any]) -> tuple[ImageRows, np.ndarray]:
    """Return the row numbers of a data set's images, and the sorted hashes of its prompts or edits. Those of a large
    data set are kept for later starts.

    Args:
        crops (`int`): Number of random crops of each image; unused if crops are centered.
        data (`Mapping`): Thorough [`~trl_diffusion_sdpo.data.PreferenceDataset.fingerprint`] of the data set.
    """

    def make() -> tuple[dict[str, np.ndarray], int]:
        rows = ImageRows.of(dataset, crops)
        return {"images": rows.images, "digests": sorted_by_hash(texts_of(dataset))[1]}, rows.count

    def key() -> list[Any]:
        labels = [table.label_key for table in dataset.source.tables]
        return [data, labels, dataset.augmentations, crops, dataset.has_loser_prompts]

    rows = 0 if dataset.has_sources else len(dataset)  # edits depend on more than the key
    arrays, count = kept_arrays(key, rows, make)
    flips, random_crops = dataset.augmentations
    images = ImageRows(dataset.seed, arrays["images"], count, flips, crops if random_crops else None)
    return images, arrays["digests"]


def texts_of(dataset: PreferenceDataset) -> Iterable[str | Edit]:
    """Return the prompts or edits that a data set's cache encodes."""
    return dataset.edits() if dataset.has_sources else {*dataset.prompts(), ""}


def sorted_by_hash(texts: Iterable[str | Edit]) -> tuple[list[Any], np.ndarray]:
    """Return the distinct prompts or edits and their hashes (int64). Both are sorted by hash."""
    digests = {text: digest_of(text if isinstance(text, str) else text_of_edit(*text)) for text in set(texts)}
    ordered = sorted(digests, key=digests.__getitem__)
    array = np.array([digests[text] for text in ordered], dtype=np.int64)
    assert (array[1:] != array[:-1]).all(), "two prompts with one digest: odds of 1 to 30 million in a million prompts"
    return ordered, array


def drawn_edits(dataset: PreferenceDataset, epochs: int, digests: np.ndarray) -> np.ndarray:
    """Return a mask of the edits that training draws in its first `epochs` epochs, in the order of their sorted hashes
    `digests`."""
    return np.isin(digests, sorted_by_hash(dataset.edits(epochs))[1])


def text_of_edit(key: SourceKey, is_mirrored: bool, prompt: str) -> str:
    """Return a text that identifies an edit: the key of its source images, their flip and the prompt."""
    return f"{key} {'mirrored' if is_mirrored else 'plain'} {prompt}"


@dataclass(frozen=True)
class EncodedPairs:
    """Encoded images and prompts. A [`~trl_diffusion_sdpo.data.PreferenceDataset`] returns them instead of pixels.

    The row of an image has two tensors. `moments` is the output of the family's `image_moments` (the VAE's encoder), or
    an empty tensor if the image could not be decoded. `sizes`, int32 of shape `(3, 2)`, has the height and width before
    resizing, the top and left offset of the crop, and the height and width of the cropped image.
    """

    images: ShardStore  # encoded images
    rows: ImageRows  # row numbers in `images`
    prompts: ShardStore  # one row for each distinct prompt or edit, in the order of `digests`
    digests: np.ndarray  # sorted hashes of the prompts or edits, from [`sorted_by_hash`]
    on_host: Sequence[str] = ()  # names of the prompt tensors that the family reads on the CPU

    def pair(self, pair: int, draws: PairDraws | None, epoch: int, loser: int | None = None) -> dict[str, Any]:
        """Return the entries of an item that depend on its images. For the arguments, see [`ImageRows.of_pair`].

        Raises:
            UndecodableImageError: If an image could not be decoded when the cache was made.
            ValueError: If the run should not have drawn these flips or crops.
        """
        rows = self.rows.of_pair(pair, draws, epoch, loser)
        if not all(map(self.images.has, rows)):
            raise UserError(NOT_DRAWN.format(f"pair {pair}"))
        read = list(map(self.images.read, rows))
        if not all(image[MOMENTS].numel() for image in read):
            raise UndecodableImageError("an image could not be decoded when the cache was made")
        original, corner, target = zip(*(image[SIZES].tolist() for image in read), strict=True)
        return {
            "moments": torch.stack([image[MOMENTS] for image in read]),
            "original_sizes": tuple(map(tuple, original)),
            "crop_top_lefts": tuple(map(tuple, corner)),
            "target_size": tuple(target[0]),
            "is_mirrored": self.rows.is_mirrored(draws, epoch, pair),
        }

    def conditioning(self, prompt: str, edited: tuple[SourceKey, bool] | None = None) -> dict[str, dict[str, Any]]:
        """Return an encoded prompt: tensors without a batch axis, and Python numbers as `host_conditioning`.

        Args:
            edited (`tuple[SourceKey, bool]`, *optional*): Key of the source images that the prompt edits, and whether
                they are mirrored.

        Raises:
            UndecodableImageError: If a source image could not be decoded when the cache was made.
            ValueError: If the prompt is not in the cache, or the run should not have drawn this edit.
        """
        digest = digest_of(prompt if edited is None else text_of_edit(*edited, prompt))
        row = int(np.searchsorted(self.digests, digest))
        if row == len(self.digests) or self.digests[row] != digest:
            raise UserError(f"The prompt {prompt!r} is not in the cache. Start the run again to add it.")
        if not self.prompts.has(row):
            raise UserError(NOT_DRAWN.format(f"the edit {prompt!r}"))
        tensors = self.prompts.read(row)
        if UNREADABLE in tensors:
            raise UndecodableImageError("a source image could not be decoded when the cache was made")
        host = {name: tensors.pop(name).tolist() for name in self.on_host}
        return {"conditioning": tensors} | ({"host_conditioning": host} if host else {})
