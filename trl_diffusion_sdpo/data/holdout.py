"""Holds out rows for evaluation, by prompt: no prompt has rows in both parts."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import datasets
import numpy as np

from ..utils.errors import UserError
from .formats import resolve_format


def hold_out(
    data_sets: Sequence[datasets.Dataset], size: float, *, seed: int, formats: Sequence[str | None]
) -> list[tuple[datasets.Dataset, datasets.Dataset]]:
    """Split data sets that train together into training and evaluation rows without common prompts.

    Args:
        data_sets (`Sequence` of `datasets.Dataset`): Data sets, each in one of `FORMATS`.
        size (`float`): Share of all rows in `(0, 1)`, or number of rows, to hold out. An upper bound, because all rows
            of a prompt go to the same part. At least one row is held out.
        seed (`int`): Seed of the random choice of prompts.
        formats (`Sequence` of `str` or `None`): A key of `FORMATS` for each data set. `None` detects it.

    Returns:
        `list`: For each data set, the training rows and the held-out rows, both in the original order.

    Raises:
        ValueError: If `size` leaves no training rows, or every prompt has more rows than `size`.
    """
    prompts = [_prompts(rows, name) for rows, name in zip(data_sets, formats, strict=True)]
    counts = Counter(chain(*prompts))  # rows of each prompt, ordered by its first row
    total = counts.total()
    wanted = max(1, round(size * total)) if size < 1 else int(size)
    if wanted >= total:
        raise UserError(
            f"`test_size={size:g}` must leave rows to train on; the data set has {total} rows. Choose a smaller size."
        )

    # Hold out prompts in a random order, skipping those with which more than `wanted` rows would be held out.
    shuffled = np.random.default_rng(seed).permutation(len(counts)).tolist()
    distinct = list(counts)
    held_out: set[str | None] = set()
    taken = 0
    for prompt in (distinct[number] for number in shuffled):
        if taken + counts[prompt] <= wanted:
            held_out.add(prompt)
            taken += counts[prompt]
    if not held_out:
        raise UserError(
            f"All rows of a prompt are held out together, and every prompt has more than the {wanted} rows of "
            f"`test_size={size:g}`. Increase `test_size`, or pass evaluation pairs of your own."
        )
    masks = [np.array([prompt in held_out for prompt in texts], dtype=bool) for texts in prompts]
    return [
        (rows.select(np.flatnonzero(~mask)), rows.select(np.flatnonzero(mask)))
        for rows, mask in zip(data_sets, masks, strict=True)
    ]


def _prompts(dataset: datasets.Dataset, dataset_format: str | None) -> list[str | None]:
    """Return the prompt of each row, or `None` if it is not a valid string."""
    row_format = resolve_format(dataset_format, dataset.column_names)
    column = row_format.prompt_columns[0]
    prompts: list[str | None] = []
    for batch in dataset.with_format(None).select_columns([column]).iter(batch_size=1000):
        for value in batch[column]:
            try:
                prompts.append(row_format.prompt({column: value}))
            except ValueError:
                prompts.append(None)
    return prompts
