"""Map-style pairs: nothing but index arrays is kept in memory, the images stay where the source has them."""

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .checking import (
    ALONE,
    FEW_ROWS,
    SAMPLED_PAIRS,
    AlikePairs,
    Peers,
    forks_by_default,
    same_image,
    spread,
    usable_cores,
)
from .fingerprint import pairs_fingerprint
from .images import ImageReader, UndecodableImageError
from .report import HOW_TO_DROP, DataReport, reject
from .sources import ArrowSource, RowSource, build_index
from .transforms import ItemMaker

logger = logging.getLogger(__name__)

Place = tuple[int, int]  # row of the source, image of the row


class PreferenceDataset(Dataset):
    """Map-style pairs: a view on a source data set, made by [`prepare_dataset`].

    Items are dicts: `pixel_values` (`torch.Tensor` of shape `(2, 3, H, W)`, uint8, winner first), `prompt` (`""` if
    dropped), `original_sizes` and `crop_top_lefts` (two of `(height, width)` and of `(top, left)`), `seed` (for noise
    and timestep), `row` (the pair's index) and, where the source has score columns, `scores`. An item depends on the
    seed, the epoch and `row`, and on nothing else. In place of a pair that cannot be decoded stands the next one that
    can, whichever process meets it first.
    """

    def __init__(
        self, source: ArrowSource | RowSource, maker: ItemMaker, reader: ImageReader, *, strict: bool, name: str
    ) -> None:
        self._source, self._maker, self._reader, self._strict = source, maker, reader, strict
        self._report = DataReport(name, source.format.name, rows=len(source))
        self._places, self._scores = build_index(source, self._reject)
        self._forget_bad_pairs()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def has_scores(self) -> bool:
        """Whether items carry scores."""
        return self._scores is not None

    @property
    def forks(self) -> bool:
        """Whether DataLoader workers can read from copies of the source that were made by forking."""
        return self._source.forks

    @property
    def report(self) -> DataReport:
        """The counts so far, those of all DataLoader workers included."""
        late = int(self._bad.sum())
        return replace(self._report, pairs=len(self) - late, undecodable=self._report.undecodable + late)

    @property
    def found_late(self) -> torch.Tensor:
        """Which pairs were found undecodable when their turn came: 1 or 0 for each, uint8 of shape `(P,)`, a copy."""
        return self._bad.clone()

    def mark_late(self, bad: torch.Tensor) -> None:
        """Takes over what other processes have found, as `found_late` has it."""
        self._bad |= bad

    def set_epoch(self, epoch: int) -> None:
        """Changes the draws; seen by running DataLoader workers too."""
        self._maker.set_epoch(epoch)

    def for_evaluation(self) -> "PreferenceDataset":
        """The same pairs cut in the middle, with every prompt, under draws of their own that no epoch changes."""
        view = copy.copy(self)
        view._maker = self._maker.for_evaluation()
        return view

    def first(self, count: int) -> "PreferenceDataset":
        """The first pairs, at most `count`; they draw as they do in the whole."""
        view = copy.copy(self)
        view._places, view._scores = self._places[:count], None if self._scores is None else self._scores[:count]
        view._bad = self._bad[:count].clone().share_memory_()
        return view

    def fingerprint(self) -> dict[str, Any]:
        """What tells these pairs from others; see [`pairs_fingerprint`]."""
        return pairs_fingerprint(self._source.format.name, self._source, self._places, self._scores)

    def check_sample(self, peers: Peers = ALONE, *, compare: bool = True) -> None:
        """Decodes some pairs that are spread over the set. For those that fail the next good pair stands in, as if it
        had been found when their turn came: which pairs there are, by which a run finds its place when it resumes,
        does not depend on whether a file could be read at its start.

        Args:
            peers (`Peers`): Who takes a share of them.
            compare (`bool`): Also look whether winner and loser are two images.

        Raises:
            ValueError: If none of them can be decoded, or all are twice the same image.
        """
        places = spread(len(self), SAMPLED_PAIRS).tolist()
        own = places[peers.index :: peers.count]
        looks = [look for share in peers.share(lambda: [self._look_at(pair) for pair in own]) for look in share]
        reasons = {place: reason for found, _ in looks for place, reason in found.items()}
        size, bad = len(self), sum(bool(found) for found, _ in looks)
        alike = AlikePairs(self._report.name)
        for _, same in looks:
            if same is not None:
                alike.add(same)
        for pair, guilty in self._guilty(reasons):
            if self._strict:
                self._reject("undecodable", guilty[0], f"image {guilty[1]} {reasons[guilty]}", 1)
            self._bad[pair] = 1  # which counts it
            self._report.add("undecodable", guilty[0], f"image {guilty[1]} {reasons[guilty]}", amount=0)
        if bad and len(places) < size:
            logger.warning(
                "%s data: of %d pairs that were looked at among %d, %d cannot be decoded. verify_images='all' looks at "
                "each beforehand; otherwise bad ones are noticed when their turn comes.",
                *(self._report.name, len(places), size, bad),
            )
            if bad == len(places):
                raise ValueError(f"None of the {bad} pairs that were looked at can be decoded.\n{self.report}")
        if compare:
            alike.judge()

    def check_all(self, num_proc: int | None = None, peers: Peers = ALONE) -> None:
        """Decodes every image once and drops the pairs of those that fail.

        Args:
            num_proc (`int`, *optional*): Processes that each of the peers has do it; as many as there are cores for
                sources that can be copied.
            peers (`Peers`): Who takes a share of them.
        """
        if not len(self):
            return
        needed = np.zeros(len(self._source), dtype=np.int64)  # images that the labels of each row speak of
        for row, slot in ((0, 1), (2, 3)):
            np.maximum.at(needed, self._places[:, row], self._places[:, slot] + 1)
        rows = np.flatnonzero(needed)
        if num_proc is None and self.forks and forks_by_default() and len(rows) >= FEW_ROWS:
            num_proc = usable_cores(peers.count)
        reasons: dict[Place, str] = {}
        for part in peers.rounds(rows):
            for share in peers.share(partial(self._problems, part, needed, num_proc)):
                reasons.update(share)
        self._drop(reasons)

    def _problems(self, rows: np.ndarray, needed: np.ndarray, num_proc: int | None) -> dict[Place, str]:
        """What is wrong with images of some rows, of which `needed` says how many each must have."""
        reasons: dict[Place, str] = {}
        for row, found in self._source.check_images(rows, self._reader, num_proc) if len(rows) else ():
            found = [*found, *["is missing: the row has fewer images than labels"] * (needed[row] - len(found))]
            reasons.update({(row, slot): reason for slot, reason in enumerate(found) if reason})
        return reasons

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = range(len(self))[index]
        for step in range(len(self)):
            row = (start + step) % len(self)
            if self._bad[row]:
                continue
            try:
                return self._item(row)
            except UndecodableImageError as error:
                self._mark_bad(row, error)
        raise ValueError(f"No pair of the data set can be decoded.\n{self.report}")

    def _item(self, row: int) -> dict[str, Any]:
        winner_row, winner_slot, loser_row, loser_slot = self._places[row].tolist()
        winner_images = self._source.images(winner_row)
        loser_images = winner_images if loser_row == winner_row else self._source.images(loser_row)
        winner = self._reader.slot(winner_images, winner_slot)
        loser = self._reader.slot(loser_images, loser_slot)
        scores = None if self._scores is None else tuple(self._scores[row].tolist())
        return self._maker.item(row, self._source.prompt(winner_row), winner, loser, scores)

    def _look_at(self, pair: int) -> tuple[dict[Place, str], bool | None]:
        """What is wrong with a pair's images, and whether they are the same; `None` if that cannot be told."""
        reasons, images = {}, []
        row, slot, other_row, other_slot = self._places[pair].tolist()
        for place in ((row, slot), (other_row, other_slot)):
            try:
                images.append(self._reader.slot(self._source.images(place[0]), place[1]))
            except UndecodableImageError as error:
                reasons[place] = str(error).removeprefix(f"image {place[1]} ")
        return reasons, None if reasons else same_image(*images)

    def _mark_bad(self, row: int, error: UndecodableImageError) -> None:
        rows = sorted({int(self._places[row, 0]), int(self._places[row, 2])})
        where = f"{self._report.name} data, pair {row} (rows {rows} of the source)"
        if self._strict:
            raise ValueError(f"{where}: {error}. {HOW_TO_DROP}") from error
        self._bad[row] = 1
        logger.warning("%s: %s; the next good pair stands in.", where, error)

    def _drop(self, reasons: Mapping[Place, str]) -> None:
        keep = np.ones(len(self._places), dtype=bool)
        for pair, guilty in self._guilty(reasons):
            keep[pair] = False
            self._reject("undecodable", guilty[0], f"image {guilty[1]} {reasons[guilty]}", 1)
        self._places = self._places[keep]
        self._scores = None if self._scores is None else self._scores[keep]
        self._forget_bad_pairs()

    def _guilty(self, reasons: Mapping[Place, str]) -> Iterator[tuple[int, Place]]:
        """Pairs of which an image cannot be used, and the first such image of each."""
        places, bad_rows = self._places, np.array([row for row, _ in reasons], dtype=np.int64)
        for pair in np.flatnonzero(np.isin(places[:, 0], bad_rows) | np.isin(places[:, 2], bad_rows)).tolist():
            row, slot, other_row, other_slot = places[pair].tolist()
            guilty = (row, slot) if (row, slot) in reasons else (other_row, other_slot)
            if guilty in reasons:
                yield pair, guilty

    def _reject(self, kind: str, row: int, reason: str, amount: int) -> None:
        reject(self._report, self._strict, kind, row, reason, amount)

    def _forget_bad_pairs(self) -> None:
        self._bad = torch.zeros(len(self._places), dtype=torch.uint8).share_memory_()
