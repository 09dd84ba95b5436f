"""Errors of the reference, computed before training for all pairs in all epochs with different draws. Training steps
then need no forward pass of the reference. Each process computes its share of the missing shards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..data.dataset import PreferenceDataset
from ..engines.engine import Engine
from ..engines.processes import failing_together
from ..models.reference import PrecomputedReference
from ..step.pair_forward import PairForward, eval_mode
from ..utils.processes import ALONE, Peers
from .key import VERSION
from .shards import ShardStore, writing_into

logger = logging.getLogger(__name__)

ERRORS = "reference_errors"  # subfolder
SHARD_PAIRS = 256  # a killed process computes at most so many again
COLUMN = "errors"

Items = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ErrorSettings:
    """Settings by which errors are computed.

    Args:
        folder (`Path`): Folder of all caches.
        facts (`Mapping`): Facts besides data and noise that errors depend on: reference, encoders, precision.
        epochs (`int`): Number E of epochs after which the draws of training pairs repeat.
        batch_size, eval_batch_size (`int`): Pairs of a forward pass. They equal the batches in training and
            evaluation, so that errors equal those of a live reference bit by bit.
        to_inputs (`Callable`): Collates items and moves them to the device.
        load (`Callable`): Makes a loader of lists of items from a data set, batches of its keys and the pairs that it
            reads.
        show_progress (`bool`): Whether this process shows a progress bar.
        peers (`Peers`): The processes of this training.
    """

    folder: Path
    facts: Mapping[str, Any]
    epochs: int
    batch_size: int
    eval_batch_size: int
    to_inputs: Callable[[Items], dict[str, Any]]
    load: Callable[[Dataset, Sequence[Sequence[Any]], PreferenceDataset], Iterable[list[Any]]]
    show_progress: bool
    peers: Peers = ALONE


@dataclasses.dataclass(frozen=True)
class ErrorShard:
    """Shard of errors: those of the rows `pairs` of a data set in one epoch."""

    number: int
    epoch: int
    pairs: range


class ReferenceErrorStore:
    """Float32 errors of shape `(E, P, T, 2)`: E epochs, P pairs, T timesteps of a pair, winner and loser. Errors of a
    pair that could not be read are NaN.

    Args:
        folder (`Path`): Folder of the stores of any key.
        key (`Mapping`): Everything that errors depend on, as values of JSON.
        epochs, pairs, timesteps (`int`): E, P and T.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, epochs: int, pairs: int, timesteps: int):
        self.epochs = epochs
        self.pairs = pairs
        self.timesteps = timesteps
        self.key = {**key, "version": VERSION, "epochs": epochs, "pairs": pairs, "timesteps": timesteps}
        self._per_epoch = -(-pairs // SHARD_PAIRS)
        self.shards = ShardStore(folder, self.key, epochs * self._per_epoch)

    def missing(self) -> list[ErrorShard]:
        """Return the shards that are missing or damaged."""
        self.shards.refresh()
        return [self._shard(number) for number in self.shards.missing(np.arange(len(self.shards))).tolist()]

    def write(self, shard: ErrorShard, errors: torch.Tensor) -> None:
        """Write the errors `(pairs of the shard, T, 2)`."""
        assert errors.shape == (len(shard.pairs), self.timesteps, 2), errors.shape
        self.shards.write(shard.number, {shard.number: {COLUMN: errors}})

    def read(self) -> np.ndarray:
        """Return all errors, `(E, P, T, 2)`. Raise `KeyError` if a shard is missing."""
        self.shards.refresh()
        errors = np.empty((self.epochs, self.pairs, self.timesteps, 2), dtype=np.float32)
        for number in range(len(self.shards)):
            shard = self._shard(number)
            errors[shard.epoch, shard.pairs.start : shard.pairs.stop] = self.shards.read(number)[COLUMN].numpy()
        return errors

    def _shard(self, number: int) -> ErrorShard:
        epoch, index = divmod(number, self._per_epoch)
        return ErrorShard(number, epoch, range(self.pairs)[index * SHARD_PAIRS : (index + 1) * SHARD_PAIRS])


class ReferenceErrors:
    """Errors of the reference on data sets: read from a store, after all processes have computed the missing ones.

    Args:
        denoiser (`nn.Module`): The policy, not prepared by the engine.
    """

    def __init__(
        self,
        forward: PairForward,
        reference: PrecomputedReference,
        denoiser: nn.Module,
        engine: Engine,
        settings: ErrorSettings,
    ):
        self._forward, self._reference, self._denoiser, self._engine = forward, reference, denoiser, engine
        self._settings = settings

    def add_to(self, dataset: PreferenceDataset) -> None:
        """Set the errors of a data set's pairs. All processes must call it.

        Raises:
            ValueError: If errors are missing and the reference has been released.
            FloatingPointError: If an error is not finite.
        """
        store, peers = self.store_of(dataset), self._settings.peers
        if any(peers.gather_results(store.missing)):
            with writing_into(self._settings.folder), contextlib.ExitStack() as stack:

                def lock() -> None:
                    if peers.index == 0:
                        stack.enter_context(store.shards.locked())

                with failing_together(RuntimeError):
                    self._check_can_predict(dataset, store)
                peers.gather_results(lock)
                missing = peers.gather_results(store.missing)[0]  # another run may have written them meanwhile
                with failing_together(RuntimeError):
                    if share := missing[peers.index :: peers.count]:
                        with self._predicting(store):
                            self._compute(dataset, store, share)
        dataset.set_reference_errors(store.read())

    def release(self) -> None:
        """Free the reference, before the policy trains."""
        self._reference.release()

    def store_of(self, dataset: PreferenceDataset) -> ReferenceErrorStore:
        """Return the store of the errors of a data set. All processes must call it together."""
        draws, training = dataset.draw_settings(), _is_for_training(dataset)
        data = dataset.fingerprint(thorough=True, peers=self._settings.peers)
        noise = dataclasses.asdict(self._forward.noise_settings)
        timesteps = noise.pop("timesteps_per_pair")  # an evaluation has one
        del noise["inversion"]  # inverted noise depends on the policy, so its errors are never stored
        facts = {**self._settings.facts, "data": data, "draw_settings": draws, "noise": noise}
        facts["crops"] = facts.get("crops") if training else None
        return ReferenceErrorStore(
            self._settings.folder / ERRORS,
            json.loads(json.dumps(facts, default=str)),
            epochs=self._settings.epochs if training else 1,
            pairs=len(dataset),
            timesteps=timesteps if training else 1,
        )

    def _check_can_predict(self, dataset: PreferenceDataset, store: ReferenceErrorStore) -> None:
        if not self._reference.can_predict:
            raise ValueError(
                f"The errors of the reference on the {dataset.report.name} data must be computed before training. "
                f"{store.shards.path} does not have them. Pass these data as `eval_dataset` when the trainer is made."
            )

    @contextlib.contextmanager
    def _predicting(self, store: ReferenceErrorStore) -> Iterator[None]:
        family = self._forward.family
        try:
            with self._reference.predicting(self._denoiser, self._engine):
                family.settle_dtype(self._engine.rounding if self._engine.casts_weights else None)
                yield
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                "Each process computes the errors of the reference with the whole denoiser, which does not fit into "
                "the device's memory. Compute them on a larger device, with the same settings in one process, into "
                f"{self._settings.folder}. Training then reads {store.shards.path} with every engine."
            ) from error
        finally:
            family.settle_dtype()

    def _compute(self, dataset: PreferenceDataset, store: ReferenceErrorStore, missing: list[ErrorShard]) -> None:
        """Compute and write shards, each in batches of one size and shape."""
        numbers = [[(shard.epoch, pair) for pair in shard.pairs] for shard in missing]
        training = _is_for_training(dataset)
        size = self._settings.batch_size if training else self._settings.eval_batch_size
        batches = [shard[start : start + size] for shard in numbers for start in range(0, len(shard), size)]
        loader = iter(self._settings.load(_PairsInEpochs(dataset.for_storing()), batches, dataset))
        bar = tqdm(
            total=sum(map(len, numbers)),
            desc=f"Errors of the reference, {dataset.report.name} data",
            unit="pair",
            disable=not self._settings.show_progress,
        )
        with bar, torch.no_grad(), eval_mode([self._denoiser]):
            for shard in missing:
                waiting = _Waiting(size)
                errors = torch.full((len(shard.pairs), store.timesteps, 2), torch.nan)
                for _ in range(0, len(shard.pairs), size):
                    for pair, item in next(loader):
                        bar.update()
                        if item["row"] == pair:  # otherwise the pair cannot be read, and this is another
                            self._fill(errors, shard, waiting.add(item), training)
                for items in waiting.left():
                    # Batches of other sizes may round differently. Only the last batch of an evaluation is smaller.
                    self._fill(errors, shard, items, training, at_least=size if training else 0)
                store.write(shard, errors)

    def _fill(
        self, errors: torch.Tensor, shard: ErrorShard, items: Items, training: bool, *, at_least: int = 0
    ) -> None:
        """Compute errors of items by a forward pass of at least `at_least` pairs, and write them into `errors`."""
        if not items:
            return
        rows = [item["row"] for item in items]
        padded = items + items[:1] * (at_least - len(items))
        computed = self._forward.reference_errors(self._denoiser, self._settings.to_inputs(padded), training=training)
        computed = computed.view(2, -1, len(padded)).permute(2, 1, 0)[: len(rows)].cpu()  # (2TB,) -> (B, T, 2)
        bad = [row for row, error in zip(rows, computed, strict=True) if not error.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"Errors of the reference must be finite. The errors of the pairs {bad[:8]} are not. Check these "
                "pairs, or use bf16 instead of fp16."
            )
        errors[[row - shard.pairs.start for row in rows]] = computed


def repeating_pairs(dataset: Any, epochs: int, *, name: str, training: bool) -> PreferenceDataset:
    """Return prepared pairs whose draws repeat after so many epochs, so that all errors of a reference can be computed.

    Raises:
        ValueError: If the data are a stream.
    """
    if not isinstance(dataset, PreferenceDataset):
        raise ValueError(
            f"`precompute_ref_errors=True` needs a map-style data set. The {name} data are a stream. Load them without "
            "`streaming=True`, or leave `precompute_ref_errors` off."
        )
    if not training:
        return dataset.for_evaluation() if dataset.draw_settings()["training"] else dataset
    return dataset.repeating(epochs)


def warn_of_repeated_draws(args: TrainingArguments, precomputed: int, steps_of_epoch: int) -> None:
    """Warn if a run has more epochs than errors of the reference were computed for."""
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / steps_of_epoch
    if epochs > precomputed:
        logger.warning(
            "Training has %.3g epochs, and `precompute_epochs=%d`. The draws of timestep, noise, flip and crop of each "
            "pair therefore repeat after %d epochs. Use `precompute_epochs=%d` for new draws in every epoch. The "
            "reference then has one forward pass for each pair and epoch.",
            *(epochs, precomputed, precomputed, math.ceil(epochs)),
        )


def _is_for_training(dataset: PreferenceDataset) -> bool:
    return dataset.draw_settings()["training"]


class _PairsInEpochs(Dataset):
    """Row numbers and items, by epoch and row."""

    def __init__(self, pairs: PreferenceDataset):
        self._pairs = pairs

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, dict[str, Any]]:
        epoch, pair = key
        return pair, self._pairs.in_epoch(epoch)[pair]


class _Waiting:
    """Items by the shapes of their tensors, collected until there are enough of one shape for a batch."""

    def __init__(self, size: int):
        self._size = size
        self._items: dict[Any, Items] = {}

    def add(self, item: dict[str, Any]) -> Items:
        """Add an item. Return a whole batch of its shape if there is one now."""
        shape = tuple(tuple(value.shape) for value in item.values() if isinstance(value, torch.Tensor))
        waiting = self._items.setdefault(shape, [])
        waiting.append(item)
        return self._items.pop(shape) if len(waiting) == self._size else []

    def left(self) -> list[Items]:
        """Return the remaining items, in batches of one shape."""
        return list(self._items.values())
