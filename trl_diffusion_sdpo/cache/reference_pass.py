"""The reference's errors of all pairs at all their draws, computed before training, so that a step has no forward pass
of a reference."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..data.checking import ALONE, Peers
from ..data.pairs import PreferenceDataset
from ..engines.engine import Engine
from ..engines.processes import failing_together
from ..models.reference import PrecomputedReference
from ..step.pair_forward import PairForward, eval_mode
from .reference_errors import ErrorShard, ReferenceErrorStore

logger = logging.getLogger(__name__)

Items = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ErrorSettings:
    """How errors are computed.

    Args:
        folder (`str`): Of the stores.
        facts (`Mapping`): What they depend on besides the data: the reference, the components that encode, the
            precision.
        noise_draws (`int`): K, the draws of each training pair.
        batch_size, eval_batch_size (`int`): Pairs of a forward pass: those of a batch in training and in evaluation, so
            that errors are equal to the bit to those of a reference that predicts then.
        to_inputs (`Callable`): Collates items and moves them to the device.
        load (`Callable`): From a data set of items, batches of its keys and the pairs that it reads to a loader of
            lists of items, in this process.
        show_progress (`bool`): Whether this process shows a progress bar.
        peers (`Peers`): The processes of this training.
    """

    folder: str
    facts: Mapping[str, Any]
    noise_draws: int
    batch_size: int
    eval_batch_size: int
    to_inputs: Callable[[Items], dict[str, Any]]
    load: Callable[[Dataset, Sequence[Sequence[Any]], PreferenceDataset], Iterable[list[Any]]]
    show_progress: bool
    peers: Peers = ALONE


class ReferenceErrors:
    """Computes the reference's errors of data sets, in all processes together, or reads those that were computed.

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
        """Let the items of a data set carry their errors; all processes must call it.

        Raises:
            `ValueError`: If errors are missing and the reference is not there any more, or rows are not read alike
                twice.
            `FloatingPointError`: If an error is not finite.
        """
        store = self.store_of(dataset)
        accelerator = self._engine.accelerator
        with failing_together(RuntimeError):  # ends in all processes before one of them writes
            missing = store.missing(accelerator.process_index, accelerator.num_processes)
        with failing_together(RuntimeError):
            if missing:
                self._check_can_predict(dataset, store)
                with self._predicting(store):
                    self._compute(dataset, store, missing)
        dataset.set_reference_errors(store.read())

    def release(self) -> None:
        """Free the reference, before the policy trains."""
        self._reference.release()

    def store_of(self, dataset: PreferenceDataset) -> ReferenceErrorStore:
        """Where the errors of a data set are stored; all processes must call it."""
        draws, training = dataset.draw_settings(), _is_for_training(dataset)
        data = dataset.fingerprint(thorough=True, peers=self._settings.peers)
        if None in (data.get("prompts"), data.get("images")):
            raise ValueError(
                "`precompute_ref_errors=True` needs data whose rows are equal at every read, and two reads of a row of "
                f"the {dataset.report.name} data differ. Use a data set without random rows, or leave it off."
            )
        noise = dataclasses.asdict(self._forward.noise_settings)
        levels = noise.pop("timesteps_per_pair")  # of training alone
        del noise["inversion"]  # whose noise moves with the policy: there is none here
        facts = {**self._settings.facts, "data": data, "draw_settings": draws, "noise": noise}
        facts["crops"] = facts.get("crops") if training else None
        return ReferenceErrorStore(
            self._settings.folder,
            json.loads(json.dumps(facts, default=str)),
            draws=self._settings.noise_draws if training else 1,
            pairs=len(dataset),
            levels=levels if training else 1,
        )

    def _check_can_predict(self, dataset: PreferenceDataset, store: ReferenceErrorStore) -> None:
        if not self._reference.can_predict:
            raise ValueError(
                f"The errors of the reference on the {dataset.report.name} data must be computed before training, and "
                f"{store.path} does not hold them. Pass these data as `eval_dataset` when the trainer is made."
            )
        store.log_difference()

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
                f"{self._settings.folder}: training then reads {store.path} under every engine."
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
        """Write the errors of some items into those of their shard, by a forward pass of `at_least` so many pairs."""
        if not items:
            return
        rows = [item["row"] for item in items]
        padded = items + items[:1] * (at_least - len(items))
        found = self._forward.reference_errors(self._denoiser, self._settings.to_inputs(padded), training=training)
        found = found.view(2, -1, len(padded)).permute(2, 1, 0)[: len(rows)].cpu()  # (2TB,) -> (B, T, 2)
        bad = [row for row, error in zip(rows, found, strict=True) if not error.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"Every error of the reference must be finite; those of the pairs {bad[:8]} are not. Look at these "
                "pairs, or use bf16 instead of fp16."
            )
        errors[[row - shard.pairs.start for row in rows]] = found


def repeating_pairs(dataset: Any, noise_draws: int, *, name: str, training: bool) -> PreferenceDataset:
    """Prepared pairs whose draws repeat, so that errors of a reference can be computed for all of them; `ValueError` on
    a stream."""
    if not isinstance(dataset, PreferenceDataset):
        raise ValueError(
            f"`precompute_ref_errors=True` needs pairs with numbers, and the {name} data are a stream. Use a map-style "
            "data set, or leave it off."
        )
    if not training:
        return dataset.for_evaluation() if dataset.draw_settings()["training"] else dataset
    return dataset.with_noise_draws(noise_draws)


def warn_of_repeated_draws(args: TrainingArguments, noise_draws: int, steps_of_epoch: int) -> None:
    """Say where a run takes more epochs than there are draws of each pair."""
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / steps_of_epoch
    if epochs > noise_draws:
        logger.warning(
            "`ref_noise_draws=%d`, and training takes %.3g epochs: each pair meets the same %d draws of timestep, "
            "noise, flip and crop %.3g times, where a live reference would have new ones in every epoch. "
            "`ref_noise_draws=%d` repeats none, for as many forward passes of the reference for each pair.",
            *(noise_draws, epochs, noise_draws, epochs / noise_draws, math.ceil(epochs)),
        )


def _is_for_training(dataset: PreferenceDataset) -> bool:
    return dataset.draw_settings()["training"]


class _Draws(Dataset):
    """Pairs by the number of their draw and their row, each beside its row."""

    def __init__(self, pairs: PreferenceDataset):
        self._pairs = pairs

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, dict[str, Any]]:
        draw, pair = key
        return pair, self._pairs.in_epoch(draw)[pair]


class _Waiting:
    """Items by the shapes of their tensors, until there are enough of one shape for a batch."""

    def __init__(self, size: int):
        self._size = size
        self._items: dict[Any, Items] = {}

    def add(self, item: dict[str, Any]) -> Items:
        """Add an item; a whole batch of its shape, if there is one now."""
        shape = tuple(tuple(value.shape) for value in item.values() if isinstance(value, torch.Tensor))
        waiting = self._items.setdefault(shape, [])
        waiting.append(item)
        return self._items.pop(shape) if len(waiting) == self._size else []

    def left(self) -> list[Items]:
        """What is left, in batches of one shape."""
        return list(self._items.values())
