"""Torch data set of pairs: it reads and transforms images, makes items, and collates items to batches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..utils.processes import ALONE, Peers
from . import checking
from .buckets import AspectRatioBuckets, PairSizes, Repeated, candidates
from .checking import HOW_TO_DROP, BadDataError, DataReport, evenly_spaced
from .images import (
    SCHEMES,
    ImageReader,
    PairDraws,
    PairTransform,
    Size,
    UndecodableImageError,
    full_size,
    parse_schemes,
)
from .masks import decode_masks, place_masks
from .permuted_losers import PermutedLosers
from .sources import PairSource, PairTable, pairs_fingerprint

logger = logging.getLogger(__name__)

NOISE_OF_ANOTHER_SIZE = (
    "`noise_source='generated'` needs images at the size at which they were generated. Row {row} has an image of {} x "
    "{} pixels (height x width), and training has {} x {}. Set `resolution` to the images' size."
)
ONE_PAIR = "Set `per_device_train_batch_size=1` and `per_device_eval_batch_size=1`."


@dataclass(frozen=True)
class PairOptions:
    """Settings by which a preference set becomes pairs.

    Args:
        transform (`PairTransform`): Turns images into pixels.
        prompt_dropout (`float` in `[0, 1]`): Probability of an empty prompt.
        seed (`int`, not negative): Seed of all random draws.
        dataset_format (`str`, *optional*): A key of `FORMATS`; detected from the columns by default.
        on_bad_row (`str`): `"drop"` leaves out and counts bad prompts, bad labels and undecodable images. `"raise"`
            stops at the first one. Ties are not bad rows: they are always left out and counted.
        verify_images (`str`): Images of a map-style set to decode beforehand. `"sample"` decodes those of
            `SAMPLED_PAIRS` evenly spaced pairs. `"all"` decodes all, drops the pairs of bad ones, and is cached by
            `datasets`. With `"sample"` and `"none"`, a bad image is found when it is read, and its pair is replaced by
            the next good one. `True` means all, `False` none.
        num_proc (`int`, *optional*): Processes that check all images. By default one for each core.
        image_schemes (`str` or `Sequence[str]`, *optional*): URL schemes that rows may use besides `SCHEMES`, such as
            `"s3"`.
        buckets ([`AspectRatioBuckets`], *optional*): Sizes of the pairs by their aspect ratios. They replace the size
            of the transform. The header of every image is read for them.
        min_side (`int`, *optional*): Pairs with an image whose shorter side has fewer pixels are left out and counted.
        compare (`bool`): Whether to refuse data whose checked pairs have identical images.
        training (`bool`): `False` center-crops, never flips, keeps prompts and ignores the epoch.
        repeat (`bool`): Whether a stream restarts when it ends, with new draws and, if it is shuffled, in a new order.
            It has no effect on map-style sets.
        use_scores (`bool`): Whether to read score columns if there are any. A row without a score is then a bad row.
        swap_labels (`bool`): Whether to exchange winner and loser of every pair.
        number_columns (`Sequence[str]`): Columns of a map-style set that must have finite numbers in every row.
        noise_seeds (`bool`): Whether to read the seeds of the noise from which the images were generated, in the
            columns `SEED_COLUMNS`. Only pairs for training have them.
        losers (`str`): `"data"` takes the losers of the data. `"permute"` takes the winners of pairs of other prompts,
            by a permutation that depends on the seed and the epoch alone.
    """

    transform: PairTransform
    prompt_dropout: float = 0.0
    seed: int = 42
    dataset_format: str | None = None
    on_bad_row: str = "drop"
    verify_images: str | bool = "sample"
    num_proc: int | None = None
    image_schemes: str | Sequence[str] | None = None
    buckets: AspectRatioBuckets | None = None
    min_side: int | None = None
    compare: bool = True
    training: bool = True
    repeat: bool = False
    use_scores: bool = True
    swap_labels: bool = False
    number_columns: Sequence[str] = ()
    noise_seeds: bool = False
    losers: str = "data"

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("drop", "raise"):
            raise ValueError(f'`on_bad_row` must be "drop" or "raise", got {self.on_bad_row!r}.')
        if self.losers not in ("data", "permute"):
            raise ValueError(f'`losers` must be "data" or "permute", got {self.losers!r}.')
        object.__setattr__(self, "verify_images", checking.parse_verify_images(self.verify_images))
        object.__setattr__(self, "image_schemes", parse_schemes(self.image_schemes))
        if not 0.0 <= self.prompt_dropout <= 1.0:
            raise ValueError(f"`prompt_dropout` must be in [0, 1], got {self.prompt_dropout}. It is a probability.")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}.")

    @property
    def permutes(self) -> bool:
        """Whether losers are the winners of other pairs."""
        return self.losers == "permute"

    @property
    def reads_sizes(self) -> bool:
        """Whether the size of every image is read before the first batch."""
        return self.buckets is not None or self.min_side is not None

    @cached_property
    def reader(self) -> ImageReader:
        """Opens and decodes images."""
        return ImageReader((*SCHEMES, *(self.image_schemes or ())))

    @property
    def maker(self) -> ItemMaker:
        """Makes items of decoded images."""
        return ItemMaker(self.transform, self.prompt_dropout, self.seed, self.training)


class Encoded(Protocol):
    """Pairs and prompts that were encoded before training."""

    def pair(self, pair: int, draws: PairDraws | None, epoch: int, loser: int | None = None) -> dict[str, Any]:
        """Return the entries that replace pixels in an item. `loser` is another pair whose loser the item has."""

    def conditioning(self, prompt: str) -> dict[str, Any]:
        """Return the entries of an item that depend on its prompt."""

    def edit(self, pair: int, is_mirrored: bool, prompt: str) -> dict[str, Any]:
        """Return the entries of an item that depend on its prompt and source images. The prompt is the pair's `own`,
        the `losers` own, or the `empty` one."""


@dataclass
class ItemMaker:
    """Maker of items.

    Attributes:
        training (`bool`): `False` never crops at random, never flips, keeps prompts and ignores the epoch.
        repeat_after (`int`, *optional*): Number of epochs after which random numbers repeat.
        epoch (`torch.Tensor` of shape `(1,)`): Epoch that random numbers depend on.
    """

    transform: PairTransform
    prompt_dropout: float
    seed: int
    training: bool
    repeat_after: int | None = None
    epoch: torch.Tensor = field(
        default_factory=lambda: torch.zeros(1, dtype=torch.long).share_memory_()
    )  # for workers

    @property
    def drawn_epoch(self) -> int:
        """The epoch that random numbers are drawn for: 0 in an evaluation, else the epoch modulo `repeat_after`."""
        if not self.training:
            return 0
        return int(self.epoch) if self.repeat_after is None else int(self.epoch) % self.repeat_after

    def repeating(self, epochs: int) -> ItemMaker:
        """Return a maker whose random numbers repeat after so many epochs."""
        return ItemMaker(self.transform, self.prompt_dropout, self.seed, self.training, epochs)

    def in_epoch(self, epoch: int) -> ItemMaker:
        """Return a maker with a fixed epoch. Other processes cannot change this epoch."""
        return replace(self, epoch=torch.tensor([epoch]))

    def for_evaluation(self) -> ItemMaker:
        """Return a maker without augmentation. Its seeds do not depend on the epoch."""
        # Evaluation loaders count epochs of their own, so the tensor must not be shared with training.
        return replace(
            self, prompt_dropout=0.0, training=False, repeat_after=None, epoch=torch.zeros(1, dtype=torch.long)
        )

    def draws_of(self, row: int, epoch: int | None = None) -> PairDraws:
        """Return the random numbers of a pair in the current epoch, or in `epoch`."""
        return PairDraws.from_key(self.seed, self.drawn_epoch if epoch is None else epoch, row)

    def augmentation(self, draws: PairDraws) -> PairDraws | None:
        """Return the numbers that crop and flip images; `None` in an evaluation."""
        return draws if self.training else None

    def empties(self, draws: PairDraws) -> bool:
        """Whether the prompt of a pair is emptied."""
        return self.training and draws.dropout < self.prompt_dropout

    def item(self, images: dict[str, Any], row: int, prompts: Sequence[str], draws: PairDraws) -> dict[str, Any]:
        """Return an item.

        Args:
            images (`dict`): Entries that depend on the images.
            row (`int`): Number of the pair.
            prompts (`Sequence[str]`): The prompt, or those of winner and loser. Both are emptied or neither.
        """
        named = zip(("prompt", "loser_prompt"), prompts, strict=False)
        texts = {name: "" if self.empties(draws) else prompt for name, prompt in named}
        return {**images, **texts, "seed": draws.seed, "row": row}


class PreferenceDataset(Dataset):
    """Map-style pairs: a view on a source data set, made by [`prepare_dataset`].

    Items are dicts with these entries:

    - `pixel_values` (`torch.Tensor` of shape `(2, 3, H, W)`, uint8): winner and loser;
    - `prompt` (`str`, `""` if dropped), and `loser_prompt` if losers have their own;
    - `original_sizes` and `crop_top_lefts`: `(height, width)` and `(top, left)` of both images;
    - `seed` (of noise and timestep) and `row` (number of the pair);
    - `scores`, `pair_weight` and `ref_errors` (`(T, 2)`, at T draws, of winner and loser), if the pairs have them;
    - `masks` (`torch.Tensor` of shape `(2, 1, H, W)`, uint8), if there is a mask column: 1 inside, 0 outside;
    - `sources` (`list[PIL.Image.Image]`), if there is a source column: the images that the prompt edits, in their own
      sizes;
    - `noise_seeds` (`tuple[int, int]`), of winner and loser, if training reads them;
    - `repeated`, with aspect-ratio buckets: whether the pair fills up a batch.

    Encoded pairs have `moments`, `target_size`, `conditioning` and `loser_conditioning` in place of `pixel_values`.

    An item is a pure function of (seed, epoch, row). If losers are permuted, it also depends on all prompts. A pair
    that cannot be decoded is replaced by the next one of its size that can, whichever process reads it first.

    Args:
        source ([`PairSource`]): Prompts and images.
        pairs ([`PairTable`]): Index and columns of the pairs.
        options ([`PairOptions`]): Settings by which the pairs were made.
        report ([`DataReport`]): Counts of what was dropped so far.
    """

    def __init__(self, source: PairSource, pairs: PairTable, options: PairOptions, report: DataReport) -> None:
        self._source, self._pairs, self._options, self._report = source, pairs, options, report
        self._maker, self._reader = options.maker, options.reader
        self._losers: PermutedLosers | None = None  # which pair's winner is the loser of each pair
        self._encoded: Encoded | None = None  # moments and conditioning, in place of images
        self._forget_undecodable()
        self.strict = options.on_bad_row == "raise"  # whether bad rows stop the run
        self.is_swapped = source.is_swapped  # whether the published losers are the winners
        self.is_permuted = options.permutes  # whether losers are the winners of other pairs
        self.has_loser_prompts = source.prompt_of_each_image and not options.permutes
        self.has_masks = source.has_masks
        if options.permutes and source.has_masks:
            raise ValueError(
                "`losers='permute'` cannot act: a mask belongs to the two images of a pair, and losers are images of "
                "other pairs. Remove the mask column."
            )
        self.has_noise_seeds = options.noise_seeds
        self.has_sources = source.has_sources
        if options.permutes and source.has_sources:
            raise ValueError(
                "`losers='permute'` cannot act on data with a `source` column: a loser must be an edit of its pair's "
                "source. Use `losers='data'`."
            )

    @classmethod
    def of(cls, source: PairSource, options: PairOptions, name: str) -> PreferenceDataset:
        """Return all pairs of a source. Its labels are read, and no image."""
        report = DataReport(name, source.format_name, rows=len(source), is_swapped=source.is_swapped)
        report.is_permuted = options.permutes
        strict = options.on_bad_row == "raise"
        pairs = source.pairs(lambda *drop: checking.reject(report, strict, *drop))
        if options.permutes:  # an index of the winners alone
            pairs = PairTable(pairs.places[:, [0, 1, 0, 1]], {})
        return cls(source, pairs, options, report)

    def _view(self, *, pairs: PairTable | None = None, maker: ItemMaker | None = None) -> PreferenceDataset:
        """Return a data set of the same source with other pairs, or another maker of items."""
        view = copy.copy(self)
        view._pairs = self._pairs if pairs is None else pairs
        view._maker = self._maker if maker is None else maker
        return view

    def __len__(self) -> int:
        return len(self._pairs)

    # ---- Reading --------------------------------------------------------------------------------------------------

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = range(len(self))[index]
        for row in candidates(first, len(self), self.sizes):
            if self._undecodable[row]:
                continue
            try:
                item = self._read(row)
            except UndecodableImageError as error:
                self._reject_at_read(row, error)
                continue
            return item if self.sizes is None else item | {"repeated": isinstance(index, Repeated)}
        size = "" if self.sizes is None else " of {} x {} pixels".format(*self.target_size(first))
        advice = "`verify_images='all'` leaves such pairs out before training."
        raise BadDataError(f"No pair{size} of the data set can be decoded. {advice}\n{self.report}")

    def _read(self, row: int) -> dict[str, Any]:
        if self._losers is None:
            return self._item(row, None)
        for loser in self._losers.candidates(row, self._maker.drawn_epoch):
            try:
                return self._item(row, loser)
            except UndecodableImageError as error:
                self._item(row, None)  # raises if it is the pair's own image
                self._reject_at_read(loser, error, as_loser=True)
        raise UndecodableImageError("has no loser: no image of another prompt can be decoded")

    def _item(self, row: int, loser: int | None) -> dict[str, Any]:
        """Return a pair with its own loser, or with the winner of the pair `loser` as its loser."""
        (winner_row, winner_image), (loser_row, loser_image) = self._places(row, loser).tolist()
        prompts = [self._source.prompt(winner_row, winner_image)]
        if self.has_loser_prompts:
            prompts.append(self._source.prompt(loser_row, loser_image))
        draws = self._maker.draws_of(row)
        augmentation = self._maker.augmentation(draws)
        if self._encoded is not None:
            entries = self._encoded.pair(row, augmentation, self._maker.drawn_epoch, loser=loser)
        else:
            transform = self._maker.transform
            target = self.target_size(row)
            covering = transform.covering(target)
            images = self._source.images(winner_row)
            winner_pixels = self._reader.decode_at(images, winner_image, covering)
            images = images if loser_row == winner_row else self._source.images(loser_row)
            loser_pixels = self._reader.decode_at(images, loser_image, covering)
            entries = transform(winner_pixels, loser_pixels, augmentation, target)._asdict()
        item = self._maker.item(entries, row, prompts, draws) | self._numbers(row)
        if self.has_masks:
            masks = [self._source.mask(winner_row, winner_image), self._source.mask(loser_row, loser_image)]
            item["masks"] = place_masks(decode_masks(self._reader, masks), item, self._maker.transform)
        if self.has_sources and self._encoded is None:
            _, item["sources"] = self.edit(row, item["is_mirrored"])
        if self.has_noise_seeds and self._maker.training:
            target = self.target_size(row)
            for size in item["original_sizes"]:
                if tuple(size) != tuple(target):
                    raise BadDataError(NOISE_OF_ANOTHER_SIZE.format(*size, *target, row=winner_row))
            item["noise_seeds"] = tuple(
                self._source.noise_seed(*place) for place in ((winner_row, winner_image), (loser_row, loser_image))
            )
        if self._encoded is not None and self.has_sources:
            own, losers = ("empty", "empty") if self._maker.empties(draws) else ("own", "losers")
            item |= self._encoded.edit(row, item["is_mirrored"], own)
            if self.has_loser_prompts:
                item["loser_conditioning"] = self._encoded.edit(row, item["is_mirrored"], losers)
        elif self._encoded is not None:
            item |= self._encoded.conditioning(item["prompt"])
            if self.has_loser_prompts:
                item["loser_conditioning"] = self._encoded.conditioning(item["loser_prompt"])
        return item

    def edit(self, pair: int, is_mirrored: bool) -> tuple[list[str], list[Image.Image]]:
        """Return the prompts of winner and loser, and the images that they edit, mirrored if the pair's images are.

        Raises:
            UndecodableImageError: If a source cannot be decoded.
        """
        winner, loser = self._pairs.places[pair].reshape(2, 2).tolist()
        prompts = [self._source.prompt(*place) for place in (winner, loser)]
        return prompts, decode_sources(self._reader, self._source.edited(winner[0]), is_mirrored)

    @property
    def edits_lists(self) -> bool:
        """Whether the source column has lists of images."""
        return any(table.edits_lists for table in self._source.sources)

    def sizes_of_sources(self) -> Iterator[tuple[Size, ...]]:
        """Yield `(height, width)` of each row's source images, from their headers."""
        for table in self._source.sources:
            yield from table.sizes_of_edited(self._reader)

    def _numbers(self, row: int) -> dict[str, Any]:
        """Return the entries of an item that are columns of the table of pairs."""
        columns = self._pairs.columns
        numbers: dict[str, Any] = {}
        if self.scores is not None:
            numbers["scores"] = tuple(self.scores[row].tolist())
        if "weight" in columns:
            numbers["pair_weight"] = float(columns["weight"][row])
        if "ref_errors" in columns:
            errors = torch.from_numpy(columns["ref_errors"][row, self._maker.drawn_epoch])  # (T, 2)
            if errors.isnan().any():
                raise UndecodableImageError("has no errors of the reference: it could not be read when they were made")
            numbers["ref_errors"] = errors
        return numbers

    def _places(self, pair: int, loser: int | None) -> np.ndarray:
        """Return row and image of a pair's winner and loser, `(2, 2)`. The loser is the winner of the pair `loser`, if
        one is named."""
        places = self._pairs.places[pair].reshape(2, 2)
        if loser is None:
            return places
        assert self._losers is not None
        return np.stack([places[0], self._losers.images[loser]])

    def _reject_at_read(self, row: int, error: UndecodableImageError, *, as_loser: bool = False) -> None:
        rows = sorted(set(self._pairs.places[row, [0, 0 if as_loser else 2]].tolist()))
        where = f"{self._report.name} data, pair {row} (rows {rows} of the source)"
        if self.strict:
            raise BadDataError(f"{where}: {error}. {HOW_TO_DROP}") from error
        if as_loser:
            assert self._losers is not None
            self._losers.bad[row] = 1
        else:
            self._undecodable[row] = 1
        logger.warning("%s: %s; the next good pair is used instead.", where, error)

    # ---- Columns of the pairs -------------------------------------------------------------------------------------

    @property
    def has_scores(self) -> bool:
        """Whether items carry scores."""
        return self.scores is not None

    @property
    def scores(self) -> np.ndarray | None:
        """Scores of winner and loser as items carry them, `(P, 2)`; `None` without score columns."""
        return self._pairs.columns.get("calibrated", self._pairs.columns.get("scores"))

    @property
    def score_uses(self) -> tuple[bool, str | None]:
        """Whether scores are calibrated, and the origin of the pairs' weights; `None` without weights."""
        return "calibrated" in self._pairs.columns, self._pairs.weighed_by

    def use_scores(self, *, calibrated: np.ndarray | None, weights: np.ndarray | None, by: str | None = None) -> None:
        """Set scores `(P, 2)` that replace those of the source, and weights `(P,)` of the pairs."""
        weights = None if weights is None else weights.astype(np.float32)
        self._pairs = replace(self._pairs.with_columns(calibrated=calibrated, weight=weights), weighed_by=by)

    def origins(self) -> tuple[PairSource, np.ndarray]:
        """Return the source, and row and image of each pair's winner and loser, `(P, 4)`."""
        return self._source, self._pairs.places

    @property
    def reader(self) -> ImageReader:
        """The reader of the images, with the schemes that rows may use."""
        return self._reader

    @property
    def sizes(self) -> PairSizes | None:
        """The sizes of the pairs' buckets; `None` if all pairs have the transform's."""
        if "size" not in self._pairs.columns or self._options.buckets is None:
            return None
        return PairSizes(self._options.buckets.sizes, self._pairs.columns["size"])

    def target_size(self, row: int) -> Size:
        """Return `(height, width)` of a pair's pixels."""
        transform = self._maker.transform
        return (transform.height, transform.width) if self.sizes is None else self.sizes.of(row)

    def prompts(self) -> set[str]:
        """Return the distinct prompts of all pairs, with the losers' own prompts, if they have some."""
        images = np.unique(self._pairs.places[:, [1, 3]].clip(max=1)).tolist() if self.has_loser_prompts else [0]
        rows = np.unique(self._pairs.places[:, 0])
        return {prompt for image in images for prompt in self._source.prompts_of_rows(rows, image)}

    def fingerprint(self, *, thorough: bool = False, peers: Peers = ALONE) -> dict[str, Any]:
        """Identify these pairs by [`pairs_fingerprint`]. `thorough` is for caches, which do not depend on weights."""
        facts = peers.first(lambda: pairs_fingerprint(self._source, self._pairs, thorough=thorough))
        if not thorough and "weight" in self._pairs.columns:
            facts["pair_weights"] = self._pairs.hash_of("weight")
        return facts if self.sizes is None else facts | {"sizes": self.sizes.fingerprint()}

    # ---- Checks and counts ----------------------------------------------------------------------------------------

    @property
    def report(self) -> DataReport:
        """The counts so far, including those of all DataLoader workers."""
        count = int(self._undecodable.sum())
        return replace(self._report, pairs=len(self) - count, undecodable=self._report.undecodable + count)

    @property
    def undecodable(self) -> torch.Tensor:
        """Mask of the pairs that are in the index but could not be decoded: uint8 of shape `(P,)`, a copy."""
        return self._undecodable.clone()

    def mark_undecodable(self, mask: torch.Tensor) -> None:
        """Add the pairs that other processes could not decode, as a mask like `undecodable`."""
        self._undecodable |= mask

    def add_note(self, note: str) -> None:
        """Add a line to the report."""
        self._report.notes += (note,)

    def drop_bad_rows(self, reasons: Mapping[int, str]) -> None:
        """Drop and count the pairs of rows whose labels cannot be used. `reasons` has a reason by row."""
        rows = self._pairs.places[:, 0]
        bad = np.isin(rows, list(reasons))
        for row in np.unique(rows[bad]).tolist():
            self._reject("bad_labels", row, reasons[row], 1)
        self._keep(~bad)

    def check_images(self, num_proc: int | None = None, peers: Peers = ALONE, *, decode: bool = True) -> None:
        """Decode every image, or read only its header. Drop the pairs of bad and of small images, and assign the other
        pairs to their buckets. The arguments are those of [`examine_images`](checking.py)."""
        if not len(self):
            return
        places, buckets, min_side = self._pairs.places, self._options.buckets, self._options.min_side
        sizes, reasons = checking.examine_images(
            self._source, places, self._reader, decode=decode, num_proc=num_proc, peers=peers
        )
        is_readable = np.asarray((sizes > 0).all((1, 2)))
        is_large = np.asarray((sizes >= (min_side or 0)).all((1, 2)))
        for pair in np.flatnonzero(~is_readable).tolist():
            side = 0 if not sizes[pair, 0].all() else 1  # of the first bad image
            row, image = places[pair, 2 * side : 2 * side + 2].tolist()
            self._reject("undecodable", row, f"image {image} {reasons.get((row, image), checking.MISSING)}", 1)
        for pair in np.flatnonzero(is_readable & ~is_large).tolist():
            reason = f"{sizes[pair].min()} pixels along the shorter side, and `min_side={min_side}`"
            self._reject("too_small", int(places[pair, 0]), reason, 1)
        self._keep(is_readable & is_large)
        if not self._options.reads_sizes:
            return
        sizes = sizes[is_readable & is_large]
        targets = np.array([self.target_size(0)])
        if buckets is not None:
            numbers = buckets.assign(sizes.reshape(-1, 4).astype(np.int64))
            self._pairs = self._pairs.with_columns(size=numbers)
            targets = np.array(buckets.sizes)[numbers]
        self._report.notes = checking.describe_sizes(sizes, targets)

    def permute_losers(self) -> None:
        """Draw losers by [`PermutedLosers`] from now on, anew in every epoch. Evaluations have those of epoch 0."""
        self._losers = PermutedLosers.of(self._source, self._pairs.places, self._maker.seed, self._report.name)

    def check_sample(self, peers: Peers = ALONE, *, compare: bool = True) -> None:
        """Decode a sample of evenly spaced pairs, divided among the peers.

        Bad pairs stay in the index and are replaced by the next good pair. A run resumes by position in the index, so
        the index must not depend on files that cannot be read for a moment.

        Raises:
            ValueError: If no pair can be decoded or, with `compare`, all pairs have identical images.
        """
        sample = evenly_spaced(len(self), checking.SAMPLED_PAIRS)
        checked = checking.check_pairs(self._source, self._reader, self._pairs.places[sample], peers)
        identical_pairs = checking.IdenticalPairs(self._report.name)
        bad = 0
        for pair, result in zip(sample.tolist(), checked, strict=True):
            if isinstance(result, bool):
                identical_pairs.add(result)
                continue
            bad += 1
            self._undecodable[pair] = 1  # the report counts these
            row, _, reason = result
            self._reject("undecodable", row, reason, 0)
        if bad and len(sample) < len(self):
            logger.warning(
                "%s data: %d of %d checked pairs cannot be decoded. The data have %d pairs. `verify_images='all'` "
                "checks all of them before training. Otherwise, bad pairs are replaced when they are read.",
                *(self._report.name, bad, len(sample), len(self)),
            )
            if bad == len(sample):
                raise ValueError(f"None of the {bad} pairs that were checked can be decoded.\n{self._report}")
        if compare and not self.is_permuted:
            identical_pairs.verify()

    def _keep(self, mask: np.ndarray) -> None:
        self._pairs = self._pairs.take(mask)
        self._forget_undecodable()

    def _reject(self, kind: str, row: int, reason: str, amount: int) -> None:
        checking.reject(self._report, self.strict, kind, row, reason, amount)

    def _forget_undecodable(self) -> None:
        """Let all pairs be tried again. The mask is shared with DataLoader workers."""
        self._undecodable = torch.zeros(len(self), dtype=torch.uint8).share_memory_()
        self._losers = None if self._losers is None else self._losers.afresh()

    # ---- Epochs and views -----------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that was set."""
        return int(self._maker.epoch)

    @property
    def seed(self) -> int:
        """Seed of all random draws."""
        return self._maker.seed

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that random numbers depend on, also in running DataLoader workers."""
        self._maker.epoch.fill_(epoch)

    def for_evaluation(self) -> PreferenceDataset:
        """Return these pairs center-cropped, with all prompts, without weights, and with seeds that do not depend on
        the epoch. So numbers of evaluations compare."""
        pairs = replace(self._pairs.with_columns(weight=None), weighed_by=None)
        if self._maker.training:
            pairs = pairs.with_columns(ref_errors=None)  # they are those of other draws
        return self._view(pairs=pairs, maker=self._maker.for_evaluation())

    def repeating(self, epochs: int) -> PreferenceDataset:
        """Return these pairs with random numbers that repeat after so many epochs."""
        return self._view(pairs=self._pairs.with_columns(ref_errors=None), maker=self._maker.repeating(epochs))

    def in_epoch(self, epoch: int) -> PreferenceDataset:
        """Return these pairs in a fixed epoch, without errors of a reference."""
        return self._view(pairs=self._pairs.with_columns(ref_errors=None), maker=self._maker.in_epoch(epoch))

    def for_storing(self) -> PreferenceDataset:
        """Return these pairs, all of which are tried again, for results that are stored."""
        view = self._view()
        view._forget_undecodable()
        return view

    def from_source(self) -> PreferenceDataset:
        """Return these pairs without encodings and errors of a reference, which may belong to another model."""
        view = self._view(pairs=self._pairs.with_columns(ref_errors=None))
        view._encoded = None
        view._forget_undecodable()
        return view

    def first(self, count: int) -> PreferenceDataset:
        """Return the first pairs, at most `count`, with their random numbers."""
        view = self._view(pairs=self._pairs.take(slice(count)))
        view._undecodable = self._undecodable[:count].clone().share_memory_()
        return view

    # ---- Encoded pairs and errors of a reference ------------------------------------------------------------------

    def use_encoded(self, encoded: Encoded) -> None:
        """Read moments and conditioning in place of images from now on. All pairs are tried again."""
        self._encoded = encoded
        self._forget_undecodable()

    @property
    def has_reference_errors(self) -> bool:
        """Whether items carry errors of a reference."""
        return "ref_errors" in self._pairs.columns

    def set_reference_errors(self, errors: np.ndarray) -> None:
        """Set the errors of a reference: float32 `(E, P, T, 2)`, for E epochs that repeat, P pairs, T timesteps of a
        pair, and winner and loser. A pair with NaN is treated like one that cannot be decoded."""
        epochs = self._maker.repeat_after if self._maker.training else 1
        assert epochs is not None, "draws must repeat if errors of a reference are stored"
        if errors.shape[:2] != (epochs, len(self)) or errors.shape[3:] != (2,):
            raise ValueError(
                f"Errors of a reference must have the shape ({epochs}, {len(self)}, T, 2) of epochs and pairs; got "
                f"{errors.shape}."
            )
        self._pairs = self._pairs.with_columns(ref_errors=errors.swapaxes(0, 1))
        if self._losers is not None:
            self._losers.bad |= torch.from_numpy(np.isnan(errors).any((0, 2, 3)))

    def draw_settings(self) -> dict[str, Any]:
        """Return the settings that items depend on: seed, size, crop and so on."""
        maker = self._maker
        drawn = {"seed": maker.seed, "prompt_dropout": maker.prompt_dropout, "training": maker.training}
        return {**drawn, **self.pixel_settings(), **({"losers": "permute"} if self.is_permuted else {})}

    def pixel_settings(self) -> dict[str, Any]:
        """Return the settings that pixels depend on, as values of JSON."""
        return {"transform": type(self._maker.transform).__name__, **vars(self._maker.transform)}

    @property
    def augmentations(self) -> tuple[bool, bool]:
        """Whether images may be mirrored, and whether they are cropped at random."""
        transform, training = self._maker.transform, self._maker.training
        return training and transform.random_flip, training and not transform.center_crop

    @property
    def prompt_dropout(self) -> float:
        """Probability that a prompt is emptied."""
        return self._maker.prompt_dropout if self._maker.training else 0.0

    def image_numbers(self) -> np.ndarray:
        """Return a number for each pair's two images, int64 of shape `(P, 2)`. Images with equal numbers have equal
        pixels, apart from flips and random crops."""
        images = self._pairs.places.reshape(-1, 2, 2).astype(np.int64)
        numbers = images[..., 0] * (images[..., 1].max(initial=0) + 1) + images[..., 1]
        return numbers if self.sizes is None else numbers * len(self.sizes.sizes) + self.sizes.numbers[:, None]

    def image_variants(
        self, pair: int, side: int, draws: Sequence[PairDraws]
    ) -> list[tuple[torch.Tensor, Size, Size]]:
        """Return the pixels `(3, H, W)` of the winner (`side` 0) or the loser (1) of a pair for each of `draws`, the
        size of the image, and the corner of the crop.

        Raises:
            UndecodableImageError: If it cannot be decoded.
        """
        row, image = self._pairs.places[pair, 2 * side : 2 * side + 2].tolist()
        transform, target = self._maker.transform, self.target_size(pair)
        decoded = self._reader.decode_at(self._source.images(row), image, transform.covering(target))
        made = (transform.image(decoded, draw, target) for draw in draws)
        return [(pixels, full_size(decoded), corner) for pixels, corner in made]


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
    - `masks` (`torch.Tensor` of shape `(2B, 1, H, W)`, uint8), if the data set has a mask column;
    - `noise_seeds` (`list[int]` of length 2B), winners first, if training draws the images' own noise;
    - `sources` (`list[list[PIL.Image.Image]]` of length B), if the data set has a source column;
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
        if "masks" in items[0]:
            batch["masks"] = torch.cat(torch.stack([item["masks"] for item in items], dim=1).unbind())
        if "noise_seeds" in items[0]:
            batch["noise_seeds"] = _winners_first(items, "noise_seeds")
        if "sources" in items[0]:
            batch["sources"] = [item["sources"] for item in items]
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
                if any(prompt[kind].keys() != items[0][kind].keys() for prompt in prompts):
                    raise ValueError(f"All pairs of a batch must have equally many source images. {ONE_PAIR}")
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


def decode_sources(reader: ImageReader, stored: Sequence[Any], is_mirrored: bool) -> list[Image.Image]:
    """Decode the images that a prompt edits, mirrored if the pair's images are.

    Raises:
        UndecodableImageError: If there is none, or one of them is missing or cannot be decoded.
    """
    if not stored:
        raise UndecodableImageError("has no source")
    try:
        sources = [reader.decode(value).convert("RGB") for value in stored]
    except UndecodableImageError as error:
        raise UndecodableImageError(f"has a source that {error}") from error
    return [ImageOps.mirror(source) for source in sources] if is_mirrored else sources


def padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors `(T, ...)` of different lengths into one tensor `(B, longest T, ...)`, padded with zeros."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    if len({row.shape[1:] for row in rows}) > 1:
        raise ValueError(f"The source images of a batch must be resized to one size. {ONE_PAIR}")
    joined = rows[0].new_zeros(len(rows), max(map(len, rows)), *rows[0].shape[1:])
    for padded_row, row in zip(joined, rows, strict=True):
        padded_row[: len(row)] = row
    return joined


def _winners_first(items: list[dict[str, Any]], key: str) -> list[Any]:
    return [item[key][side] for side in (0, 1) for item in items]
