"""Errors of the reference for all pairs at all their draws, computed before training, so that a step has no forward
pass of a reference. Each process writes its share of the missing shards."""

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

from ..data.pairs import PreferenceDataset
from ..engines.engine import Engine
from ..engines.processes import failing_together
from ..models.reference import PrecomputedReference
from ..step.pair_forward import PairForward, eval_mode
from ..utils.processes import ALONE, Peers
from .key import VERSION
from .shards import ShardStore, writing_into

logger = logging.getLogger(__name__)

ERRORS = "reference_errors"  # subfolder
SHARD_PAIRS = 256  # a killed computation repeats at most so many in each process
COLUMN = "errors"

Items = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ErrorSettings:
    """Settings by which errors are computed.

    Args:
        folder (`Path`): Folder of all caches.
        facts (`Mapping`): Facts besides data and noise that errors depend on: reference, encoders, precision.
        noise_draws (`int`): Number K of draws of each training pair.
        batch_size, eval_batch_size (`int`): Pairs of a forward pass. They equal the batches in training and in
            evaluation, so that errors are those of a live reference to the bit.
        to_inputs (`Callable`): Collates items and moves them to the device.
        load (`Callable`): Makes a loader of lists of items from a data set, batches of its keys and the pairs that it
            reads.
        show_progress (`bool`): Whether this process shows a progress bar.
        peers (`Peers`): The processes of this training.
    """

    folder: Path
    facts: Mapping[str, Any]
    noise_draws: int
    batch_size: int
    eval_batch_size: int
    to_inputs: Callable[[Items], dict[str, Any]]
    load: Callable[[Dataset, Sequence[Sequence[Any]], PreferenceDataset], Iterable[list[Any]]]
    show_progress: bool
    peers: Peers = ALONE


@dataclasses.dataclass(frozen=True)
class ErrorShard:
    """Shard of errors: at draw `draw` in `[0, K)`, of the rows `pairs` of a data set."""

    number: int
    draw: int
    pairs: range


class ReferenceErrorStore:
    """Float32 errors of shape `(K, P, T, 2)`: at K draws, of P pairs, at T draws of timestep and noise, of winner and
    loser. Errors of a pair that could not be read are NaN.

    Args:
        folder (`Path`): Folder of the stores of any key.
        key (`Mapping`): Everything that errors depend on, as values of JSON.
        draws, pairs, levels (`int`): K, P and T.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, draws: int, pairs: int, levels: int):
        self.draws, self.pairs, self.levels = draws, pairs, levels
        self.key = {**key, "version": VERSION, "draws": draws, "pairs": pairs, "levels": levels}
        self._per_draw = -(-pairs // SHARD_PAIRS)
        self.shards = ShardStore(folder, self.key, draws * self._per_draw)

    def missing(self) -> list[ErrorShard]:
        """Return the shards that are missing or damaged."""
        self.shards.refresh()
        return [self._shard(number) for number in self.shards.missing(np.arange(len(self.shards))).tolist()]

    def write(self, shard: ErrorShard, errors: torch.Tensor) -> None:
        """Write the errors `(pairs of the shard, T, 2)`."""
        assert errors.shape == (len(shard.pairs), self.levels, 2), errors.shape
        self.shards.write(shard.number, {shard.number: {COLUMN: errors}})

    def read(self) -> np.ndarray:
        """Return all errors, `(K, P, T, 2)`. Raise `KeyError` if a shard is missing."""
        self.shards.refresh()
        errors = np.empty((self.draws, self.pairs, self.levels, 2), dtype=np.float32)
        for number in range(len(self.shards)):
            shard = self._shard(number)
            errors[shard.draw, shard.pairs.start : shard.pairs.stop] = self.shards.read(number)[COLUMN].numpy()
        return errors

    def _shard(self, number: int) -> ErrorShard:
        draw, part = divmod(number, self._per_draw)
        return ErrorShard(number, draw, range(self.pairs)[part * SHARD_PAIRS : (part + 1) * SHARD_PAIRS])


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
                    if own := missing[peers.index :: peers.count]:
                        with self._predicting(store):
                            self._compute(dataset, store, own)
        dataset.set_reference_errors(store.read())

    def release(self) -> None:
        """Free the reference, before the policy trains."""
        self._reference.release()

    def store_of(self, dataset: PreferenceDataset) -> ReferenceErrorStore:
        """Return the store of the errors of a data set. All processes must call it together."""
        draws, training = dataset.draw_settings(), _is_for_training(dataset)
        data = dataset.fingerprint(thorough=True, peers=self._settings.peers)
        noise = dataclasses.asdict(self._forward.noise_settings)
        levels = noise.pop("timesteps_per_pair")  # of training alone
        del noise["inversion"]  # whose noise moves with the policy: there is none here
        facts = {**self._settings.facts, "data": data, "draw_settings": draws, "noise": noise}
        facts["crops"] = facts.get("crops") if training else None
        return ReferenceErrorStore(
            self._settings.folder / ERRORS,
            json.loads(json.dumps(facts, default=str)),
            draws=self._settings.noise_draws if training else 1,
            pairs=len(dataset),
            levels=levels if training else 1,
        )

    def _check_can_predict(self, dataset: PreferenceDataset, store: ReferenceErrorStore) -> None:
        if not self._reference.can_predict:
            raise ValueError(
                f"The errors of the reference on the {dataset.report.name} data must be computed before training, and "
                f"{store.shards.path} does not hold them. Pass these data as `eval_dataset` when the trainer is made."
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
                "The errors of the reference are computed by the whole denoiser in each process, and it does not fit "
                f"into the device's memory. Compute them where it does, with the same settings in one process, into "
                f"{self._settings.folder}: training then reads {store.shards.path} under every engine."
            ) from error
        finally:
            family.settle_dtype()

    def _compute(self, dataset: PreferenceDataset, store: ReferenceErrorStore, missing: list[ErrorShard]) -> None:
        """Compute and write shards, each in batches of one size and shape."""
        numbers = [[(shard.draw, pair) for pair in shard.pairs] for shard in missing]
        training = _is_for_training(dataset)
        size = self._settings.batch_size if training else self._settings.eval_batch_size
        batches = [shard[start : start + size] for shard in numbers for start in range(0, len(shard), size)]
        loader = iter(self._settings.load(_Draws(dataset.for_storing()), batches, dataset))
        bar = tqdm(
            total=sum(map(len, numbers)),
            desc=f"Errors of the reference, {dataset.report.name} data",
            unit="pair",
            disable=not self._settings.show_progress,
        )
        with bar, torch.no_grad(), eval_mode([self._denoiser]):
            for shard in missing:
                waiting = _Waiting(size)
                errors = torch.full((len(shard.pairs), store.levels, 2), torch.nan)
                for _ in range(0, len(shard.pairs), size):
                    for pair, item in next(loader):
                        bar.update()
                        if item["row"] == pair:  # otherwise the pair cannot be read, and another takes its place
                            self._fill(errors, shard, waiting.add(item), training)
                for items in waiting.left():
                    # Other sizes may round differently. Those of an evaluation are in order, its last batch is small.
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
                f"Errors of the reference must be finite. Those of the pairs {bad[:8]} are not. Look at these pairs, "
                "or use bf16 instead of fp16."
            )
        errors[[row - shard.pairs.start for row in rows]] = computed


def repeating_pairs(dataset: Any, noise_draws: int, *, name: str, training: bool) -> PreferenceDataset:
    """Return prepared pairs whose draws repeat, so that all errors of a reference can be computed.

    Raises:
        ValueError: If the data are a stream.
    """
    if not isinstance(dataset, PreferenceDataset):
        raise ValueError(
            f"`precompute_ref_errors=True` needs pairs with numbers, and the {name} data are a stream. Use a map-style "
            "data set, or leave it off."
        )
    if not training:
        return dataset.for_evaluation() if dataset.draw_settings()["training"] else dataset
    return dataset.with_noise_draws(noise_draws)


def warn_of_repeated_draws(args: TrainingArguments, noise_draws: int, steps_of_epoch: int) -> None:
    """Warn if a run takes more epochs than there are draws of each pair."""
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / steps_of_epoch
    if epochs > noise_draws:
        logger.warning(
            "`precompute_epochs=%d`, and training takes %.3g epochs: each pair meets the same %d draws of timestep, "
            "noise, flip and crop %.3g times, where a live reference would have new ones in every epoch. "
            "`precompute_epochs=%d` repeats none, for as many forward passes of the reference for each pair.",
            *(noise_draws, epochs, noise_draws, epochs / noise_draws, math.ceil(epochs)),
        )


def _is_for_training(dataset: PreferenceDataset) -> bool:
    return dataset.draw_settings()["training"]


class _Draws(Dataset):
    """Rows and pairs, by the number of the draw and the row."""

    def __init__(self, pairs: PreferenceDataset):
        self._pairs = pairs

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, dict[str, Any]]:
        draw, pair = key
        return pair, self._pairs.in_epoch(draw)[pair]


class _Waiting:
    """Items that wait, by the shapes of their tensors, until there are enough of one shape for a batch."""

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
        """Return the waiting items, in batches of one shape."""
        return list(self._items.values())
