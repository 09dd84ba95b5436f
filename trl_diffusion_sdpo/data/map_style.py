"""Map-style pairs: nothing but index arrays is kept in memory, the images stay where the source has them."""

import copy
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .fingerprint import pairs_fingerprint
from .report import HOW_TO_DROP, DataReport, reject
from .sources import ArrowSource, RowSource, build_index
from .transforms import ItemMaker, UndecodableImageError, decode_slot

logger = logging.getLogger(__name__)


class PreferenceDataset(Dataset):
    """Map-style pairs: a view on a source data set, made by [`prepare_dataset`].

    Items are dicts: `pixel_values` (`torch.FloatTensor` of shape `(2, 3, H, W)`, winner first, in `[-1, 1]`), `prompt`
    (`""` if dropped), `original_sizes` and `crop_top_lefts` (two of `(height, width)` and of `(top, left)`), `seed`
    (for noise and timestep), `row` (the pair's index) and, where the source has score columns, `scores`. An item
    depends on the seed, the epoch and `row`, and on nothing else.
    """

    def __init__(self, source: ArrowSource | RowSource, maker: ItemMaker, *, strict: bool, name: str) -> None:
        self._source, self._maker, self._strict = source, maker, strict
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
    def report(self) -> DataReport:
        """The counts so far, those of all DataLoader workers included."""
        late = int(self._bad.sum())
        return replace(self._report, pairs=len(self) - late, undecodable=self._report.undecodable + late)

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
        view._forget_bad_pairs()
        return view

    def fingerprint(self) -> dict[str, Any]:
        """What tells these pairs from others; see [`pairs_fingerprint`]."""
        return pairs_fingerprint(self._source.format.name, self._source, self._places, self._scores)

    def verify_images(self, num_proc: int | None = None) -> None:
        """Decodes every image once and drops the pairs of those that fail."""
        if not len(self):
            return
        needed = np.zeros(len(self._source), dtype=np.int64)  # images that the labels of each row speak of
        for row, slot in ((0, 1), (2, 3)):
            np.maximum.at(needed, self._places[:, row], self._places[:, slot] + 1)
        reasons: dict[tuple[int, int], str] = {}
        for row, found in self._source.check_images(np.flatnonzero(needed), num_proc):
            found = [*found, *["is missing: the row has fewer images than labels"] * (needed[row] - len(found))]
            reasons.update({(row, slot): reason for slot, reason in enumerate(found) if reason})
        self._drop(reasons)

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
        winner = decode_slot(winner_images, winner_slot)
        loser = decode_slot(loser_images, loser_slot)
        scores = None if self._scores is None else tuple(self._scores[row].tolist())
        return self._maker.item(row, self._source.prompt(winner_row), winner, loser, scores)

    def _mark_bad(self, row: int, error: UndecodableImageError) -> None:
        rows = sorted({int(self._places[row, 0]), int(self._places[row, 2])})
        where = f"{self._report.name} data, pair {row} (rows {rows} of the source)"
        if self._strict:
            raise ValueError(f"{where}: {error}. {HOW_TO_DROP}") from error
        self._bad[row] = 1
        logger.warning("%s: %s; the next good pair stands in.", where, error)

    def _drop(self, reasons: dict[tuple[int, int], str]) -> None:
        places, bad_rows = self._places, np.array([row for row, _ in reasons], dtype=np.int64)
        keep = np.ones(len(places), dtype=bool)
        for pair in np.flatnonzero(np.isin(places[:, 0], bad_rows) | np.isin(places[:, 2], bad_rows)):
            row, slot, other_row, other_slot = places[pair].tolist()
            guilty = (row, slot) if (row, slot) in reasons else (other_row, other_slot)
            if guilty in reasons:
                keep[pair] = False
                self._reject("undecodable", guilty[0], f"image {guilty[1]} {reasons[guilty]}", 1)
        self._places = places[keep]
        self._scores = None if self._scores is None else self._scores[keep]
        self._forget_bad_pairs()

    def _reject(self, kind: str, row: int, reason: str, amount: int) -> None:
        reject(self._report, self._strict, kind, row, reason, amount)

    def _forget_bad_pairs(self) -> None:
        self._bad = torch.zeros(len(self._places), dtype=torch.uint8).share_memory_()
