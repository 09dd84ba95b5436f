"""What prompts decide: which rows are held out for evaluation, and which pairs' winners can be another's loser."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from textwrap import shorten
from typing import Any

import datasets
import numpy as np
import torch

from .columns import by_first_appearance, row_codes, values_of_rows
from .derangement import derangement, most_common
from .formats import PreferenceFormat, resolve_format

logger = logging.getLogger(__name__)

Split = tuple[datasets.Dataset, datasets.Dataset]
LOSERS = 3  # ends the key of the permutations' random numbers; those of pairs have no fourth part


def hold_out(
    dataset: datasets.Dataset, size: float, *, seed: int, dataset_format: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split a data set by prompt, so that no prompt of the training rows is evaluated.

    Args:
        dataset (`datasets.Dataset`): In one of `FORMATS`.
        size (`float`): Share of the rows in `(0, 1)`, or a whole number of rows, to hold out. An upper bound: all rows
            of a prompt go to one side. At least one row is held out.
        seed (`int`): Seed of the choice.
        dataset_format (`str`, *optional*): A key of `FORMATS`; detected from the columns by default.

    Returns:
        `tuple`: The rows to train on and the rows held out, each in the original order.

    Raises:
        ValueError: If no rows would be left to train on.
    """
    return hold_out_of_several([dataset], size, seed=seed, formats=[dataset_format])[0]


def hold_out_of_several(
    parts: Sequence[datasets.Dataset], size: float, *, seed: int, formats: Sequence[str | None]
) -> list[Split]:
    """Split data sets that are trained on together as if they were one: `size` is of all their rows, and a prompt that
    several of them have is on one side in all. Of each something is left to train on; the rest is as for [`hold_out`].

    Returns:
        `list`: For each data set the rows to train on and the rows held out, of which there may be none.

    Raises:
        ValueError: If no rows would be left to train on, a data set is empty, or every prompt of at most `size` rows
            must be kept.
    """
    rows = np.array([len(part) for part in parts])
    total = int(rows.sum())
    wanted = max(1, round(size * total)) if size < 1 else int(size)
    if wanted >= total:
        raise ValueError(f"`test_size={size:g}` must leave rows to train on; the data set has {total}.")
    if empty := np.flatnonzero(rows == 0).tolist():
        raise ValueError(f"Every data set must have rows; there are none in the data sets {empty}. Leave them out.")
    known = [resolve_format(name, part.column_names) for part, name in zip(parts, formats, strict=True)]
    starts = np.cumsum(rows)[:-1]
    groups = _groups_of_rows(parts, known)
    held = _choose(np.split(groups, starts), wanted, seed)
    if not held.any() and np.bincount(groups).min() <= wanted:
        raise ValueError(
            f"`test_size={size:g}` must be larger: each data set keeps a prompt to train on, and every other has more "
            f"than {wanted} rows."
        )
    if not held.any():
        logger.warning("Every prompt has more than the %d rows of `test_size`: prompts are on both sides.", wanted)
        held[np.random.default_rng(seed).permutation(total)[:wanted]] = True
    logger.info("Held out for evaluation: %d of %d rows.", held.sum(), total)
    masks = np.split(held, starts)
    if empty := [number for number, mask in enumerate(masks) if mask.all()]:
        raise ValueError(f"`test_size={size:g}` leaves no row to train on of the data sets {empty}. Hold fewer out.")
    return [
        (part.select(np.flatnonzero(~mask)), part.select(np.flatnonzero(mask)))
        for part, mask in zip(parts, masks, strict=True)
    ]


def _groups_of_rows(parts: Sequence[datasets.Dataset], formats: Sequence[PreferenceFormat]) -> np.ndarray:
    """For every row of all data sets the number of its group, by first appearance: rows of one prompt, and also of one
    value of the group column where the format compares rows."""
    columns = [known.prompt_column(part.column_names) for part, known in zip(parts, formats, strict=True)]
    codes = [row_codes(part, column) for part, column in zip(parts, columns, strict=True)]
    if len(parts) > 1:
        numbers: dict[str | None, int] = {}
        codes = [_by_prompt(part, known, own, numbers) for part, known, own in zip(parts, formats, codes, strict=True)]
    prompts, compared = np.concatenate(codes), list(codes)
    grouped = [number for number, known in enumerate(formats) if known.group_column not in (None, columns[number])]
    for number in grouped:  # by values that mean nothing in another data set
        others = 1 + max(found.max() for found in compared)
        compared[number] = others + row_codes(parts[number], str(formats[number].group_column))
    return _connected(prompts, np.concatenate(compared)) if grouped else prompts


def _by_prompt(
    part: datasets.Dataset, known: PreferenceFormat, codes: np.ndarray, numbers: dict[str | None, int]
) -> np.ndarray:
    """The number of each row by its prompt, in all data sets; adds to `numbers`. `codes` are those of this data set."""
    first = np.unique(codes, return_index=True)[1]  # row of each prompt, in the order of the codes
    column = known.prompt_column(part.column_names)
    values = chain.from_iterable(found.to_pylist() for found in values_of_rows(part, column, first))
    return np.array([numbers.setdefault(_prompt(known, column, value), len(numbers)) for value in values])[codes]


def _prompt(known: PreferenceFormat, column: str, value: Any) -> str | None:
    try:
        return known.prompt({column: value})
    except ValueError:
        return None


def _connected(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Numbers of the groups of rows that are connected by equal values (union-find over the different values)."""
    offset = int(first.max(initial=-1)) + 1
    links, of_row = np.unique(np.stack([first, second + offset], axis=1), axis=0, return_inverse=True)
    parent = list(range(int(links.max(initial=-1)) + 1))

    def root(value: int) -> int:
        while parent[value] != value:
            parent[value] = parent[parent[value]]
            value = parent[value]
        return value

    for one, other in links.tolist():
        parent[root(other)] = root(one)
    roots = np.array([root(one) for one in links[:, 0].tolist()])[of_row.reshape(-1)]
    return by_first_appearance(roots)


def _choose(groups: Sequence[np.ndarray], wanted: int, seed: int) -> np.ndarray:
    """Takes groups in a random order while they fit, but of several data sets not the last group of one.

    Args:
        groups: The groups of each data set's rows.

    Returns:
        `np.ndarray` of shape `(rows of all,)`, bool: The rows of those that were taken.
    """
    of_all = np.concatenate(groups)
    sizes = np.bincount(of_all)
    order = np.random.default_rng(seed).permutation(len(sizes))
    place = np.argsort(order)  # of each group in the order
    kept = {order[place[own].max()] for own in groups} if len(groups) > 1 else set()
    taken, held = np.zeros(len(sizes), dtype=bool), 0
    for number, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if held + size <= wanted and number not in kept:
            taken[number] = True
            held += size
    return taken[of_all]


class PermutedLosers:
    """Which pair's winner is the loser of each pair in each epoch: a permutation of all pairs of a data set, by which
    none gets an image of its own prompt. It depends on the seed and the epoch alone.

    Args:
        prompts (`np.ndarray` of shape `(P,)`): Equal for pairs of one prompt, none of which has more than half of them.
        images (`np.ndarray` of shape `(P, 2)`): Row and image of each pair's winner in the source.
        seed (`int`): Of the permutations.
    """

    def __init__(self, prompts: np.ndarray, images: np.ndarray, seed: int) -> None:
        self.images, self._prompts, self._seed, self._kept = images, prompts, seed, (-1, prompts)
        self.bad = torch.zeros(len(prompts), dtype=torch.uint8).share_memory_()  # winners that cannot be read

    @classmethod
    def of(cls, source: Any, index: np.ndarray, seed: int, name: str) -> "PermutedLosers":
        """Those of an index `(P, 4)` of a source; `name` is that of the data in messages.

        Raises:
            ValueError: If a prompt has more than half of the pairs: then some would have a loser of their own prompt.
        """
        rows, place = np.unique(index[:, 0], return_inverse=True)
        prompts = source.prompt_digests(rows)[place.reshape(-1)]
        pair, count = most_common(prompts) if len(index) else (0, 0)
        if 2 * count > len(index):
            prompt = shorten(source.prompt(int(index[pair, 0])), 60, placeholder="…")
            raise ValueError(
                "`losers='permute'` gives every image a loser of another prompt, so that no prompt may have more than "
                f"half of the images. In the {name} data {prompt!r} has {count} of {len(index)}. Add images of other "
                "prompts, or leave some of these out."
            )
        return cls(prompts, index[:, :2], seed)

    def afresh(self) -> "PermutedLosers":
        """The same, where nothing is known to be unreadable."""
        return PermutedLosers(self._prompts, self.images, self._seed)

    def candidates(self, pair: int, epoch: int) -> Iterator[int]:
        """The pair whose winner a pair gets, and those that take its place where that cannot be read: the next ones of
        another prompt, whichever process reads it first."""
        kept, given = self._kept
        if kept != epoch:
            given = derangement(self._prompts, [self._seed, epoch, 0, LOSERS])
            self._kept = epoch, given
        first, pairs = int(given[pair]), len(given)
        for loser in chain(range(first, pairs), range(first)):
            if self._prompts[loser] != self._prompts[pair] and not self.bad[loser]:
                yield loser

    def of_pair(self, pair: int, epoch: int) -> int | None:
        """The first of the [`candidates`]; `None` where there is none."""
        return next(self.candidates(pair, epoch), None)
