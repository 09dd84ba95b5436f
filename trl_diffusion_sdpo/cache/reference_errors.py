"""Errors of a reference at every draw of every pair, in shards that are written before training."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .shards import MANIFEST, ShardStore

logger = logging.getLogger(__name__)

KIND = "reference errors"
FORMAT = 1  # of the contents: raise it where the same settings give other errors
SHARD_PAIRS = 256  # a killed computation repeats at most so many in each process
COLUMN = "errors"


@dataclass(frozen=True)
class ErrorShard:
    """A part of the errors that is computed and written at once.

    Args:
        number (`int`): Of the shard.
        draw (`int`): Number of the draw, in `[0, K)`.
        pairs (`range`): Rows of the data set.
    """

    number: int
    draw: int
    pairs: range


class ReferenceErrorStore:
    """Float32 errors of shape `(K, P, T, 2)`: at K draws, of P pairs, at T noise levels, of winner and loser. NaN where
    a pair could not be read.

    Args:
        folder (`str` or `os.PathLike`): Of stores of any key.
        facts (`Mapping`): What the errors depend on, as values of JSON.
        draws, pairs, levels (`int`): K, P and T.
    """

    def __init__(self, folder: str | os.PathLike, facts: Mapping[str, Any], *, draws: int, pairs: int, levels: int):
        self.draws, self.pairs, self.levels = draws, pairs, levels
        self.facts = {**facts, "kind": KIND, "version": FORMAT, "draws": draws, "pairs": pairs, "levels": levels}
        self._folder, self._per_draw = folder, -(-pairs // SHARD_PAIRS)
        self._shards = ShardStore(folder, self.facts, draws * self._per_draw, shard_rows=1)

    @property
    def path(self) -> os.PathLike:
        """The folder of these errors."""
        return self._shards.path

    def missing(self, process: int = 0, processes: int = 1) -> list[ErrorShard]:
        """A process's share of the shards that are not there, are damaged or stale."""
        numbers = self._shards.missing(range(process, len(self._shards), processes))
        return [self._shard(number) for number in numbers]

    def write(self, shard: ErrorShard, errors: torch.Tensor) -> None:
        """Write the errors `(pairs of the shard, T, 2)`; a kill leaves all of them or none."""
        assert errors.shape == (len(shard.pairs), self.levels, 2), errors.shape
        self._shards.write(shard.number, {COLUMN: [errors]})

    def read(self) -> np.ndarray:
        """All errors, `(K, P, T, 2)`.

        Raises:
            ValueError: If a shard is not there or damaged.
        """
        errors = np.empty((self.draws, self.pairs, self.levels, 2), dtype=np.float32)
        for number in range(len(self._shards)):
            shard = self._shard(number)
            errors[shard.draw, shard.pairs.start : shard.pairs.stop] = self._shards.read(number)[COLUMN].numpy()
        return errors

    def log_difference(self) -> None:
        """Where this store is new and others of the same data are beside it: log by which facts the most similar one
        differs."""
        own = json.loads(json.dumps(self.facts))
        found = []
        for manifest in self._shards.path.parent.glob(f"*/{MANIFEST}"):
            key = _key_of(manifest)
            if key.get("kind") == KIND and key.get("data") == own.get("data") and key != own:
                names = sorted(name for name in {**key, **own} if key.get(name) != own.get(name))
                found.append((len(names), str(manifest.parent), names))
        if found and not self._shards.path.exists():
            _, folder, names = min(found)
            logger.warning("The errors in %s are of another %s, and are not used.", folder, ", ".join(names))

    def _shard(self, number: int) -> ErrorShard:
        draw, part = divmod(number, self._per_draw)
        return ErrorShard(number, draw, range(self.pairs)[part * SHARD_PAIRS : (part + 1) * SHARD_PAIRS])


def _key_of(manifest: os.PathLike) -> dict[str, Any]:
    try:
        with open(manifest, encoding="utf-8") as file:
            return dict(json.load(file)["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
