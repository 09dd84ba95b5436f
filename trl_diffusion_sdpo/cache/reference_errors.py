"""Computes the reference's errors on all pairs before training, so that steps need no forward pass of it. Each epoch
with other random numbers has errors of its own. Each process computes a share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.dataset import PreferenceDataset
from ..engines.engine import Engine
from ..engines.processes import failing_together
from ..models.reference import PrecomputedReference
from ..step.pair_forward import PairForward, eval_mode
from ..utils.errors import NotFiniteError, UserError
from ..utils.processes import ALONE, Peers
from .key import VERSION
from .shards import ShardStore, complete

ERRORS = "reference_errors"  # subfolder
SHARD_PAIRS = 256  # number of pairs in a shard file. A killed process loses at most one shard
COLUMN = "errors"

Items = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ErrorSettings:
    """Settings of [`ReferenceErrors`]."""

    folder: Path  # folder of all caches
    facts: Mapping[str, Any]  # part of the cache key that depends on reference, encoders and precision
    epochs: int  # number of epochs after which the random numbers of training pairs repeat
    # Number of pairs in a forward pass. With the batch sizes of training and evaluation, errors equal those during
    # training bit by bit.
    batch_size: int
    eval_batch_size: int
    to_inputs: Callable[[Items], dict[str, Any]]  # function that collates items and moves the batch to the device
    # Function that returns an iterable of batches, each a list of items. The function's arguments are a data set and,
    # for each batch, the list of its keys in the data set.
    load: Callable[[Dataset, Sequence[Sequence[Any]]], Iterable[list[Any]]]
    show_progress: bool  # whether this process shows a progress bar
    peers: Peers = ALONE


class ReferenceErrors:
    """Computes the reference's errors on the pairs of data sets, and adds them to the data sets. They are stored on
    disk, and only missing ones are computed.

    A store has float32 errors of shape `(E, P, 2)`, for E epochs, P pairs, and winner and loser. One row of the store
    has the errors of up to [`SHARD_PAIRS`] pairs in one epoch. The errors of a pair that could not be read are NaN.
    `denoiser` is the policy's denoiser, before the engine (DDP, FSDP2, DeepSpeed) wraps it.
    """

    def __init__(
        self,
        forward: PairForward,
        reference: PrecomputedReference,
        denoiser: nn.Module,
        engine: Engine,
        settings: ErrorSettings,
    ):
        self._forward = forward
        self._reference = reference
        self._denoiser = denoiser
        self._engine = engine
        self._settings = settings

    def add_to(self, dataset: PreferenceDataset) -> None:
        """Add the errors of the reference to the pairs of a data set. Call it in all processes together.

        Raises:
            ValueError: If errors are missing after [`release`], `precompute_dir` cannot be written, or processes do not
                see each other's files.
            FloatingPointError: If an error of the reference is not finite.
        """
        store = self.store_of(dataset)
        complete([store], self._settings.peers, partial(self._complete, dataset, store))
        with failing_together(RuntimeError):
            errors = torch.cat([store.read(row)[COLUMN] for row in range(len(store))]).numpy()
        dataset.set_reference_errors(errors.reshape(self._epochs(dataset), len(dataset), *errors.shape[1:]))

    def _complete(self, dataset: PreferenceDataset, store: ShardStore, missing: Sequence[np.ndarray]) -> None:
        if not self._reference.can_predict:
            raise UserError(
                f"The errors of the reference on the {dataset.report.name} data must be computed before "
                "training. Pass the data as `eval_dataset` when you construct the trainer."
            )
        peers = self._settings.peers
        with failing_together(RuntimeError):
            if share := missing[0][peers.index :: peers.count].tolist():
                with self._predicting():
                    self._compute(dataset, store, share)

    def release(self) -> None:
        """Free the memory of the reference model."""
        self._reference.release()

    def store_of(self, dataset: PreferenceDataset) -> ShardStore:
        """Return the store on disk for the errors on a data set. Call it in all processes together."""
        noise = dataclasses.asdict(self._forward.noise_settings)
        del noise["inversion"]  # inverted noise depends on the policy, so its errors are never stored
        training = dataset.is_for_training
        size = self._settings.batch_size if training else self._settings.eval_batch_size
        facts = {
            **self._settings.facts,
            "batch": [size, training and self._forward.by_halves],  # other batches may round in another way
            "data": dataset.fingerprint(thorough=True, peers=self._settings.peers),
            "draw_settings": dataset.draw_settings(),
            "noise": noise,
            "version": VERSION,
            "epochs": self._epochs(dataset),
        }
        if not training:
            facts["crops"] = None
        return ShardStore(self._settings.folder / ERRORS, facts, len(self._shards(dataset)))

    def _epochs(self, dataset: PreferenceDataset) -> int:
        return self._settings.epochs if dataset.is_for_training else 1

    def _shards(self, dataset: PreferenceDataset) -> list[tuple[int, range]]:
        """Return the epoch and the pair numbers for each row of the store."""
        pairs = range(len(dataset))
        shards = [pairs[start : start + SHARD_PAIRS] for start in pairs[::SHARD_PAIRS]]
        return [(epoch, shard) for epoch in range(self._epochs(dataset)) for shard in shards]

    @contextlib.contextmanager
    def _predicting(self) -> Iterator[None]:
        family = self._forward.family
        try:
            with self._reference.predicting(self._denoiser, self._engine):
                family.settle_dtype(self._engine.rounding if self._engine.casts_weights else None)
                yield
        finally:
            family.settle_dtype()

    def _compute(self, dataset: PreferenceDataset, store: ShardStore, missing: list[int]) -> None:
        """Compute and write the missing rows of a store. All images of a forward pass have the same size."""
        shards = self._shards(dataset)
        numbers = [[(shards[row][0], pair) for pair in shards[row][1]] for row in missing]
        training = dataset.is_for_training
        size = self._settings.batch_size if training else self._settings.eval_batch_size
        batches = [shard[start : start + size] for shard in numbers for start in range(0, len(shard), size)]
        loader = iter(self._settings.load(_PairsInEpochs(dataset), batches))
        bar = tqdm(
            total=sum(map(len, numbers)),
            desc=f"Errors of the reference, {dataset.report.name} data",
            unit="pair",
            disable=not self._settings.show_progress,
        )
        with bar, torch.no_grad(), eval_mode([self._denoiser]):
            for row in missing:
                pairs = shards[row][1]
                waiting: dict[Any, Items] = {}  # items that wait for a full batch, by the shapes of their tensors
                errors = torch.full((len(pairs), 2), torch.nan)
                for _ in range(0, len(pairs), size):
                    for pair, item in next(loader):
                        bar.update()
                        if item["row"] != pair:
                            continue  # the pair cannot be read, so the data set returned another pair
                        shapes = tuple(value.shape for value in item.values() if isinstance(value, torch.Tensor))
                        waiting.setdefault(shapes, []).append(item)
                        if len(waiting[shapes]) == size:
                            self._fill(errors, pairs, waiting.pop(shapes), training)
                for items in waiting.values():
                    # Errors may round differently in a batch of another size. In training all batches are full, so fill
                    # this one up; in evaluations the last is smaller, so leave it.
                    self._fill(errors, pairs, items, training, at_least=size if training else 0)
                store.write(row, {row: {COLUMN: errors}})

    def _fill(self, errors: torch.Tensor, pairs: range, items: Items, training: bool, *, at_least: int = 0) -> None:
        """Compute the errors of items in one forward pass, filled up to `at_least` with the first item, and write them
        into `errors`."""
        rows = [item["row"] for item in items]
        padded = items + items[:1] * (at_least - len(items))
        computed = self._forward.reference_errors(self._denoiser, self._settings.to_inputs(padded), training=training)
        computed = computed.view(2, len(padded)).T[: len(rows)].cpu()  # (2B,) -> (B, 2)
        bad = [row for row, error in zip(rows, computed, strict=True) if not error.isfinite().all()]
        if bad:
            raise NotFiniteError(
                f"Errors of the reference must be finite, but the errors of the pairs {bad[:8]} are not. Check "
                "the images of these pairs, or use bf16 instead of fp16."
            )
        errors[[row - pairs.start for row in rows]] = computed


class _PairsInEpochs(Dataset):
    """Data set with the keys (epoch, pair number). A value is the pair number and the pair's item in this epoch."""

    def __init__(self, pairs: PreferenceDataset):
        self._pairs = pairs

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, dict[str, Any]]:
        epoch, pair = key
        return pair, self._pairs.in_epoch(epoch)[pair]
