"""Table of pairs: where the images of each pair are, and what else is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class PairTable:
    """P pairs: the positions of their images, and further columns.

    Attributes:
        positions (`np.ndarray` of shape `(P, 4)`): Row number of the winner, number of the winner's image within this
            row, and the same two numbers of the loser.
        columns (`dict[str, np.ndarray]`): Further columns of P entries by name. `scores` are the reward scores of
            winner and loser, those of single images less their threshold, and `calibrated` replaces them. `weight` is
            the factor of a pair's loss. `size` is the index of its bucket. `ref_errors` are the reference model's
            errors. `source_rows` and `sources_cut`, `(P, 2)`, say which images the prompts of winner and loser edit,
            and how they are cropped.
    """

    positions: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, pairs: slice | np.ndarray) -> PairTable:
        """Return the pairs that a slice, a mask or indices select."""
        columns = {name: values[pairs] for name, values in self.columns.items()}
        return replace(self, positions=self.positions[pairs], columns=columns)

    def with_columns(self, **columns: np.ndarray | None) -> PairTable:
        """Return a copy with `columns` added or replaced. `None` removes a column."""
        joined = {**self.columns, **columns}
        return replace(self, columns={name: values for name, values in joined.items() if values is not None})
