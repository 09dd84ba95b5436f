"""Common base of map-style data sets and streams of prepared pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from torch.utils.data import Dataset, Sampler

from ..utils.processes import Peers
from .buckets import PairSizes
from .data_report import DataReport
from .transforms import PairDraws


class Pairs(Dataset[dict[str, Any]], ABC):
    """Preference pairs, ready for training or evaluation, made by [`prepare_dataset`]: a [`PreferenceDataset`] or a
    [`PreferenceIterableDataset`].

    Attributes:
        is_stream (`bool`): Whether pairs can only be read in order, and each process reads other pairs.
        has_scores (`bool`): Whether items have scores.
        has_masks (`bool`): Whether items have masks.
        has_sources (`bool`): Whether items have source images.
        has_loser_prompts (`bool`): Whether losers have prompts of their own.
    """

    is_stream: ClassVar[bool]
    has_scores: bool
    has_masks: bool
    has_sources: bool
    has_loser_prompts: bool

    @property
    @abstractmethod
    def report(self) -> DataReport:
        """Counts of rows, pairs and dropped pairs so far."""

    @property
    @abstractmethod
    def is_for_training(self) -> bool:
        """Whether items have the random crops, flips and numbers of training."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return facts that identify the pairs, for a resumed run to compare."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that random numbers depend on, also in running DataLoader workers."""

    @abstractmethod
    def for_evaluation(self) -> Pairs:
        """Return these pairs for evaluation, with constant seeds and without random crops, flips or empty prompts."""

    @abstractmethod
    def sample(self, count: int) -> list[dict[str, Any]]:
        """Return up to `count` items: evenly spaced ones of a map-style data set, or the first ones of a stream."""

    @property
    def sizes(self) -> PairSizes | None:
        """Bucket of each pair, or `None` if all train at one size."""
        return None

    @property
    def marks_repeated(self) -> bool:
        """Whether items say by the entry `repeated` that they only fill up a batch: accelerate cannot find them itself
        in streams and in batches by image size."""
        return self.is_stream or self.sizes is not None

    def sampler(self, group: int, *, shuffled: bool = False, drop_last: bool = False) -> Sampler[Any] | None:
        """Return a sampler with which every `group` consecutive pairs have the same size. A stream needs none: it has
        its own order."""
        return None

    def gather_undecodable(self, peers: Peers) -> None:
        """Learn from the other processes which pairs they could not decode. Call it in all processes. Those of a stream
        read other pairs and keep their own counts."""


class PairEncodings(Protocol):
    """Latents and embeddings in place of images: `EncodedPairs` of the cache."""

    def pair(self, pair: int, draws: PairDraws | None, epoch: int, loser: int | None = None) -> dict[str, Any]:
        """Return the entries of an item that depend on its images."""

    def conditioning(
        self, prompt: str, edited: tuple[tuple[int, int, int], bool] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return an encoded prompt, or an encoded edit if `edited` names source images."""
