"""Torch data set that reads and transforms the images of pairs, and the collator that makes batches of them."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from ..utils.errors import UserError
from ..utils.processes import ALONE, Peers
from ..utils.score_scale import ScoreReading
from . import data_report
from .buckets import AspectRatioBuckets, BucketSampler, PairKey, PairSizes
from .data_report import BadDataError, DataReport, evenly_spaced
from .flips import emptied, mirrored
from .images import SCHEMES, ImageReader, Size, UndecodableImageError
from .pair_table import PairTable
from .pairs import PairEncodings, Pairs
from .permuted_losers import PermutedLosers
from .sources import PairSource, StoredImage
from .transforms import INTERPOLATION, PairDraws, PairTransform, fit_masks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairOptions:
    """Settings for making pairs from a preference data set.

    Args:
        transform (`PairTransform`): Resizes, crops and flips images.
        prompt_dropout (`float` in `[0, 1]`): Probability with which training empties a prompt.
        seed (`int`, not negative): Seed of all random draws.
        dataset_format (`str`, *optional*): A key of `FORMATS`. By default, the columns determine it.
        verify_images (`str`): Images of a map-style data set to decode before training: those of `SAMPLED_PAIRS` evenly
            spaced pairs with `"sample"`, all with `"all"`, which drops bad pairs and is cached by `datasets`. Otherwise
            the next good pair replaces a bad one during training.
        num_proc (`int`, *optional*): Worker processes that check images. By default, one per CPU core if there are many
            images, and otherwise none.
        image_schemes (`Sequence[str]`, *optional*): URL schemes that rows may use, such as `"s3"`, besides
            `file`, `hf`, `zip` and `tar`.
        buckets ([`AspectRatioBuckets`], *optional*): Training sizes by aspect ratio, in place of the transform's size.
            The header of every image is read to choose each pair's.
        min_side (`int`, *optional*): Smallest allowed shorter side, in pixels. Pairs with a smaller image are dropped.
        training (`bool`): Whether the pairs are for training. An evaluation crops at the center, never flips, never
            empties prompts, and draws the same random numbers in every epoch.
        repeat (`bool`): Whether a stream restarts when it ends, with new random numbers and, if it is shuffled, in a
            new order. No effect on map-style data sets.
        distinct_epochs (`int`, *optional*): Epochs after which the random numbers of a map-style data set repeat. By
            default, they never do.
        use_scores (`bool`): Whether to read score columns if they exist. Rows without a score are then dropped.
        needs_scores (`str`): The setting that needs score columns, for the message if there are none, such as
            "`pair_weights`". By default, none does.
        needs_masks (`str`): The setting that needs a mask column, in the same way.
        needs_all_rows (`Sequence[str]`): Further settings that need all rows before the first batch, and so cannot be
            used with a stream.
        score_reading (`ScoreReading`, *optional*): What the loss needs of the scores.
        score_threshold (`float`, *optional*): Score from which on a single image is liked. By default, the median of
            each data set.
        score_distances (`bool`): Whether items have the scores of single images less their threshold, for
            `tgo_distance_weight`.
        swap_labels (`bool`): Whether to exchange winner and loser of every pair.
        number_columns (`Sequence[str]`): Columns of a map-style data set that must have finite numbers in every row.
        noise_seeds (`bool`): Whether to read, for training, the seeds of the noise from which the images were
            generated, in the columns `SEED_COLUMNS`.
        losers (`str`): `"data"` reads losers from the data. `"permute"` takes winners of pairs with other prompts, by a
            new random permutation in each epoch.
    """

    transform: PairTransform
    prompt_dropout: float = 0.0
    seed: int = 42
    dataset_format: str | None = None
    verify_images: str = "sample"
    num_proc: int | None = None
    image_schemes: Sequence[str] | None = None
    buckets: AspectRatioBuckets | None = None
    min_side: int | None = None
    training: bool = True
    repeat: bool = False
    distinct_epochs: int | None = None
    use_scores: bool = True
    needs_scores: str = ""
    needs_masks: str = ""
    needs_all_rows: Sequence[str] = ()
    score_reading: ScoreReading | None = None
    score_threshold: float | None = None
    score_distances: bool = False
    swap_labels: bool = False
    number_columns: Sequence[str] = ()
    noise_seeds: bool = False
    losers: str = "data"

    @property
    def permutes(self) -> bool:
        """Whether losers are the winners of other pairs."""
        return self.losers == "permute"

    @property
    def reads_sizes(self) -> bool:
        """Whether every image's size is read before the first batch."""
        return self.buckets is not None or self.min_side is not None

    def for_evaluation(self) -> PairOptions:
        """Return the options of an evaluation on the same pairs."""
        return replace(self, prompt_dropout=0.0, training=False, repeat=False, distinct_epochs=None)

    @cached_property
    def reader(self) -> ImageReader:
        """Reader that opens and decodes images."""
        return ImageReader((*SCHEMES, *(self.image_schemes or ())))


class PreferenceDataset(Pairs):
    """Map-style data set of pairs, made by [`prepare_dataset`].

    Items are dicts with these entries:

    - `pixel_values` (`torch.Tensor` of shape `(2, 3, H, W)`, uint8): winner and loser;
    - `prompt` (`str`, `""` if it was dropped), and `loser_prompt` if losers have their own;
    - `original_sizes` and `crop_top_lefts`: `(height, width)` and `(top, left)` of both images;
    - `seed` (of noise and timestep) and `row` (number of the pair);
    - `scores`, `pair_weight` and `ref_errors` (errors of the reference, `(2,)`), each if the data set has it;
    - `masks` (`torch.Tensor` of shape `(2, 1, H, W)`, uint8), if there is a mask column: 1 inside, 0 outside;
    - `sources` (`list[PIL.Image.Image]`), if there is a source column: images that the prompt edits, resized and
      cropped like `pixel_values` if they have the pair's shape, else whole. `loser_sources`, if losers have their own;
    - `noise_seeds` (`tuple[int, int]`), if training reads them: seeds of the initial noise of winner and loser;
    - `repeated` (`bool`), with aspect-ratio buckets: whether the pair only fills up a batch.

    If latents were computed before training, `moments`, `target_size`, `conditioning` and `loser_conditioning` replace
    `pixel_values`.

    An item depends only on the seed, the epoch and the pair's number, and with permuted losers on the prompts of all
    pairs. For a pair that cannot be decoded, every process returns the next decodable one of the same size.

    Args:
        source ([`PairSource`]): Prompts and images.
        pairs ([`PairTable`]): Positions of the pairs' images, and further columns.
        options ([`PairOptions`]): Settings with which the pairs were made.
        report ([`DataReport`]): Rows and pairs dropped so far.
        losers ([`PermutedLosers`], *optional*): Chooses losers from other pairs.
        source_sizes (`Mapping`, *optional*): All sizes of an item's sources, as tuples with `(height, width)` of each,
            by the `(height, width)` at which the pair trains.
    """

    is_stream = False

    def __init__(
        self,
        source: PairSource,
        pairs: PairTable,
        options: PairOptions,
        report: DataReport,
        losers: PermutedLosers | None = None,
        source_sizes: Mapping[Size, set[tuple[Size, ...]]] | None = None,
    ) -> None:
        self.source = source  # rows behind the pairs
        self._pairs = pairs
        self._options = options
        self._report = report
        self._epoch = new_epoch()
        self._losers = losers
        self._encoded: PairEncodings | None = None
        self._forget_undecodable()
        self.has_loser_prompts = (source.prompt_of_each_image or source.single_images) and not options.permutes
        self.has_scores = "scores" in pairs.columns
        self.has_masks = source.has_masks
        self.has_sources = source.has_sources
        self.has_loser_sources = source.has_sources and source.single_images
        self.source_sizes = source_sizes or {}

    def __len__(self) -> int:
        return len(self._pairs)

    # ---- Reading --------------------------------------------------------------------------------------------------

    def __getitem__(self, key: int | PairKey) -> dict[str, Any]:
        index, is_repeated = key if isinstance(key, PairKey) else (key, False)
        wanted = range(len(self))[index]
        buckets = self._pairs.columns.get("size")
        for pair in chain(range(wanted, len(self)), range(wanted)):  # the next good pair replaces a bad pair
            if self._undecodable[pair] or (buckets is not None and buckets[pair] != buckets[wanted]):
                continue
            try:
                item = self._item(pair) if self._losers is None else self._item_with_drawn_loser(pair, self._losers)
            except UndecodableImageError as error:
                self._reject_at_read(pair, error)
                continue
            return item if buckets is None else item | {"repeated": is_repeated}
        size = "" if buckets is None else " of {} x {} pixels".format(*self.target_size(wanted))
        advice = "`verify_images='all'` drops undecodable pairs before training."
        raise BadDataError(f"No pair{size} of the data set can be decoded. {advice}\n{self.report}")

    def _item(self, pair: int, loser_pair: int | None = None) -> dict[str, Any]:
        """Return the item of a pair, with the winner of `loser_pair` as its loser if passed."""
        options = self._options
        epoch = self._drawn_epoch
        draws = PairDraws.from_key(options.seed, epoch, pair)
        augmentation = draws if options.training else None  # crop and flip
        positions = self.positions[pair].reshape(2, 2).tolist()
        if loser_pair is not None:
            positions[1] = self.positions[loser_pair, :2].tolist()
        winner, loser = self.source.images(positions, with_images=self._encoded is None)
        if self._encoded is None:
            images = winner.decode(options.reader), loser.decode(options.reader)
            item = options.transform(*images, augmentation, self.target_size(pair))._asdict()
        else:
            item = self._encoded.pair(pair, augmentation, epoch, loser=loser_pair)
        complete_item(item, options, winner, loser, draws, pair, two_prompts=self.has_loser_prompts)
        item |= self._numbers(pair, epoch)
        if options.noise_seeds and options.training:
            self._check_size_of_noise(item, pair)
            loser_wins = loser_pair is not None  # the pair that it is taken from
            item["noise_seeds"] = winner.noise_seed(is_winner=True), loser.noise_seed(is_winner=loser_wins)
        if self._encoded is not None:
            edited = [
                (self._source_key(pair, side), item["is_mirrored"]) if self.has_sources else None for side in (0, 1)
            ]
            item |= self._encoded.conditioning(item["prompt"], edited[0])
            if self.has_loser_prompts:
                item["loser_conditioning"] = self._encoded.conditioning(item["loser_prompt"], edited[1])
        elif self.has_sources:
            for side, name in enumerate(("sources", "loser_sources") if self.has_loser_sources else ("sources",)):
                key = self._source_key(pair, side)
                sources = (winner if key[0] == positions[0][0] else loser).sources(options.reader)
                item[name] = self._fit_sources(sources, key, item["is_mirrored"], item["crop_top_lefts"][side])
        return item

    def _numbers(self, pair: int, epoch: int) -> dict[str, Any]:
        """Return a pair's scores, weight and reference errors, as entries of its item."""
        columns = self._pairs.columns
        numbers: dict[str, Any] = {}
        if self.scores is not None:
            numbers["scores"] = tuple(self.scores[pair].tolist())
        if "weight" in columns:
            numbers["pair_weight"] = float(columns["weight"][pair])
        if "ref_errors" in columns:
            errors = torch.from_numpy(columns["ref_errors"][pair, epoch])  # (2,)
            if errors.isnan().any():
                raise UndecodableImageError("could not be read when the errors of the reference were computed")
            numbers["ref_errors"] = errors
        return numbers

    def _check_size_of_noise(self, item: dict[str, Any], pair: int) -> None:
        target = self.target_size(pair)
        for size in item["original_sizes"]:
            if tuple(size) != tuple(target):
                raise BadDataError(
                    "`noise_source='generated'` needs images at the size at which they were generated. Row "
                    f"{self.positions[pair, 0]} has an image of {size[0]} x {size[1]} pixels (height x width), but "
                    f"training uses {target[0]} x {target[1]}. Set `resolution` to the images' size."
                )

    def _item_with_drawn_loser(self, pair: int, losers: PermutedLosers) -> dict[str, Any]:
        for loser_pair in losers.candidates(pair, self._drawn_epoch):
            try:
                return self._item(pair, loser_pair)
            except UndecodableImageError as error:
                self._item(pair)  # raises if the winner is the bad image
                self._reject_at_read(loser_pair, error, as_loser=True)
        raise UndecodableImageError("has no loser: no image of another prompt can be decoded")

    def _reject_at_read(self, pair: int, error: UndecodableImageError, *, as_loser: bool = False) -> None:
        rows = sorted(set(self.positions[pair, [0, 0 if as_loser else 2]].tolist()))
        where = f"{self._report.name} data, pair {pair} (rows {rows} of the source)"
        if as_loser:
            assert self._losers is not None
            self._losers.bad[pair] = 1
        else:
            self._undecodable[pair] = 1
        logger.warning("%s: %s. The next good pair is used instead.", where, error)

    # ---- Columns of the pairs -------------------------------------------------------------------------------------

    @property
    def scores(self) -> np.ndarray | None:
        """Scores of winners and losers, `(P, 2)`, or `None`. Calibrated after `set_calibrated_scores`."""
        return self._pairs.columns.get("calibrated", self._pairs.columns.get("scores"))

    def set_calibrated_scores(self, scores: np.ndarray) -> None:
        """Replace the scores of the columns by calibrated ones, `(P, 2)`."""
        self._pairs = self._pairs.with_columns(calibrated=scores)

    def set_weights(self, weights: np.ndarray) -> None:
        """Set the factor of each pair's loss, `(P,)`."""
        self._pairs = self._pairs.with_columns(weight=weights.astype(np.float32))

    @property
    def positions(self) -> np.ndarray:
        """Row and image numbers of each pair's winner and loser, `(P, 4)`."""
        return self._pairs.positions

    @property
    def reader(self) -> ImageReader:
        """Opens and decodes images of the URL schemes that rows may use."""
        return self._options.reader

    @property
    def sizes(self) -> PairSizes | None:
        """Bucket of each pair, or `None` if all train at the transform's `resolution`."""
        buckets = self._options.buckets
        numbers = self._pairs.columns.get("size")
        return None if buckets is None or numbers is None else PairSizes(buckets.sizes, numbers)

    def target_size(self, row: int) -> Size:
        """Return the `(height, width)` at which a pair trains."""
        if self.sizes is None:
            return self._options.transform.height, self._options.transform.width
        return self.sizes.sizes[self.sizes.numbers[row]]

    def prompts(self, first: int | None = None) -> set[str]:
        """Return the distinct prompts of the `first` pairs, by default of all, including losers' own prompts."""
        return {prompt for _, prompts in self._prompts_by_row(first) for prompt in prompts}

    def _prompts_by_row(self, first: int | None = None) -> Iterator[tuple[int, tuple[str, ...]]]:
        positions = self.positions[:first]
        images = [0]
        if self.source.prompt_of_each_image:
            columns = [1, 3] if self.has_loser_prompts else [1]
            images = np.unique(positions[:, columns].clip(max=1)).tolist()
        rows = np.unique(positions[:, [0, 2] if self.has_loser_prompts else 0])
        prompts = zip(*(self.source.prompts_of_rows(rows, image) for image in images), strict=True)
        yield from zip(rows.tolist(), prompts, strict=True)

    def fingerprint(self, *, thorough: bool = False, peers: Peers = ALONE) -> dict[str, Any]:
        """Return hashes that identify these pairs; see [`PairSource.fingerprint`]. If `thorough`, without weights."""
        facts = peers.first(lambda: self.source.fingerprint(self._pairs, thorough=thorough))
        if not thorough and "weight" in self._pairs.columns:
            facts["pair_weights"] = hashlib.sha256(self._pairs.columns["weight"].tobytes()).hexdigest()[:16]
        return facts if self.sizes is None else facts | {"sizes": self.sizes.fingerprint()}

    # ---- Checks and counts ----------------------------------------------------------------------------------------

    @property
    def report(self) -> DataReport:
        """Counts so far, including the pairs that DataLoader workers could not decode."""
        count = int(self._undecodable.sum())
        return replace(self._report, pairs=len(self) - count, undecodable=self._report.undecodable + count)

    @property
    def undecodable(self) -> torch.Tensor:
        """Copy of the mask of pairs that could not be decoded so far, uint8 of shape `(P,)`."""
        return self._undecodable.clone()

    def gather_undecodable(self, peers: Peers) -> None:
        for pairs in peers.gather(torch.nonzero(self._undecodable).flatten().tolist()):
            self._undecodable[pairs] = 1

    def add_note(self, note: str) -> None:
        """Add a line to the report."""
        self._report.notes += (note,)

    def check_sample(self, peers: Peers = ALONE) -> None:
        """Decode a sample of evenly spaced pairs, in the first process only.

        Bad pairs stay in the data set, and in training the next good one replaces them: a resumed run continues at a
        pair number, which must not depend on temporarily unreadable files.

        Raises:
            ValueError: If none of the sample can be decoded, and there are further pairs.
        """
        sample = evenly_spaced(len(self), data_report.SAMPLED_PAIRS).tolist()
        problems = peers.first(lambda: [self._problem_of(pair) for pair in sample])
        bad = {pair: problem for pair, problem in zip(sample, problems, strict=True) if problem is not None}
        for pair, (row, reason) in bad.items():
            self._undecodable[pair] = 1  # `report` counts these pairs
            self._report.add("undecodable", row, reason, 0)
        if len(bad) == len(sample) < len(self):
            raise UserError(f"None of the {len(bad)} pairs that were checked can be decoded.\n{self._report}")

    def _problem_of(self, pair: int) -> tuple[int, str] | None:
        """Decode a pair's images. Return the row of the first bad one and the reason, or `None` if both are good."""
        for row, image in self.positions[pair].reshape(2, 2).tolist():
            try:
                self.source.images([(row, image)])[0].decode(self._options.reader)
            except UndecodableImageError as error:
                return row, str(error)
        return None

    def sample_of_identical(self) -> list[bool]:
        """Return whether both images of a pair are the same, undecoded, for some evenly spaced pairs. Permuted losers
        are always other images."""
        if self._losers is not None:
            return [False]
        sample = self.positions[evenly_spaced(len(self), data_report.SAMPLED_PAIRS)].reshape(-1, 2, 2).tolist()
        return [winner.is_same(loser) for winner, loser in map(self.source.images, sample)]

    def _forget_undecodable(self) -> None:
        """Clear the mask of undecodable pairs, which workers share, so that all are tried again."""
        self._undecodable = torch.zeros(len(self), dtype=torch.uint8).share_memory_()
        if self._losers is not None:
            self._losers.bad.zero_()

    # ---- Epochs and views -----------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Epoch set by `set_epoch`."""
        return int(self._epoch)

    @property
    def _drawn_epoch(self) -> int:
        """Epoch on which random numbers depend: 0 in evaluations, else the epoch modulo `distinct_epochs`, if set."""
        if not self._options.training:
            return 0
        repeats_after = self._options.distinct_epochs
        return int(self._epoch) if repeats_after is None else int(self._epoch) % repeats_after

    @property
    def seed(self) -> int:
        """Seed of all random draws."""
        return self._options.seed

    @property
    def losers(self) -> PermutedLosers | None:
        """Chooser of losers from other pairs, or `None` if each pair has its own."""
        return self._losers

    @property
    def is_for_training(self) -> bool:
        return self._options.training

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def sample(self, count: int) -> list[dict[str, Any]]:
        count = min(count, len(self))
        return [self[i * len(self) // count] for i in range(count)]

    def sampler(self, group: int, *, shuffled: bool = False, drop_last: bool = False) -> Sampler[Any]:
        if self.sizes is None:
            return RandomSampler(self) if shuffled else SequentialSampler(self)
        epoch = (lambda: self.epoch) if shuffled else None
        return BucketSampler(self.sizes, group, seed=self.seed, epoch=epoch, drop_last=drop_last)

    def for_evaluation(self) -> PreferenceDataset:
        """Return these pairs for evaluation: cropped at the center, never flipped, no prompt emptied, without weights,
        and with the same seeds in every epoch, so that evaluations are comparable."""
        view = self.in_epoch(0)  # this view has an epoch of its own
        view._options = self._options.for_evaluation()
        view._pairs = self._pairs.with_columns(weight=None)
        if self._options.training:
            view._pairs = view._pairs.with_columns(ref_errors=None)  # drop errors for training's random numbers
        return view

    def in_epoch(self, epoch: int) -> PreferenceDataset:
        """Return a view of these pairs with the random numbers of `epoch`, without reference errors."""
        view = copy.copy(self)
        view._pairs = self._pairs.with_columns(ref_errors=None)
        view._epoch = new_epoch()
        view.set_epoch(epoch)
        return view

    # ---- Encoded pairs and errors of a reference ------------------------------------------------------------------

    def use_encoded(self, encoded: PairEncodings) -> None:
        """Read latents and embeddings from `encoded` instead of images, and try undecodable pairs again."""
        self._encoded = encoded
        self._forget_undecodable()

    @property
    def has_reference_errors(self) -> bool:
        """Whether items have errors of the reference model, computed before training."""
        return "ref_errors" in self._pairs.columns

    def set_reference_errors(self, errors: np.ndarray) -> None:
        """Set the reference model's errors, float32 `(E, P, 2)`, for E epochs, P pairs, and winner and loser. A pair
        with a NaN counts as undecodable."""
        epochs = self._options.distinct_epochs if self._options.training else 1
        assert epochs is not None, "draws must repeat if errors of a reference are stored"
        if errors.shape != (epochs, len(self), 2):
            raise UserError(
                f"Errors of a reference must have the shape ({epochs}, {len(self)}, 2), for epochs, pairs and two "
                f"images; got {errors.shape}."
            )
        self._pairs = self._pairs.with_columns(ref_errors=errors.swapaxes(0, 1))
        if self._losers is not None:
            self._losers.bad |= torch.from_numpy(np.isnan(errors).any((0, 2)))

    def draw_settings(self) -> dict[str, Any]:
        """Return the settings on which items depend, such as the seed and the transform's."""
        options = self._options
        drawn = {"seed": options.seed, "prompt_dropout": options.prompt_dropout, "training": options.training}
        return {**drawn, **self.pixel_settings(), **({"losers": "permute"} if self._options.permutes else {})}

    def pixel_settings(self) -> dict[str, Any]:
        """Return the transform's settings, with values that JSON can hold."""
        transform = self._options.transform
        return {"transform": type(transform).__name__, **vars(transform), "interpolation": INTERPOLATION.name.lower()}

    @property
    def augmentations(self) -> tuple[bool, bool]:
        """Whether images may be mirrored, and whether they are cropped at random."""
        transform = self._options.transform
        training = self._options.training
        return training and transform.random_flip, training and not transform.center_crop

    def edits(self, epochs: int | None = None) -> Iterator[tuple[tuple[int, int, int], bool, str]]:
        """Yield each edit that items can contain, or that training draws in its first `epochs` epochs: key of the
        source images, whether they are mirrored, and prompt."""
        flips, _ = self.augmentations
        dropout = self._options.prompt_dropout if self._options.training else 0.0
        drawn = np.zeros((2, 2, len(self)), dtype=bool)  # whether images are mirrored, and the prompt is emptied
        if epochs is None:
            drawn[: 1 + flips, : 1 + (dropout > 0)] = True
        for epoch in range(epochs or 0):
            key = self.seed, epoch, len(self)
            of_pairs = (mirrored(*key) & flips).astype(int), emptied(*key, dropout).astype(int), np.arange(len(self))
            drawn[of_pairs] = True
        prompts = dict(self._prompts_by_row())
        rows = self.positions[:, [0, 2] if self.has_loser_sources else [0]]
        for is_mirrored, is_emptied, pair in np.argwhere(drawn).tolist():
            for side, row in enumerate(rows[pair].tolist()):
                for prompt in ("",) if is_emptied else prompts[row]:
                    yield self._source_key(pair, side), bool(is_mirrored), prompt

    def _source_key(self, pair: int, side: int) -> tuple[int, int, int]:
        """Return what the sources of a pair's winner (`side` 0) or loser (`side` 1) depend on: their row, one bit for
        each that is cropped with the pair, and the pair's bucket."""
        bucket = 0 if self.sizes is None else int(self.sizes.numbers[pair])
        columns = self._pairs.columns
        return int(columns["source_rows"][pair, side]), int(columns["sources_cut"][pair, side]), bucket

    def sources_of(self, key: tuple[int, int, int], is_mirrored: bool) -> list[Image.Image]:
        """Return the source images with a key of `edits`, cropped at the center, as in items.

        Raises:
            UndecodableImageError: If the row has no source image, or one cannot be decoded.
        """
        sources = self.source.images([(key[0], 0)])[0].sources(self._options.reader)
        return self._fit_sources(sources, key, is_mirrored)

    def _fit_sources(
        self, sources: list[Image.Image], key: tuple[int, int, int], is_mirrored: bool, corner: Size | None = None
    ) -> list[Image.Image]:
        """Resize, mirror and crop source images exactly as the images of their pair, whose crop has its top left corner
        at `corner`, by default at the center. Whole ones are only mirrored."""
        transform = self._options.transform
        buckets = self._options.buckets
        _, are_cut, bucket = key
        target = (transform.height, transform.width) if buckets is None else buckets.sizes[bucket]
        fitted = []
        for number, source in enumerate(sources):
            if are_cut >> number & 1:
                fitted.append(transform.cut(source, corner, target, is_mirrored=is_mirrored))
            else:
                fitted.append(ImageOps.mirror(source) if is_mirrored else source)
        return fitted

    def image_numbers(self) -> np.ndarray:
        """Return a number for each image of each pair, int64 of shape `(P, 2)`. Equal numbers mean equal pixels, apart
        from flips and random crops."""
        images = self.positions.reshape(-1, 2, 2).astype(np.int64)
        numbers = images[..., 0] * (images[..., 1].max(initial=0) + 1) + images[..., 1]
        return numbers if self.sizes is None else numbers * len(self.sizes.sizes) + self.sizes.numbers[:, None]

    def image_variants(
        self, pair: int, side: int, draws: Sequence[PairDraws]
    ) -> list[tuple[torch.Tensor, Size, Size]]:
        """Transform a pair's winner (`side` 0) or loser (`side` 1) once with each of the random numbers `draws`. For
        each, return pixels `(3, H, W)`, the image's `(height, width)`, and the crop's `(top, left)` corner.

        Raises:
            UndecodableImageError: If the image cannot be decoded.
        """
        position = self.positions[pair, 2 * side : 2 * side + 2].tolist()
        decoded = self.source.images([position])[0].decode(self._options.reader)
        made = (self._options.transform.image(decoded, draw, self.target_size(pair)) for draw in draws)
        return [(pixels, (decoded.height, decoded.width), corner) for pixels, corner in made]


def new_epoch() -> torch.Tensor:
    """Return an epoch of 0, in memory that DataLoader workers share."""
    return torch.zeros(1, dtype=torch.long).share_memory_()


def complete_item(
    item: dict[str, Any],
    options: PairOptions,
    winner: StoredImage,
    loser: StoredImage,
    draws: PairDraws,
    row: int,
    *,
    two_prompts: bool,
) -> None:
    """Add prompts, seed, pair number and masks to an item that already has its images.

    Raises:
        UndecodableImageError: If a mask cannot be decoded, or its size differs from its image's.
    """
    is_emptied = options.training and draws.dropout < options.prompt_dropout
    item |= {"prompt": "" if is_emptied else winner.prompt, "seed": draws.seed, "row": row}
    if two_prompts:
        item["loser_prompt"] = "" if is_emptied else loser.prompt
    if winner.format.mask_columns:
        first = options.reader.decode_mask(winner.mask)
        second = first if loser.mask == winner.mask else options.reader.decode_mask(loser.mask)
        item["masks"] = fit_masks([first, second], item, options.transform)


@dataclass
class PreferenceCollator:
    """Makes a batch of items of `PreferenceDataset` or `PreferenceIterableDataset`.

    It returns a `dict` with

    - `rows` (`torch.LongTensor` of shape `(B,)`): numbers of the pairs, first because accelerate and transformers read
      the batch size from the first entry;
    - `pixel_values` (`torch.Tensor` of shape `(2B, 3, H, W)`, uint8): winners, then losers. The trainer makes them
      floats in `[-1, 1]` on the device, one micro-batch at a time; a custom collator may return floats itself;
    - `prompts` (`list[str]` of length B, or 2B if losers have their own, winners first);
    - `original_sizes`, `crop_top_lefts` (`torch.LongTensor` of shape `(2B, 2)`): `(height, width)` and `(top, left)`;
    - `seeds` (`list[int]` of length B): seeds of noise and timestep;
    - `counted` (`int`), if repeated pairs may fill up the batch: number of pairs that are not repeated;
    - `scores` (`torch.FloatTensor` of shape `(2B,)`), if there are score columns;
    - `masks` (`torch.Tensor` of shape `(2B, 1, H, W)`, uint8), if there is a mask column;
    - `noise_seeds` (`list[int]` of length 2B, winners first), if training reads them: seeds of the images' initial
      noise;
    - `sources` (`list[list[PIL.Image.Image]]` of length B, or 2B if losers have their own, winners first), if there is
      a source column;
    - `pair_weights` (`torch.FloatTensor` of shape `(B,)`), if training pairs have weights;
    - `ref_errors` (`torch.FloatTensor` of shape `(2B,)`, winners first), if computed before training.

    If latents were computed before training, `moments` (`torch.Tensor` of shape `(2B, ...)`) and `target_size`
    (`(height, width)` of the pixels) replace `pixel_values`. `conditioning` (tensors of shape `(B, ...)`, padded at the
    end with zeros) and `host_conditioning` (lists of length B) are added, with length 2B if there are 2B prompts.

    Raises:
        ValueError: If the items have different entries, or tensors that cannot be stacked.
    """

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        first = set(_entries(items[0]))
        for item in items[1:]:
            if different := first.symmetric_difference(_entries(item)):
                raise UserError(
                    "All items of a batch must have the same entries. Only some of the pairs "
                    f"{[item['row'] for item in items]} have {sorted(different)}. Train in batches of one pair, or "
                    "give all rows the same number of source images."
                )
        batch = {
            "rows": torch.tensor([item["row"] for item in items], dtype=torch.long),
            **_images(items),
            "prompts": [item[name] for name in ("prompt", "loser_prompt") if name in items[0] for item in items],
            "original_sizes": torch.tensor(_winners_first(items, "original_sizes"), dtype=torch.long),
            "crop_top_lefts": torch.tensor(_winners_first(items, "crop_top_lefts"), dtype=torch.long),
            "seeds": [item["seed"] for item in items],
        }
        if "masks" in items[0]:
            batch["masks"] = torch.cat(torch.stack([item["masks"] for item in items], dim=1).unbind())
        if "noise_seeds" in items[0]:
            batch["noise_seeds"] = _winners_first(items, "noise_seeds")
        if "sources" in items[0]:
            names = [name for name in ("sources", "loser_sources") if name in items[0]]
            batch["sources"] = [item[name] for name in names for item in items]
        if "repeated" in items[0]:
            batch["counted"] = sum(not item["repeated"] for item in items)
        if "scores" in items[0]:
            batch["scores"] = torch.tensor(_winners_first(items, "scores"), dtype=torch.float32)
        if "pair_weight" in items[0]:
            batch["pair_weights"] = torch.tensor([item["pair_weight"] for item in items], dtype=torch.float32)
        if "ref_errors" in items[0]:
            errors = torch.stack([item["ref_errors"] for item in items])  # (B, 2)
            batch["ref_errors"] = errors.T.flatten()
        return batch


def _entries(item: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of an item's entries, and those of mappings in it."""
    for name, value in item.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _entries(value))


def _images(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the items' pixels, or the latents and embeddings in their place. A batch must have one image size."""
    name = "moments" if "moments" in items[0] else "pixel_values"
    batch: dict[str, Any] = {name: torch.cat(torch.stack([item[name] for item in items], dim=1).unbind())}
    if name == "moments":
        batch["target_size"] = items[0]["target_size"]
        prompts = [*items, *(item["loser_conditioning"] for item in items if "loser_conditioning" in item)]
        for kind, join in (("conditioning", padded), ("host_conditioning", list)):
            if kind in items[0]:
                batch[kind] = {key: join([prompt[kind][key] for prompt in prompts]) for key in items[0][kind]}
    return batch


def padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack B tensors `(T, ...)` of different lengths T into `(B, longest T, ...)`, padded with zeros."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    if len({row.shape[1:] for row in rows}) > 1:
        raise UserError(
            "Encodings of a batch may differ only in their number of tokens, as those of prompts do. Got the shapes "
            f"{[list(row.shape) for row in rows]}. Train in batches of one pair."
        )
    joined = rows[0].new_zeros(len(rows), max(map(len, rows)), *rows[0].shape[1:])
    for padded_row, row in zip(joined, rows, strict=True):
        padded_row[: len(row)] = row
    return joined


def _winners_first(items: list[dict[str, Any]], key: str) -> list[Any]:
    return [item[key][side] for side in (0, 1) for item in items]
