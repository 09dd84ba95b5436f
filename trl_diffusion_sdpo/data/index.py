"""Index of pairs: one row for each pair that the label columns of a data set describe. No image is read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from ..utils._compat import dataset_fingerprint
from . import formats
from .formats import PreferenceFormat, groups, pairs_in_group

logger = logging.getLogger(__name__)

Drop = tuple[str, int, str, int]  # arguments of `Reject`

PLACES = ("winner_row", "winner_image", "loser_row", "loser_image")
SCORES = ("winner_score", "loser_score")
COLUMNS = datasets.Features(
    {
        **{name: datasets.Value("int64") for name in PLACES},
        **{name: datasets.Value("float64") for name in SCORES},
        # These columns are filled if a row of the index is a drop. `winner_row` is then the row of the source.
        "dropped": datasets.Value("string"),
        "reason": datasets.Value("string"),
        "amount": datasets.Value("int64"),
    }
)
ROWS_AT_ONCE = 1000
CODE = (__file__, formats.__file__)  # if this code changes, cached indexes are rebuilt


@dataclass(frozen=True)
class PairTable:
    """Index and columns of P pairs.

    Attributes:
        places (`np.ndarray` of shape `(P, 4)`): Winner row, winner image, loser row, loser image.
        columns (`dict[str, np.ndarray]`): Further columns of P entries by name. `scores` are reward scores of winner
            and loser. `calibrated` replaces `scores`. `weight` is the factor of a pair's loss. `size` is the number of
            its bucket. `ref_errors` are the errors of a reference.
        weighed_by (`str`, *optional*): Setting that the weights were computed from.
    """

    places: np.ndarray
    columns: Mapping[str, np.ndarray]
    weighed_by: str | None = None

    def __len__(self) -> int:
        return len(self.places)

    def take(self, pairs: slice | np.ndarray) -> PairTable:
        """Return some of the pairs, selected by a slice, a mask or indices."""
        columns = {name: values[pairs] for name, values in self.columns.items()}
        return replace(self, places=self.places[pairs], columns=columns)

    def hash_of(self, name: str) -> str:
        """Return a hash of a column."""
        return hashlib.sha256(self.columns[name].tobytes()).hexdigest()[:16]

    def with_columns(self, **columns: np.ndarray | None) -> PairTable:
        """Return the pairs with columns added or replaced. `None` removes a column."""
        joined = {**self.columns, **columns}
        return replace(self, columns={name: values for name, values in joined.items() if values is not None})


def index_pairs(rows: Iterable[tuple[int, Mapping[str, Any]]], row_format: PreferenceFormat) -> dict[str, list]:
    """Return the pairs and the drops of numbered rows, as `COLUMNS`. Rows of a group must be consecutive."""
    entries: list[tuple] = []

    def reject(kind: str, row: int, reason: str, amount: int) -> None:
        entries.append((row, None, None, None, None, None, kind, reason, amount))

    for group in groups(row_format, rows):
        for *places, scores in pairs_in_group(row_format, group, reject):
            entries.append((*places, *(scores or (None, None)), None, None, None))
    columns = zip(*entries, strict=True) if entries else [()] * len(COLUMNS)
    return {name: list(values) for name, values in zip(COLUMNS, columns, strict=True)}


def find_pairs(labels: datasets.Dataset, row_format: PreferenceFormat) -> tuple[PairTable, list[Drop]]:
    """Return the pairs and the drops of a data set. If the data are on a disk, `datasets` caches the result there.

    Args:
        labels (`datasets.Dataset`): The columns of labels and prompts, without the images.
        row_format (`PreferenceFormat`): Format of the rows.
    """
    code = [Path(file).read_bytes() for file in CODE]
    facts = [dataset_fingerprint(labels), row_format.name, row_format.score_columns, row_format.is_swapped, code]
    options: dict[str, Any] = {
        "with_indices": True,
        "batched": True,
        # Rows of a group may be far apart. One batch of all rows brings them together.
        "batch_size": ROWS_AT_ONCE if row_format.group_column is None else None,
        "remove_columns": labels.column_names,
        "features": COLUMNS,
        "fn_kwargs": {"row_format": row_format},
        "new_fingerprint": Hasher.hash(facts),
        "desc": "Finding pairs",
    }
    try:
        index = labels.map(_index_batch, keep_in_memory=not labels.cache_files, **options)
    except OSError as error:
        logger.warning("The index of the pairs cannot be cached: %s. It is built at every start.", error)
        index = labels.map(_index_batch, keep_in_memory=True, load_from_cache_file=False, **options)
    table = index.with_format("arrow")[:]
    is_pair = table.column("dropped").is_null().to_numpy(zero_copy_only=False)
    pairs, drops = table.filter(is_pair), table.filter(~is_pair)
    kind = np.int32 if len(labels) <= np.iinfo(np.int32).max else np.int64
    places = np.stack([pairs.column(name).to_numpy().astype(kind) for name in PLACES], axis=1)
    scores = np.stack([pairs.column(name).to_numpy() for name in SCORES], axis=1)
    has_scores = len(pairs) > 0 and pairs.column(SCORES[0]).null_count == 0
    listed = [drops.column(name).to_pylist() for name in ("dropped", "winner_row", "reason", "amount")]
    return PairTable(places, {"scores": scores} if has_scores else {}), list(zip(*listed, strict=True))


def _index_batch(batch: Mapping[str, list], numbers: list[int], row_format: PreferenceFormat) -> dict[str, list]:
    names = list(batch)
    rows = [
        (number, dict(zip(names, values, strict=True)))
        for number, values in zip(numbers, zip(*(batch[name] for name in names), strict=True), strict=True)
    ]
    if row_format.group_column is not None:
        first: dict[Any, int] = {}  # group to its position among the groups
        order = [first.setdefault(row[row_format.group_column], len(first)) for _, row in rows]
        rows = [rows[place] for place in np.argsort(order, kind="stable").tolist()]
    return index_pairs(rows, row_format)
