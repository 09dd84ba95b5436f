"""Pairs held out of a training set for evaluation, a prompt's rows together."""

import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np

from .formats import PreferenceFormat, resolve_format

logger = logging.getLogger(__name__)


def hold_out(
    dataset: datasets.Dataset, size: float, *, seed: int, dataset_format: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Part a data set in two by prompt, so that nothing is evaluated whose prompt was trained on.

    Args:
        dataset (`datasets.Dataset`): In one of `FORMATS`.
        size (`float`): Share of the rows in `(0, 1)`, or a whole number of rows, to hold out; as many as the prompts
            allow without going above it, at least one.
        seed (`int`): Decides which.
        dataset_format (`str`, *optional*): A key of `FORMATS`; detected from the columns by default.

    Returns:
        `tuple`: What is left to train on, and what is held out; the rows keep their order.

    Raises:
        ValueError: If nothing would be left on one side.
    """
    wanted = max(1, round(size * len(dataset))) if size < 1 else int(size)
    if wanted >= len(dataset):
        raise ValueError(f"`test_size={size:g}` must leave rows to train on; the data set has {len(dataset)}.")
    known = resolve_format(dataset_format, dataset.column_names)
    held = _choose(_groups_of_rows(dataset, known), wanted, seed)
    if not held:
        logger.warning("Every prompt has more than the %d rows of `test_size`: prompts are on both sides.", wanted)
        held = np.random.default_rng(seed).permutation(len(dataset))[:wanted].tolist()
    kept = np.setdiff1d(np.arange(len(dataset)), held)
    logger.info("Held out for evaluation: %d of %d rows.", len(held), len(dataset))
    return dataset.select(kept), dataset.select(sorted(held))


def _groups_of_rows(dataset: datasets.Dataset, known: PreferenceFormat) -> list[list[int]]:
    """Numbers of the rows that belong together: of one prompt, and of one group where a format compares rows."""
    columns = [name for name in (*known.prompt_columns, known.group_column) if name in dataset.column_names]
    columns = columns[:1] if known.group_column is None else list(dict.fromkeys([columns[0], known.group_column]))
    labels = [_labels(dataset, column) for column in columns]
    return _joined(list(zip(*labels, strict=True)))


def _labels(dataset: datasets.Dataset, column: str) -> Iterator[Hashable]:
    for batch in dataset.with_format(None).select_columns([column]).iter(batch_size=1000):
        yield from ((column, repr(value)) for value in batch[column])


def _joined(labels: Sequence[tuple[Hashable, ...]]) -> list[list[int]]:
    """Rows that share any label, together; in the order of their first rows."""
    parent = list(range(len(labels)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[Hashable, int] = {}
    for row, names in enumerate(labels):
        for name in names:
            one, other = sorted((root(row), root(first.setdefault(name, row))))
            parent[other] = one
    groups: dict[int, list[int]] = {}
    for row in range(len(labels)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def _choose(groups: list[list[int]], wanted: int, seed: int) -> list[int]:
    """Groups in a drawn order, as long as they fit."""
    held: list[Any] = []
    for number in np.random.default_rng(seed).permutation(len(groups)):
        if len(held) + len(groups[number]) <= wanted:
            held += groups[number]
    return held
