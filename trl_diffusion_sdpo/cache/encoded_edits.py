"""Conditioning of pairs with source images that was encoded before training: each prompt with its sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..data.images import PairDraws, UndecodableImageError
from ..data.pairs import PreferenceDataset
from ..families import Family
from .encoded_pairs import FEW_EPOCHS
from .shards import ShardStore

UNREADABLE = "unreadable"  # name of the tensor of a row whose sources cannot be decoded
OWN, LOSERS, EMPTY = "own", "losers", "empty"  # the prompt that is encoded with the sources


@dataclass(frozen=True)
class EditRows:
    """Numbers of encoded edits in their store: `kind * number of pairs + pair`.

    Args:
        seed (`int`): Seed of the draws.
        pairs (`int`): Number of pairs.
        kinds (`tuple[tuple[bool, str], ...]`): Whether the sources are mirrored, and which prompt is encoded with them.
        prompt_dropout (`float`): Probability that a prompt is emptied.
    """

    seed: int
    pairs: int
    kinds: tuple[tuple[bool, str], ...]
    prompt_dropout: float

    @classmethod
    def of(cls, dataset: PreferenceDataset) -> EditRows:
        """Number the edits of a data set."""
        flips, _ = dataset.augmentations
        prompts = [OWN]
        prompts += [LOSERS] if dataset.has_loser_prompts else []
        prompts += [EMPTY] if dataset.prompt_dropout else []
        kinds = tuple((is_mirrored, prompt) for is_mirrored in (False, True)[: 1 + flips] for prompt in prompts)
        return cls(dataset.seed, len(dataset), kinds, dataset.prompt_dropout)

    def __len__(self) -> int:
        return len(self.kinds) * self.pairs

    def number(self, pair: int, is_mirrored: bool, prompt: str) -> int:
        """Return the row of a pair."""
        return self.kinds.index((is_mirrored, prompt)) * self.pairs + pair

    def needed(self, epochs: int | None) -> np.ndarray:
        """Return the sorted rows that training reads in its first epochs. The argument is that of
        [`ImageRows.needed`]."""
        if epochs is None or epochs > FEW_EPOCHS or len(self.kinds) == 1:
            return np.arange(len(self))
        flips = (True, OWN) in self.kinds
        own = [prompt for prompt in (OWN, LOSERS) if (False, prompt) in self.kinds]
        is_needed = np.zeros(len(self), dtype=bool)
        for epoch in range(max(epochs, 1)):
            for pair in range(self.pairs):
                draws = PairDraws.from_key(self.seed, epoch, pair)
                for prompt in [EMPTY] if draws.dropout < self.prompt_dropout else own:
                    is_needed[self.number(pair, flips and draws.flip < 0.5, prompt)] = True
        return np.flatnonzero(is_needed)


class DecodedEdits(Dataset):
    """The prompt and the sources of each of some rows, or the error of a source, for DataLoader workers."""

    def __init__(self, dataset: PreferenceDataset, edits: EditRows, rows: Sequence[int]) -> None:
        self._dataset, self._edits, self._rows = dataset, edits, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, list[Image.Image]] | UndecodableImageError:
        kind, pair = divmod(self._rows[index], self._edits.pairs)
        is_mirrored, prompt = self._edits.kinds[kind]
        try:
            prompts, sources = self._dataset.edit(pair, is_mirrored)
        except UndecodableImageError as error:
            return type(error)(str(error))  # without what it holds of the image
        return "" if prompt == EMPTY else prompts[prompt == LOSERS], sources


class EncodedEdits:
    """Conditioning of the edits of a data set.

    Args:
        store ([`ShardStore`]): Rows of [`EditRows`].
        rows ([`EditRows`]): Numbers of the edits in the store.
        on_host (`Sequence[str]`): Tensors that are read on the host.
    """

    def __init__(self, store: ShardStore, rows: EditRows, on_host: Sequence[str] = ()) -> None:
        self.store, self._rows, self._on_host = store, rows, on_host

    def read(self, pair: int, is_mirrored: bool, prompt: str) -> dict[str, dict[str, Any]]:
        """Return `conditioning` without a batch axis, and `host_conditioning` as Python numbers.

        Raises:
            UndecodableImageError: If a source could not be decoded when the cache was made.
            ValueError: If the row is not one of those that the run was started for.
        """
        try:
            tensors = self.store.read(self._rows.number(pair, is_mirrored, prompt))
        except KeyError as error:
            raise ValueError(
                "The cache has the flips and empty prompts that are drawn in the epochs of `num_train_epochs` or "
                f"`max_steps`, and not this draw of pair {pair}. Make a new trainer: it encodes what is missing."
            ) from error
        if UNREADABLE in tensors:
            raise UndecodableImageError("has a source that could not be decoded when the cache was made")
        host = {name: tensors.pop(name).tolist() for name in self._on_host}
        return {"conditioning": tensors} | ({"host_conditioning": host} if host else {})


def encode_edit(family: Family, prompt: str, sources: list[Image.Image], copies: int) -> dict[str, torch.Tensor]:
    """Return the conditioning of one edit on the CPU. It is encoded `copies` times in one batch, because CPUs round
    batches of one differently."""
    with torch.no_grad():
        encoded = family.encode_edits([prompt] * copies, [sources] * copies)
    return {name: value[0].cpu() for name, value in encoded.items()}
