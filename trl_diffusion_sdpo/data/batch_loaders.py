"""The trainer's data loaders, which leave batches on the CPU, and the choice of their workers."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from ..utils._compat import keeps_order, start_method
from ..utils.processes import Peers, forks_by_default, usable_cores
from .dataset import PreferenceDataset
from .pairs import Pairs
from .stream_position import READ
from .streaming import PreferenceIterableDataset
from .worker_processes import CollateIntoSharedMemory, WorkerStart

logger = logging.getLogger(__name__)

MAX_WORKERS = 4  # they decode a few hundred pairs per second, more than a denoiser trains on
MAX_READERS = 8  # most workers while pairs are encoded before training
FEW_PAIRS = 512  # the main process decodes fewer pairs in seconds
LISTED_PAIRS = 2**16  # of an epoch's order, at once
PREFETCH_FACTOR = 2  # batches that each worker prepares in advance, torch's default
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class CollateStream:
    """Collator for a stream in training, whose batches say how far the stream has been read. Batches before the
    position from which the stream resumes become empty dictionaries, which accelerate skips."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> Any:
        if items[0] is None:
            return {}
        return {**self.collate(items), READ: items[-1][READ]}


class SeededSampler(Sampler[int]):
    """All pairs in a random order of each epoch, that of accelerate's `SeedableRandomSampler`, which would hold a list
    of them all: 400 MB for ten million pairs.

    Args:
        pairs (`int`): Number of pairs.
        seed (`int`): Seed of the first epoch.
    """

    def __init__(self, pairs: int, seed: int) -> None:
        self._pairs = pairs
        self.initial_seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._pairs

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._pairs, generator=torch.Generator().manual_seed(self.initial_seed + self.epoch))
        for part in order.split(LISTED_PAIRS):
            yield from part.tolist()
        self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class BatchLoaders:
    """Creates the data loaders of a trainer."""

    def __init__(self, args: TrainingArguments, accelerator: Accelerator):
        self._args = args
        self._accelerator = accelerator
        self._evaluation: dict[tuple[int, int], tuple[Pairs, DataLoader]] = {}

    def training(self, dataset: Pairs, batch_size: int, sampler: Sampler | None, collate: Callable) -> DataLoader:
        """Return a loader of this process's training batches, with pairs in the order of `sampler`."""
        seed = partial(seed_worker, num_workers=self._args.dataloader_num_workers, rank=self._args.process_index)
        if isinstance(dataset, PreferenceIterableDataset):
            collate = CollateStream(collate)
        elif isinstance(dataset, PreferenceDataset) and self._args.process_index == 0:
            warn_of_large_steps(len(dataset), batch_size, self._args)
        return self._make(dataset, batch_size, sampler, collate, WorkerStart(seed))

    def evaluation(
        self, dataset: Pairs, sampler: Sampler | None, collate: Callable, *, keep: bool = False
    ) -> DataLoader:
        """Return a loader for evaluation. With `keep`, later calls with this data set return it again."""
        key = (id(dataset), self._args.eval_batch_size)
        if key in self._evaluation:
            return self._evaluation[key][1]
        loader = self._make(dataset.for_evaluation(), self._args.eval_batch_size, sampler, collate, WorkerStart())
        if keep:
            self._evaluation[key] = dataset, loader  # with the data set, so that no other object gets its id
        return loader

    def in_batches(self, items: Dataset, batches: Sequence[Sequence[Any]]) -> DataLoader:
        """Return a loader that does not distribute items over processes. For each list of keys in `batches`, it returns
        the list of `items` with these keys."""
        workers = self._args.dataloader_num_workers
        return _plain_loader(self._args, items, workers, batch_sampler=batches, collate_fn=list)

    def _make(
        self, dataset: Pairs, batch_size: int, sampler: Sampler | None, collate: Callable, start: WorkerStart
    ) -> DataLoader:
        args = self._args
        accelerator = self._accelerator
        if isinstance(dataset, PreferenceIterableDataset):  # a stream selects this process's share itself
            dataset = dataset.for_process(Peers(args.process_index, args.world_size))
        data_seed = accelerator.dataloader_config.data_seed
        if isinstance(sampler, RandomSampler) and accelerator.use_seedable_sampler:
            sampler = SeededSampler(len(sampler), args.seed if data_seed is None else data_seed)
        loader = _plain_loader(
            args,
            dataset,
            args.dataloader_num_workers,
            start,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            pin_memory=args.dataloader_pin_memory,
            drop_last=args.dataloader_drop_last,
            persistent_workers=args.dataloader_persistent_workers,
            in_order=keeps_order(args),
        )
        # Not `Accelerator.prepare`: it keeps a reference to every loader, and its loaders move a batch to the device
        # while the previous one still trains.
        return prepare_data_loader(
            loader,
            num_processes=1 if dataset.is_stream else None,
            process_index=0 if dataset.is_stream else None,
            torch_device_mesh=None if dataset.is_stream else accelerator.torch_device_mesh,
            put_on_device=False,
            split_batches=accelerator.split_batches,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=data_seed,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )


def warn_of_large_steps(pairs: int, batch_size: int, args: TrainingArguments) -> None:
    """Warn if a batch or an optimizer step takes more pairs than there are, so that it takes fewer than it is set to,
    or some of them twice."""
    batch = batch_size * args.world_size
    step = batch * args.gradient_accumulation_steps
    if pairs < step:
        logger.warning(
            "%s of %d pairs is larger than the training data, which have %d pairs, so every step is one epoch. Lower "
            "`per_device_train_batch_size` or `gradient_accumulation_steps`, or add pairs.",
            "A batch" if pairs < batch else "An optimizer step",
            batch if pairs < batch else step,
            pairs,
        )


def load_one_by_one(args: TrainingArguments, items: Dataset, pairs: PreferenceDataset, item_bytes: int) -> DataLoader:
    """Return a loader of all `items` one by one and in order, not distributed over processes.

    Args:
        items (`Dataset`): Data set whose items are read from `pairs`.
        item_bytes (`int`): Size of an item's tensors in bytes. Larger items allow fewer workers, which hold them in
            shared memory.
    """
    workers = args.dataloader_num_workers
    if workers is None:
        workers = max(_min_workers(args), _suitable_workers(args, pairs, item_bytes, most=MAX_READERS))
    return _plain_loader(args, items, workers, batch_size=None, collate_fn=_unchanged)


def _unchanged(item: Any) -> Any:
    return item


def _plain_loader(
    args: TrainingArguments,
    items: Dataset,
    workers: int,
    start: WorkerStart | None = None,
    *,
    collate_fn: Callable,
    **options: Any,
) -> DataLoader:
    return DataLoader(
        items,
        num_workers=workers,
        collate_fn=CollateIntoSharedMemory(collate_fn) if workers else collate_fn,
        worker_init_fn=start or WorkerStart(),
        multiprocessing_context=start_method(args) if workers else None,
        prefetch_factor=args.dataloader_prefetch_factor,
        **options,
    )


def choose_workers(
    args: TrainingArguments,
    dataset: Pairs | None,
    *,
    resolution: tuple[int, int],
    evaluates: bool = False,
) -> None:
    """Choose `args.dataloader_num_workers` for the training data, and log it.

    Args:
        resolution (`tuple[int, int]`): Height and width of the images in a batch.
        evaluates (`bool`): Whether there are evaluations during training, in which the prefetched batches of training
            stay in memory.
    """
    pairs = args.train_batch_size + (args.eval_batch_size if evaluates else 0)
    batch_bytes = 2 * pairs * 3 * resolution[0] * resolution[1]
    workers = max(_min_workers(args), _suitable_workers(args, dataset, batch_bytes))
    args.dataloader_num_workers = workers
    logger.info("`dataloader_num_workers` is unset: the trainer uses %d.", workers)


def _min_workers(args: TrainingArguments) -> int:
    """Return 1 if an option is set that torch refuses without workers, else 0."""
    return int(args.dataloader_persistent_workers or args.dataloader_prefetch_factor is not None)


def _suitable_workers(
    args: TrainingArguments, dataset: Pairs | None, batch_bytes: int, most: int = MAX_WORKERS
) -> int:
    if dataset is None or (isinstance(dataset, PreferenceDataset) and len(dataset) < FEW_PAIRS):
        return 0
    if start_method(args) is None and not forks_by_default():
        return 0  # workers would re-import the main script, which may not be written for it
    if dataset.is_stream:
        most = 1  # more workers would change the order of the pairs
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))  # on this machine
    return min(most, usable_cores(processes) - 1, _workers_in_shared_memory(args, processes, batch_bytes))


def _workers_in_shared_memory(args: TrainingArguments, processes: int, batch_bytes: int) -> int:
    """Return how many workers each process of this machine can have, with prefetched batches in half of the free shared
    memory, of which containers often have little."""
    if not SHARED_MEMORY.is_dir():
        return MAX_READERS
    prefetched = args.dataloader_prefetch_factor
    batches = 1 + (PREFETCH_FACTOR if prefetched is None else prefetched)
    return shutil.disk_usage(SHARED_MEMORY).free // (2 * processes * batches * batch_bytes)
