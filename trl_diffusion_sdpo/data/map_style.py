"""Map-style pairs: an index in memory, over images that stay in the source."""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..sources.checking import (
    ALONE,
    HOW_TO_DROP,
    SAMPLED_PAIRS,
    BadDataError,
    DataReport,
    IdenticalPairs,
    Peers,
    SourceImage,
    evenly_spaced,
    pairs_of_images,
    problems_of_all,
    problems_of_pair,
    reject,
    report_sample,
)
from ..sources.images import ImageReader, UndecodableImageError, UnreadableImageError, read_again
from ..sources.mixture import Source
from ..sources.tables import pairs_fingerprint
from .buckets import AspectRatioBuckets, PairSizes, Repeated, TakenAgain, candidates
from .image_sizes import settle_sizes
from .transforms import Encoded, ItemMaker, PairDraws, Size

logger = logging.getLogger(__name__)


class PreferenceDataset(Dataset):
    """Map-style pairs: a view on a source data set, made by [`prepare_dataset`].

    Items are dicts: `pixel_values` (`torch.Tensor` of shape `(2, 3, H, W)`, uint8, winner first), `prompt` (`""` if
    dropped), `original_sizes` and `crop_top_lefts` (two of `(height, width)` and of `(top, left)`), `seed` (for noise
    and timestep), `row` (the pair's index) and, where the source has score columns, `scores`; `pair_weight` after
    `use_scores` with weights; after `set_reference_errors` also `ref_errors` (`(T, 2)`, of winner and loser at T noise
    levels). After `use_encoded` they have `moments` and `target_size` in place of `pixel_values`, and the prompt's
    `conditioning`. With aspect-ratio buckets H and W are those of `target_size(row)`, and `repeated` says whether the
    pair fills up a batch. An item depends on the seed, the epoch, how often that has taken the pair, and `row`, and on
    nothing else. A pair that cannot be decoded is replaced by the next one that can (of its bucket, if there is one),
    whichever process reads it first. What was computed at the size of another bucket is of that size: of a bucket
    without a good pair, all pairs are replaced by those of one other.
    """

    def __init__(self, source: Source, maker: ItemMaker, reader: ImageReader, *, strict: bool, name: str) -> None:
        self._source, self._maker, self._reader = source, maker, reader
        self.strict = strict  # whether bad rows stop the run
        self._for_storing = False  # then so do errors that may pass
        self.is_swapped = source.format.is_swapped  # whether the published losers are the winners
        self._report = DataReport(name, source.format.name, rows=len(source), is_swapped=self.is_swapped)
        self._index, self._scores = source.pairs(self._reject)  # of shapes (P, 4) and (P, 2)
        self._reference_errors: np.ndarray | None = None  # (K, P, T, 2)
        self._calibrated: np.ndarray | None = None  # scores, (P, 2)
        self._weights: np.ndarray | None = None  # (P,)
        self._encoded: Encoded | None = None
        self.sizes: PairSizes | None = None  # of the pairs' buckets; where there are none, all have the transform's
        self._reset_undecodable()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def has_scores(self) -> bool:
        """Whether items carry scores."""
        return self._scores is not None

    @property
    def scores(self) -> np.ndarray | None:
        """Scores of winner and loser as items carry them, `(P, 2)`; `None` without score columns."""
        return self._scores if self._calibrated is None else self._calibrated

    @property
    def score_uses(self) -> tuple[bool, bool]:
        """Whether scores are calibrated, and whether pairs have weights."""
        return self._calibrated is not None, self._weights is not None

    def use_scores(self, *, calibrated: np.ndarray | None, weights: np.ndarray | None) -> None:
        """Let items carry these in place of the source's scores, `(P, 2)`, and weights of the pairs, `(P,)`."""
        self._calibrated, self._weights = calibrated, None if weights is None else weights.astype(np.float32)

    def origins(self) -> tuple[Source, np.ndarray]:
        """The source, and of each pair the row and the image in it of winner and of loser, `(P, 4)`."""
        return self._source, self._index

    def add_note(self, note: str) -> None:
        """Adds a line to the report."""
        self._report.notes += (note,)

    def drop_bad_rows(self, reasons: Mapping[int, str]) -> None:
        """Drops the pairs of rows whose labels cannot be used, each with the reason, and counts them."""
        bad = np.isin(self._index[:, 0], list(reasons))
        for row in np.unique(self._index[bad, 0]).tolist():
            self._reject("bad_labels", row, reasons[row], 1)
        self._keep(~bad)

    @property
    def fork_safe(self) -> bool:
        """Whether forked DataLoader workers can read from their copies of the source."""
        return self._source.fork_safe

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
        """Adds the pairs that other processes could not decode: a mask as of `undecodable`."""
        self._undecodable |= mask

    @property
    def epoch(self) -> int:
        """The one that was set."""
        return int(self._maker.epoch)

    def target_size(self, row: int) -> Size:
        """`(height, width)` of a pair's pixels."""
        transform = self._maker.transform
        return (transform.height, transform.width) if self.sizes is None else self.sizes.of(row)

    def settle_sizes(
        self,
        buckets: AspectRatioBuckets | None,
        min_side: int | None,
        num_proc: int | None = None,
        peers: Peers = ALONE,
    ) -> None:
        """Reads the size of every image from its header, drops the pairs of those that have none or fewer pixels than
        `min_side` along a side, and gives the others the sizes of their buckets; the rest as for `check_all`."""
        targets = buckets or self.target_size(0)
        settled = settle_sizes(self._source, self._index, self._reader, targets, min_side, num_proc, peers)
        for kind, pair, reason, amount in settled.drops:
            self._reject(kind, int(self._index[pair, 0]), reason, amount)
        self._keep(settled.kept)
        self.sizes, self._report.notes = settled.sizes, settled.notes

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that random numbers depend on, also in running DataLoader workers."""
        self._maker.set_epoch(epoch)

    def for_evaluation(self) -> "PreferenceDataset":
        """The same pairs, center-cropped, with every prompt and with seeds that do not depend on the epoch."""
        view = copy.copy(self)
        view._maker = self._maker.for_evaluation()
        view._weights = None  # so that numbers of evaluations compare
        if self._maker.training:
            view._reference_errors = None  # they are those of other draws
        return view

    def with_noise_draws(self, noise_draws: int) -> "PreferenceDataset":
        """The same pairs, whose random numbers repeat after so many epochs."""
        view = copy.copy(self)
        view._maker, view._reference_errors = self._maker.repeating(noise_draws), None
        return view

    def in_epoch(self, epoch: int) -> "PreferenceDataset":
        """The same pairs in an epoch of their own, also in DataLoader workers, without errors of a reference."""
        view = copy.copy(self)
        view._maker, view._reference_errors = self._maker.in_epoch(epoch), None
        return view

    def for_storing(self) -> "PreferenceDataset":
        """The same pairs, for results that are stored: what is undecodable is found anew, and an image that may be good
        and cannot be read, also when it is read again, is an error."""
        view = copy.copy(self)
        view._for_storing = True
        view._reset_undecodable()
        return view

    def set_reference_errors(self, errors: np.ndarray) -> None:
        """Sets the errors of a reference that items carry.

        Args:
            errors (`np.ndarray` of shape `(K, P, T, 2)`, float32): At each of K repeating draws, of each of the P
                pairs, at T draws of timestep and noise, of winner and loser. A pair with NaN is left out, as one that
                cannot be decoded.
        """
        draws = self._maker.noise_draws if self._maker.training else 1
        if errors.shape[:2] != (draws, len(self)) or errors.shape[3:] != (2,):
            raise ValueError(
                f"Errors of a reference must have the shape ({draws}, {len(self)}, T, 2) of {draws} draws and "
                f"{len(self)} pairs; got {errors.shape}."
            )
        self._reference_errors = errors

    @property
    def has_reference_errors(self) -> bool:
        """Whether items carry errors of a reference."""
        return self._reference_errors is not None

    def draw_settings(self) -> dict[str, Any]:
        """What the items depend on besides the source, the epoch and the row: seed, size, crop and so on."""
        maker = self._maker
        drawn = {"seed": maker.seed, "prompt_dropout": maker.prompt_dropout, "training": maker.training}
        return {**drawn, **self.pixel_settings()}

    # ---- Encoding before training ---------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """Of every random draw."""
        return self._maker.seed

    @property
    def augmentations(self) -> tuple[bool, bool]:
        """Whether images may be mirrored, and whether they are cropped at random."""
        transform, training = self._maker.transform, self._maker.training
        return training and transform.random_flip, training and not transform.center_crop

    def pixel_settings(self) -> dict[str, Any]:
        """What the pixels depend on besides the images, as values of JSON."""
        return {"transform": type(self._maker.transform).__name__, **vars(self._maker.transform)}

    def image_numbers(self) -> np.ndarray:
        """A number for each pair's two images, int64 of shape `(P, 2)`: equal where their pixels are without flips and
        random crops, and in the order of the source."""
        images = self._index.reshape(-1, 2, 2).astype(np.int64)
        numbers = images[..., 0] * (images[..., 1].max(initial=0) + 1) + images[..., 1]
        if self.sizes is None:
            return numbers
        return numbers * len(self.sizes.sizes) + self.sizes.numbers[:, None]

    def image_variants(
        self, pair: int, side: int, draws: Sequence[PairDraws]
    ) -> list[tuple[torch.Tensor, Size, Size]]:
        """Pixels `(3, H, W)` of the winner (`side` 0) or the loser (1) of a pair for each of `draws`, the size of the
        image, and the corner of the crop.

        Raises:
            UndecodableImageError: If it cannot be decoded.
        """
        row, image = self._index[pair, 2 * side : 2 * side + 2].tolist()
        decoded = self._reader.decode_at(self._source.images(row), image)
        found = (self._maker.transform.image(decoded, draw, self.target_size(pair)) for draw in draws)
        return [(pixels, (decoded.height, decoded.width), corner) for pixels, corner in found]

    def prompts(self) -> set[str]:
        """The distinct prompts of all pairs."""
        return self._source.prompts(np.unique(self._index[:, 0]))

    @property
    def is_encoded(self) -> bool:
        """Whether items are read from encoded pairs."""
        return self._encoded is not None

    def use_encoded(self, encoded: Encoded) -> None:
        """Read moments and conditioning from now on, and no image; what is undecodable is found anew."""
        self._encoded = encoded
        self._reset_undecodable()

    def from_source(self) -> "PreferenceDataset":
        """The same pairs without encoded ones and errors of a reference, which may be of another model; what is
        undecodable is found anew."""
        view = copy.copy(self)
        view._encoded = view._reference_errors = None
        view._reset_undecodable()
        return view

    def first(self, count: int) -> "PreferenceDataset":
        """The first pairs, at most `count`, with the same random numbers as here."""
        view = copy.copy(self)
        view._index, view._scores = self._index[:count], None if self._scores is None else self._scores[:count]
        view.sizes = None if self.sizes is None else self.sizes.take(slice(count))
        view._undecodable = self._undecodable[:count].clone().share_memory_()
        view._calibrated = None if self._calibrated is None else self._calibrated[:count]
        view._weights = None if self._weights is None else self._weights[:count]
        if self._reference_errors is not None:
            view._reference_errors = self._reference_errors[:, :count]
        return view

    def fingerprint(self, *, thorough: bool = False, peers: Peers = ALONE) -> dict[str, Any]:
        """Identifies these pairs; see [`pairs_fingerprint`], which runs in the first of the peers."""
        found = peers.first(partial(pairs_fingerprint, self._source, self._index, self._scores, thorough=thorough))
        if self._weights is not None and not thorough:  # as caches are, which do not depend on them
            found["pair_weights"] = hashlib.sha256(self._weights.tobytes()).hexdigest()[:16]
        return found if self.sizes is None else found | {"sizes": self.sizes.fingerprint()}

    def check_sample(self, peers: Peers = ALONE, *, compare: bool = True) -> None:
        """Decodes a sample of evenly spaced pairs. Those that fail stay in the index and are replaced by the next good
        pair: a run resumes by position in the index, which must not depend on which files could be read at its start.

        Args:
            peers (`Peers`): The processes that divide the sample.
            compare (`bool`): Whether to refuse pairs whose winner and loser are identical.

        Raises:
            ValueError: If none of the sample can be decoded, or all its pairs are identical.
        """
        sample = evenly_spaced(len(self), SAMPLED_PAIRS).tolist()
        share = sample[peers.index :: peers.count]
        check = partial(problems_of_pair, self._source, self._reader)
        gathered = peers.gather_results(lambda: [check(self._index[pair]) for pair in share])
        checked = [result for results in gathered for result in results]
        reasons = {image: reason for found, _ in checked for image, reason in found.items()}
        for pair, image in pairs_of_images(self._index, reasons):
            reason = f"image {image[1]} {reasons[image]}"
            if self.strict:
                self._reject("undecodable", image[0], reason, 1)
            self._undecodable[pair] = 1  # the report counts these
            self._report.add("undecodable", image[0], reason, amount=0)
        report_sample(self.report, len(sample), sum(bool(found) for found, _ in checked), len(self))
        if compare:
            IdenticalPairs(self._report.name).verify_all([identical for _, identical in checked])

    def check_all(self, num_proc: int | None = None, peers: Peers = ALONE) -> None:
        """Decodes every image once and drops the pairs of those that fail.

        Args:
            num_proc (`int`, *optional*): Worker processes of each peer; by default as many as there are cores where
                the source is fork-safe.
            peers (`Peers`): The processes that divide the images.
        """
        if len(self):
            self._drop(problems_of_all(self._source, self._index, self._reader, num_proc, peers))

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = range(len(self))[index]
        computed = self._encoded is not None or self._reference_errors is not None  # at each pair's own size
        maker = self._maker.taken_again(index.times) if isinstance(index, TakenAgain) else self._maker
        for row in candidates(start, len(self), self.sizes, by_bucket=computed):
            if self._undecodable[row]:
                continue
            read = partial(self._item, row, self.target_size(row if computed else start), maker)
            try:
                item = {**(read_again(read) if self._for_storing else read()), **self._stored_errors(row)}
            except UndecodableImageError as error:
                self._reject_at_read(row, error)
                continue
            return item if self.sizes is None else item | {"repeated": isinstance(index, Repeated)}
        raise BadDataError(f"No pair of the data set can be decoded.\n{self.report}")

    def _item(self, row: int, target: Size, maker: ItemMaker) -> dict[str, Any]:
        winner_row, winner_image, loser_row, loser_image = self._index[row].tolist()
        scores = None if self.scores is None else tuple(self.scores[row].tolist())
        weight = {} if self._weights is None else {"pair_weight": float(self._weights[row])}
        if self._encoded is not None:
            item = maker.item_of(row, self._source.prompt(winner_row), partial(self._encoded.pair, row), scores)
            return item | self._encoded.conditioning(item["prompt"]) | weight
        winner_images = self._source.images(winner_row)
        loser_images = winner_images if loser_row == winner_row else self._source.images(loser_row)
        winner = self._reader.decode_at(winner_images, winner_image)
        loser = self._reader.decode_at(loser_images, loser_image)
        return maker.item(row, self._source.prompt(winner_row), winner, loser, scores, target=target) | weight

    def _stored_errors(self, row: int) -> dict[str, torch.Tensor]:
        if self._reference_errors is None:
            return {}
        errors = torch.from_numpy(self._reference_errors[self._maker.draw, row])  # (T, 2)
        if errors.isnan().any():
            raise UndecodableImageError("has no errors of the reference: it could not be read when they were computed")
        return {"ref_errors": errors}

    def _reject_at_read(self, row: int, error: UndecodableImageError) -> None:
        rows = sorted({int(self._index[row, 0]), int(self._index[row, 2])})
        where = f"{self._report.name} data, pair {row} (rows {rows} of the source)"
        if self._for_storing and isinstance(error, UnreadableImageError):
            raise UnreadableImageError(f"{where}: {error}") from error
        if self.strict:
            raise BadDataError(f"{where}: {error}. {HOW_TO_DROP}") from error
        self._undecodable[row] = 1
        logger.warning("%s: %s; the next good pair is used instead.", where, error)

    def _drop(self, reasons: Mapping[SourceImage, str]) -> None:
        keep = np.ones(len(self), dtype=bool)
        for pair, image in pairs_of_images(self._index, reasons):
            keep[pair] = False
            self._reject("undecodable", image[0], f"image {image[1]} {reasons[image]}", 1)
        self._keep(keep)

    def _keep(self, mask: np.ndarray) -> None:
        if not mask.all():
            self._index = self._index[mask]
            self._scores = None if self._scores is None else self._scores[mask]
            self._reset_undecodable()

    def _reject(self, kind: str, row: int, reason: str, amount: int) -> None:
        reject(self._report, self.strict, kind, row, reason, amount)

    def _reset_undecodable(self) -> None:
        self._undecodable = torch.zeros(len(self._index), dtype=torch.uint8).share_memory_()
