"""The index of a table's pairs, found in its label columns without a loop over the rows. Pairs, counts and examples
are those of `formats.pairs_in_group`, which reads row by row, also what is no table and columns of unusual types."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..utils._compat import without_selection
from . import formats
from .checking import MAX_EXAMPLES
from .columns import (
    ROUND_ROWS,
    NotVectorizedError,
    are_filled,
    are_valid,
    holds_bytes,
    holds_text,
    one_chunk,
    read_numbers,
    spans,
    value_codes,
)
from .formats import ALONE_IN_GROUP, JUDGED_EQUAL, PreferenceFormat

Drop = tuple[str, int, str, int]  # arguments of `Reject`


class PairIndex(NamedTuple):
    """The pairs of a source.

    Attributes:
        pairs (`np.ndarray` of shape `(P, 4)`, int32 if that is enough, else int64): Winner row, winner image, loser
            row, loser image.
        scores (`np.ndarray` of shape `(P, 2)`, float64, *optional*): Reward scores of winner and loser.
    """

    pairs: np.ndarray
    scores: np.ndarray | None

    def swapped(self) -> PairIndex:
        """As [`formats.PairReference.swapped`]."""
        return PairIndex(self.pairs[:, [2, 3, 0, 1]], None if self.scores is None else -self.scores[:, ::-1])


@dataclass(frozen=True)
class PairNumbers:
    """What items of P pairs carry by row: scores and weights.

    Args:
        scores (`np.ndarray` of shape `(P, 2)`, *optional*): Of winner and loser, from the source's columns.
        calibrated (`np.ndarray` of shape `(P, 2)`, *optional*): In their place.
        weights (`np.ndarray` of shape `(P,)`, float32, *optional*): Factors of the pairs' losses.
        weighed_by (`str`, *optional*): What the weights were computed from, in words.
    """

    scores: np.ndarray | None = None
    calibrated: np.ndarray | None = None
    weights: np.ndarray | None = None
    weighed_by: str | None = None

    def take(self, rows: slice | np.ndarray) -> PairNumbers:
        """Those of some pairs."""
        parts = (self.scores, self.calibrated, self.weights)
        scores, calibrated, weights = (None if numbers is None else numbers[rows] for numbers in parts)
        return PairNumbers(scores, calibrated, weights, self.weighed_by)

    @property
    def scores_of_items(self) -> np.ndarray | None:
        """The scores that items carry, `(P, 2)`."""
        return self.scores if self.calibrated is None else self.calibrated

    def scores_of(self, row: int) -> tuple[float, float] | None:
        """The two scores of a pair's item, if it has scores."""
        found = self.scores_of_items
        return None if found is None else (float(found[row, 0]), float(found[row, 1]))

    def weight_of(self, row: int) -> dict[str, float]:
        """The weight of a pair as a part of its item, empty without weights."""
        return {} if self.weights is None else {"pair_weight": float(self.weights[row])}

    def fingerprint(self) -> dict[str, str]:
        """Identifies the weights, empty without them; scores are those of the source."""
        if self.weights is None:
            return {}
        return {"pair_weights": hashlib.sha256(self.weights.tobytes()).hexdigest()[:16]}


def index_type(rows: int) -> type[np.signedinteger]:
    """The type of an index of so many rows."""
    return np.int32 if rows <= np.iinfo(np.int32).max else np.int64


# ---- From label columns to pairs ----------------------------------------------------------------------------------


class _Lists(NamedTuple):
    """One list of numbers for each row: `values[starts[row] : starts[row] + counts[row]]`."""

    starts: np.ndarray
    counts: np.ndarray
    values: np.ndarray
    good: np.ndarray  # which rows have a label that can be read


class _Rows(NamedTuple):
    """The labels of rows, in the order in which groups are compared."""

    numbers: np.ndarray  # of the rows in the source
    groups: np.ndarray  # equal for rows that are compared with one another, which follow one another
    labels: _Lists
    ranked: np.ndarray  # see `ImageScores`
    good_labels: np.ndarray  # including validity and reward scores
    good_prompts: np.ndarray
    scores: np.ndarray | None  # (rows, 2)


@dataclass
class _Drops:
    """Counts what is left out, and keeps the first places of each kind."""

    total: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[tuple[int, int, str, int]]] = field(default_factory=dict)  # place, row, reason, amount

    def add(self, kind: str, places: np.ndarray, rows: np.ndarray, reason: str, amounts: np.ndarray | None = None):
        """`places` order the drops of all kinds; an empty reason is looked up in the row."""
        amounts = np.ones(len(places), dtype=np.int64) if amounts is None else amounts
        self.total[kind] = self.total.get(kind, 0) + int(amounts.sum())
        order = np.argsort(places, kind="stable")[:MAX_EXAMPLES]
        new = [(int(places[i]), int(rows[i]), reason, int(amounts[i])) for i in order]
        self.first[kind] = sorted([*self.first.get(kind, []), *new])[:MAX_EXAMPLES]

    def calls(self, known: PreferenceFormat, table: datasets.Dataset) -> list[Drop]:
        """Arguments of `Reject`: the first examples of each kind in the order of the rows, then the rest of each."""
        examples: Any = sorted((place, kind, *rest) for kind, found in self.first.items() for place, *rest in found)
        calls = [(kind, row, text or _problem(known, table[row]), amount) for _, kind, row, text, amount in examples]
        for kind, total in self.total.items():
            rest = total - sum(amount for *_, amount in self.first[kind])
            if rest:
                calls.append((kind, -1, "", rest))  # adds to the count only: there are enough examples
        return calls


def find_pairs(table: datasets.Dataset, known: PreferenceFormat) -> tuple[PairIndex, list[Drop]]:
    drops = _Drops()
    rounds, start, kind = [], 0, index_type(len(table))
    for rows in _rounds_of_rows(table, known):
        found = _pairs(rows, start, drops)
        rounds.append(found._replace(pairs=found.pairs.astype(kind)))
        start += len(rows.numbers)
    pairs = np.concatenate([found.pairs for found in rounds])
    scores = [found.scores for found in rounds if found.scores is not None]
    together = np.concatenate(scores) if scores and len(pairs) else None
    return PairIndex(pairs, together), drops.calls(known, table.with_format(None))


def _rounds_of_rows(table: datasets.Dataset, known: PreferenceFormat) -> Iterator[_Rows]:
    """Labels of so many rows at a time; of all of them where rows are compared with one another or selected from a
    table, as `datasets` reads selected rows one by one."""
    base, selected = without_selection(table)
    at_once = known.group_column is not None or selected is not None
    start, rounds, members = 0, [], []
    for batch in base.with_format("arrow").iter(batch_size=ROUND_ROWS):
        columns = {name: one_chunk(batch.column(name)) for name in batch.column_names}
        rows = _rows(columns, known, start, len(batch))
        start += len(batch)
        if not at_once:
            yield rows
            continue
        rounds.append(rows)
        members += [] if known.group_column is None else [columns[known.group_column]]
    if not at_once:
        return
    rows, order = _joined(rounds), np.arange(start) if selected is None else selected
    groups = np.arange(len(order))
    if known.group_column is not None:
        groups = value_codes(members, selected)
    by_group = np.argsort(groups, kind="stable")
    yield _in_order(rows, by_group, groups[by_group], order[by_group])


def _rows(columns: dict[str, pa.Array], known: PreferenceFormat, start: int, size: int) -> _Rows:
    labels, ranked = _labels(columns, known, size)
    good, scores = labels.good, None
    if known.validity_column in columns:
        good = good & are_valid(columns[known.validity_column])
    if known.group_column is not None:
        good = good & are_filled(columns[known.group_column])
    if known.score_columns is not None and known.score_columns[0] in columns:
        read = [read_numbers(columns[name]) for name in known.score_columns]
        scores = np.stack([values for values, _ in read], axis=1)
        good = good & read[0][1] & read[1][1]
    good_prompts = np.ones(size, dtype=bool)
    for prompt in (columns[name] for name in known.read_prompt_columns(columns)):
        is_text = holds_text(prompt.type) or (known.text_members and holds_bytes(prompt.type))
        good_prompts &= are_filled(prompt) if is_text else False
    numbers = np.arange(start, start + size)
    return _Rows(numbers, np.arange(size), labels, ranked, good, good_prompts, scores)


def _joined(rounds: Sequence[_Rows]) -> _Rows:
    before = np.cumsum([0, *(len(rows.labels.values) for rows in rounds)])
    shifted = [
        rows._replace(labels=rows.labels._replace(starts=rows.labels.starts + start))
        for rows, start in zip(rounds, before, strict=False)
    ]
    labels = _Lists(*(np.concatenate(parts) for parts in zip(*(rows.labels for rows in shifted), strict=True)))
    rest: Any = zip(*(cast(Any, rows)._replace(labels=None) for rows in shifted), strict=True)
    others: Any = (None if parts[0] is None else np.concatenate(parts) for parts in rest)
    return _Rows(*others)._replace(labels=labels)


def _in_order(rows: _Rows, numbers: np.ndarray, groups: np.ndarray, order: np.ndarray) -> _Rows:
    """Other rows than those of the table: of each its number, its group and its place in the table."""
    labels = rows.labels
    labels = _Lists(labels.starts[order], labels.counts[order], labels.values, labels.good[order])
    rest = (rows.ranked[order], rows.good_labels[order], rows.good_prompts[order])
    return _Rows(numbers, groups, labels, *rest, None if rows.scores is None else rows.scores[order])


def _pairs(rows: _Rows, start: int, drops: _Drops) -> PairIndex:
    """All pairs of a round's groups; `start` is the number of rows in earlier rounds."""
    good = rows.good_labels & rows.good_prompts
    for kind, bad in (("bad_labels", ~rows.good_labels), ("bad_prompts", rows.good_labels & ~rows.good_prompts)):
        places = np.flatnonzero(bad)
        if len(places):
            drops.add(kind, 2 * (start + places), rows.numbers[places], "")
    owners = np.repeat(np.flatnonzero(good), rows.labels.counts[good])  # for each image, its row in the round
    places = spans(rows.labels.starts[good], rows.labels.counts[good])
    values, places_in_row = rows.labels.values[places], spans(np.zeros(good.sum(), int), rows.labels.counts[good])
    _, first, sizes = np.unique(rows.groups[owners], return_index=True, return_counts=True)
    last = first + sizes - 1
    # The end of a group comes after its last row, which may be a bad one.
    ends = 2 * (start + np.searchsorted(rows.groups, rows.groups[owners[last]], side="right")) - 1
    alone = sizes == 1
    if alone.any():
        drops.add("bad_labels", ends[alone], rows.numbers[owners[first[alone]]], ALONE_IN_GROUP)
    winners, losers, of_group, ties = _compare(values, first, sizes)
    if len(ties):
        unranked = ~rows.ranked[owners[last]] & (np.bincount(of_group, minlength=len(sizes)) > 0)
        ties[unranked] = 0
        tied = np.flatnonzero(ties)
        if len(tied):
            drops.add("ties", ends[tied], rows.numbers[owners[first[tied]]], JUDGED_EQUAL, ties[tied])
    numbers = rows.numbers[owners]
    pairs = np.stack([numbers[winners], places_in_row[winners], numbers[losers], places_in_row[losers]], axis=1)
    return PairIndex(pairs, None if rows.scores is None else rows.scores[owners[winners]])


def _compare(values: np.ndarray, first: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """All pairs within groups of images, as [`formats.compare`] orders them.

    Returns:
        `tuple`: Winners and losers as positions in `values`, the group of each pair, and the ties of each group.
    """
    ties = np.zeros(len(sizes), dtype=np.int64)
    found: list[tuple[np.ndarray, ...]] = [(np.zeros(0, dtype=np.int64),) * 3]
    for size in np.unique(sizes).tolist():
        of_size = np.flatnonzero(sizes == size)
        one, other = (first[of_size, None] + places for places in np.triu_indices(size, 1))
        wins, loses = values[one] > values[other], values[one] < values[other]
        ties[of_size] = (~wins & ~loses).sum(axis=1)
        keep = wins | loses
        pair_groups = np.broadcast_to(of_size[:, None], keep.shape)[keep]
        found.append((np.where(wins, one, other)[keep], np.where(wins, other, one)[keep], pair_groups))
    winners, losers, pair_groups = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(pair_groups, kind="stable")
    return winners[order], losers[order], pair_groups[order], ties


def _labels(columns: dict[str, pa.Array], known: PreferenceFormat, size: int) -> tuple[_Lists, np.ndarray]:
    """Each row's label by the first reader whose columns are filled, as `PreferenceFormat.image_scores` chooses it."""
    starts, counts = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    good, ranked, chosen = np.zeros(size, dtype=bool), np.ones(size, dtype=bool), np.zeros(size, dtype=bool)
    values, length = [], 0
    for names, reader in known.label_readers.items():
        if not set(names) <= set(columns):
            continue
        filled = ~chosen
        for name in names:
            filled = filled & are_filled(columns[name])
        chosen |= filled
        if not filled.any():
            continue
        if reader not in _READERS:
            raise NotVectorizedError
        read = _READERS[reader]([columns[name] for name in names], size)
        starts[filled] = read.starts[filled] + length
        counts[filled], good[filled] = read.counts[filled], read.good[filled]
        ranked[filled] = reader is not formats.picked_from_list
        values.append(read.values)
        length += len(read.values)
    return _Lists(starts, counts, np.concatenate([np.zeros(0), *values]), good), ranked


def _read_first_is_preferred(_: Sequence[pa.Array], size: int) -> _Lists:
    return _table_of(np.tile((1.0, 0.0), (size, 1)), np.ones(size, dtype=bool))


def _read_larger_is_better(columns: Sequence[pa.Array], size: int) -> _Lists:
    values, good = zip(*(read_numbers(column) for column in columns), strict=True)
    return _table_of(np.stack(values, axis=1), np.logical_and.reduce(good))


def _read_probability_of_first(columns: Sequence[pa.Array], size: int) -> _Lists:
    values, good = read_numbers(columns[0])
    return _table_of(np.stack([values, 1.0 - values], axis=1), good)


def _read_rank_of_row(columns: Sequence[pa.Array], size: int) -> _Lists:
    values, good = read_numbers(columns[0])
    return _table_of(-values[:, None], good)


def _read_list(columns: Sequence[pa.Array], size: int) -> _Lists:
    column = columns[0]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise NotVectorizedError
    values, good = read_numbers(column.flatten())
    counts = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.cumsum(counts) - counts
    bad_before = np.concatenate([[0], np.cumsum(~good)])
    return _Lists(starts, counts, values, (counts > 0) & (bad_before[starts + counts] == bad_before[starts]))


def _read_rank_list(columns: Sequence[pa.Array], size: int) -> _Lists:
    read = _read_list(columns, size)
    return read._replace(values=-read.values)


_READERS: dict[Callable, Callable[[Sequence[pa.Array], int], _Lists]] = {
    formats.first_is_preferred: _read_first_is_preferred,
    formats.larger_is_better: _read_larger_is_better,
    formats.probability_of_first: _read_probability_of_first,
    formats.picked_from_list: _read_list,
    formats.rank_list: _read_rank_list,
    formats.rank_of_row: _read_rank_of_row,
}


def _table_of(values: np.ndarray, good: np.ndarray) -> _Lists:
    rows, images = values.shape
    return _Lists(np.arange(rows) * images, np.full(rows, images), values.reshape(-1), good)


def _problem(known: PreferenceFormat, row: Any) -> str:
    try:
        known.image_scores(row), known.reward_scores(row), known.prompts(row)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{known.name}: a row was found bad that is good: {row}")
