"""Map-style pairs: an index in memory, over images that stay in the source."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from . import checking
from .buckets import AspectRatioBuckets, PairSizes, Repeated, TakenAgain, candidates
from .checking import ALONE, HOW_TO_DROP, DataReport, Peers, SourceImage, evenly_spaced
from .holdout import PermutedLosers
from .image_sizes import settle_sizes
from .images import ImageReader, UndecodableImageError
from .index import PairNumbers
from .mixture import Source
from .tables import pairs_fingerprint
from .transforms import Encoded, ItemMaker, PairDraws, Size, check_reference_errors

logger = logging.getLogger(__name__)


class PreferenceDataset(Dataset):
    """Map-style pairs: a view on a source data set, made by [`prepare_dataset`].

    Items are dicts: `pixel_values` (`torch.Tensor` of shape `(2, 3, H, W)`, uint8, winner first), `prompt` (`""` if
    dropped), `original_sizes` and `crop_top_lefts` (two of `(height, width)` and of `(top, left)`), `seed` (for noise
    and timestep), `row` (the pair's index), where losers have their own prompts `loser_prompt`, and where the source
    has score columns `scores`; `pair_weight` after `use_scores` with weights; after `set_reference_errors` also
    `ref_errors` (`(T, 2)`, of winner and loser at T noise levels). After `use_encoded` they have `moments` and
    `target_size` in place of `pixel_values`, and the prompts' `conditioning` and `loser_conditioning`. With aspect
    ratio buckets H and W are those of `target_size(row)`; `repeated` says whether the pair fills up a batch. An item
    depends on the seed, the epoch, how often that has taken the pair, and `row`, where losers are permuted on all
    prompts as well, and on nothing else. A pair that cannot be decoded is replaced by the next one that can (of its
    bucket, if there is one), whichever process reads it first. What was computed at the size of another bucket is of
    that size: of a bucket without a good pair, all pairs are replaced by those of one other.
    """

    def __init__(
        self, source: Source, maker: ItemMaker, reader: ImageReader, *, strict: bool, name: str, permutes: bool = False
    ) -> None:
        self._source, self._maker, self._reader = source, maker, reader
        self.strict = strict  # whether bad rows stop the run
        self.is_swapped = source.format.is_swapped  # whether the published losers are the winners
        self.is_permuted = permutes  # whether losers are the winners of other pairs, by `permute_losers`
        self._report = DataReport(name, source.format.name, rows=len(source), is_swapped=self.is_swapped)
        self._report.is_permuted = permutes
        self._index, scores = source.pairs(self._reject)  # of shapes (P, 4) and (P, 2)
        if permutes:  # an index of the winners alone
            self._index, scores = np.asarray(self._index)[:, [0, 1, 0, 1]], None
        self._numbers = PairNumbers(scores)
        self.has_loser_prompts = source.format.prompt_of_each_image and not permutes
        self._losers: PermutedLosers | None = None
        self._reference_errors: np.ndarray | None = None  # (K, P, T, 2)
        self._encoded: Encoded | None = None
        self.sizes: PairSizes | None = None  # of the pairs' buckets; where there are none, all have the transform's
        self._reset_undecodable()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def has_scores(self) -> bool:
        """Whether items carry scores."""
        return self._numbers.scores is not None

    @property
    def scores(self) -> np.ndarray | None:
        """Scores of winner and loser as items carry them, `(P, 2)`; `None` without score columns."""
        return self._numbers.scores_of_items

    @property
    def score_uses(self) -> tuple[bool, str | None]:
        """Whether scores are calibrated, and what weights of pairs were computed from; `None` without weights."""
        return self._numbers.calibrated is not None, self._numbers.weighed_by

    def use_scores(self, *, calibrated: np.ndarray | None, weights: np.ndarray | None, by: str | None = None) -> None:
        """Let items carry these in place of the source's scores, `(P, 2)`, and weights of the pairs, `(P,)`."""
        weights = None if weights is None else weights.astype(np.float32)
        self._numbers = replace(self._numbers, calibrated=calibrated, weights=weights, weighed_by=by)

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

    def permute_losers(self) -> None:
        """Draws losers by [`PermutedLosers`] from now on, anew in every epoch; for evaluation those of the first."""
        self._losers = PermutedLosers.of(self._source, self._index, self._maker.seed, self._report.name)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that random numbers depend on, also in running DataLoader workers."""
        self._maker.set_epoch(epoch)

    def for_evaluation(self) -> "PreferenceDataset":
        """The same pairs, center-cropped, with every prompt and with seeds that do not depend on the epoch."""
        view = copy.copy(self)
        view._maker = self._maker.for_evaluation()
        view._numbers = replace(self._numbers, weights=None, weighed_by=None)  # so that numbers of evaluations compare
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
        """The same pairs, for results that are stored: what is undecodable is found anew."""
        view = copy.copy(self)
        view._reset_undecodable()
        return view

    def set_reference_errors(self, errors: np.ndarray) -> None:
        """Sets the reference errors that items carry, float32 `(K, P, T, 2)`: at each of K repeating draws, of each
        of the P pairs, at T draws of timestep and noise, of winner and loser. A pair with NaN is left out, as one that
        cannot be decoded."""
        check_reference_errors(errors, self._maker.noise_draws if self._maker.training else 1, len(self))
        self._reference_errors = errors
        if self._losers is not None:
            self._losers.bad |= torch.from_numpy(np.isnan(errors).any((0, 2, 3)))

    @property
    def has_reference_errors(self) -> bool:
        """Whether items carry errors of a reference."""
        return self._reference_errors is not None

    def draw_settings(self) -> dict[str, Any]:
        """What the items depend on besides the source, the epoch and the row: seed, size, crop and so on."""
        maker = self._maker
        drawn = {"seed": maker.seed, "prompt_dropout": maker.prompt_dropout, "training": maker.training}
        return {**drawn, **self.pixel_settings(), **({"losers": "permute"} if self.is_permuted else {})}

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
        return numbers if self.sizes is None else numbers * len(self.sizes.sizes) + self.sizes.numbers[:, None]

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

    def prompts(self, *, of_losers: bool = True) -> set[str]:
        """The distinct prompts of all pairs; of losers, where they have their own, only if wanted."""
        columns = [1, 3] if of_losers else [1]
        images = np.unique(self._index[:, columns].clip(max=1)).tolist() if self.has_loser_prompts else [0]
        return set().union(*(self._source.prompts(np.unique(self._index[:, 0]), image) for image in images))

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
        view._index, view._numbers = self._index[:count], self._numbers.take(slice(count))
        view.sizes = None if self.sizes is None else self.sizes.take(slice(count))
        view._undecodable = self._undecodable[:count].clone().share_memory_()
        if self._reference_errors is not None:
            view._reference_errors = self._reference_errors[:, :count]
        return view

    def fingerprint(self, *, thorough: bool = False, peers: Peers = ALONE) -> dict[str, Any]:
        """Identifies these pairs; see [`pairs_fingerprint`], which runs in the first of the peers."""
        scores = self._numbers.scores
        found = peers.first(partial(pairs_fingerprint, self._source, self._index, scores, thorough=thorough))
        found |= {} if thorough else self._numbers.fingerprint()  # caches are thorough, and do not depend on weights
        return found if self.sizes is None else found | {"sizes": self.sizes.fingerprint()}

    def check_sample(self, peers: Peers = ALONE, *, compare: bool = True) -> None:
        """Decodes a sample of evenly spaced pairs, divided among the peers. Those that fail stay in the index and are
        replaced by the next good pair: a run resumes by position in the index, which must not depend on which files
        could be read at its start. `ValueError` if none can be decoded or, with `compare`, all have identical images.
        """
        sample = evenly_spaced(len(self), checking.SAMPLED_PAIRS).tolist()
        losers = [None if self._losers is None else self._losers.of_pair(pair, self._maker.draw) for pair in sample]
        places = [self._places(*pair) for pair in zip(sample, losers, strict=True)]
        checked = checking.check_pairs(self._source, self._reader, places, peers)
        reasons = {image: reason for found, _ in checked for image, reason in found.items()}
        for pair, image in checking.pairs_of_images(self._index, reasons):
            reason = f"image {image[1]} {reasons[image]}"
            if self.strict:
                self._reject("undecodable", image[0], reason, 1)
            self._undecodable[pair] = 1  # the report counts these
            self._report.add("undecodable", image[0], reason, amount=0)
        checking.tell_of_sample(self._report, len(self), len(sample), sum(bool(found) for found, _ in checked))
        if compare:
            checking.IdenticalPairs(self._report.name).verify_all([identical for _, identical in checked])

    def check_all(self, num_proc: int | None = None, peers: Peers = ALONE) -> None:
        """Decodes every image once and drops the pairs of those that fail; arguments as of [`problems_of_images`]."""
        if len(self):
            self._drop(checking.problems_of_images(self._source, self._index, self._reader, num_proc, peers))

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = range(len(self))[index]
        computed = self._encoded is not None or self._reference_errors is not None  # at each pair's own size
        maker = self._maker.taken_again(index.times) if isinstance(index, TakenAgain) else self._maker
        for row in candidates(start, len(self), self.sizes, by_bucket=computed):
            if self._undecodable[row]:
                continue
            try:
                item = self._read(row, self.target_size(row if computed else start), maker)
            except UndecodableImageError as error:
                self._reject_at_read(row, error)
                continue
            return item if self.sizes is None else item | {"repeated": isinstance(index, Repeated)}
        raise checking.BadDataError(f"No pair of the data set can be decoded.\n{self.report}")

    def _read(self, row: int, target: Size, maker: ItemMaker) -> dict[str, Any]:
        if self._losers is None:
            return self._read_pair(row, None, target, maker)
        for loser in self._losers.candidates(row, maker.draw):
            try:
                return self._read_pair(row, loser, target, maker)
            except UndecodableImageError as error:
                self._read_pair(row, None, target, maker)  # raises if it is the pair's own image
                self._reject_at_read(loser, error, as_loser=True)
        raise UndecodableImageError("has no loser: no image of another prompt can be decoded")

    def _read_pair(self, row: int, loser: int | None, target: Size, maker: ItemMaker) -> dict[str, Any]:
        return {**self._item(row, loser, target, maker), **self._stored_errors(row)}

    def _item(self, row: int, loser: int | None, target: Size, maker: ItemMaker) -> dict[str, Any]:
        """A pair, with the winner of the pair `loser` as its loser, or with its own."""
        (winner_row, winner_image), (loser_row, loser_image) = places = self._places(row, loser).tolist()
        scores, weight = self._numbers.scores_of(row), self._numbers.weight_of(row)
        prompt = self._source.prompt(winner_row, winner_image)
        loser_prompt = self._source.prompt(loser_row, loser_image) if self.has_loser_prompts else None
        if self._encoded is not None:
            read = partial(self._encoded.pair, row, loser=loser)
            item = maker.item_of(row, prompt, read, scores, loser_prompt=loser_prompt)
            if loser_prompt is not None:
                item["loser_conditioning"] = self._encoded.conditioning(item["loser_prompt"])
            return item | self._encoded.conditioning(item["prompt"]) | weight
        images = {place: self._source.images(place) for place in dict.fromkeys((winner_row, loser_row))}
        winner, lost = (self._reader.decode_at(images[place], image) for place, image in places)
        return maker.item(row, prompt, winner, lost, scores, target=target, loser_prompt=loser_prompt) | weight

    def _stored_errors(self, row: int) -> dict[str, torch.Tensor]:
        if self._reference_errors is None:
            return {}
        errors = torch.from_numpy(self._reference_errors[self._maker.draw, row])  # (T, 2)
        if errors.isnan().any():
            raise UndecodableImageError("has no errors of the reference: it could not be read when they were computed")
        return {"ref_errors": errors}

    def _places(self, pair: int, loser: int | None) -> np.ndarray:
        """Rows and images of a pair's winner and of its loser, the winner of the pair `loser` or its own, `(2, 2)`."""
        places = self._index[pair].reshape(2, 2)
        return places if loser is None else np.stack([places[0], self._losers.images[loser]])

    def _reject_at_read(self, row: int, error: UndecodableImageError, *, as_loser: bool = False) -> None:
        images = self._losers.images if as_loser else self._index  # (P, 2) or (P, 4)
        rows = sorted({int(images[row, 0]), int(images[row, -2])})
        where = f"{self._report.name} data, pair {row} (rows {rows} of the source)"
        if self.strict:
            raise checking.BadDataError(f"{where}: {error}. {HOW_TO_DROP}") from error
        (self._losers.bad if as_loser else self._undecodable)[row] = 1
        logger.warning("%s: %s; the next good pair is used instead.", where, error)

    def _drop(self, reasons: Mapping[SourceImage, str]) -> None:
        keep = np.ones(len(self), dtype=bool)
        for pair, image in checking.pairs_of_images(self._index, reasons):
            keep[pair] = False
            self._reject("undecodable", image[0], f"image {image[1]} {reasons[image]}", 1)
        self._keep(keep)

    def _keep(self, mask: np.ndarray) -> None:
        if not mask.all():
            self._index, self._numbers = self._index[mask], self._numbers.take(mask)
            self._reset_undecodable()

    def _reject(self, kind: str, row: int, reason: str, amount: int) -> None:
        checking.reject(self._report, self.strict, kind, row, reason, amount)

    def _reset_undecodable(self) -> None:
        self._undecodable = torch.zeros(len(self._index), dtype=torch.uint8).share_memory_()
        self._losers = None if self._losers is None else self._losers.afresh()
