"""Data loaders of the trainer, whose batches stay on the host, and the number of their workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from ..data.dataset import PreferenceDataset
from ..data.streaming import PreferenceIterableDataset, Share
from ..utils._compat import keeps_order, start_method
from ..utils.processes import forks_by_default, usable_cores
from .worker_processes import CollateIntoSharedMemory, WorkerStart, worker_context

MAX_WORKERS = 4  # four workers decode some hundred pairs a second, more than a denoiser trains on
MAX_READERS = 8  # workers of passes before training, when items are only encoded
FEW_PAIRS = 512  # the main process decodes fewer pairs than this in seconds
PREFETCH_FACTOR = 2  # torch's default
SHARED_MEMORY = Path("/dev/shm")

Pairs = PreferenceDataset | PreferenceIterableDataset


@dataclass
class CollateAfterResuming:
    """Collator of a stream that starts at a position. Batches before the position are empty. accelerate skips them."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> Any:
        return {} if items[0] is None else self.collate(items)


class BatchLoaders:
    """Maker of a trainer's data loaders. If [`choose_workers`] set the number of workers (`workers_are_chosen`),
    loaders of other data may have fewer workers."""

    def __init__(self, args: TrainingArguments, accelerator: Accelerator, *, workers_are_chosen: bool = False):
        self._args = args
        self._accelerator = accelerator
        self._workers_are_chosen = workers_are_chosen
        self._evaluation: dict[tuple[int, int], tuple[Pairs, DataLoader]] = {}

    def training(self, dataset: Pairs, batch_size: int, sampler: Sampler | None, collate: Callable) -> DataLoader:
        """Return a loader of this process's batches, in the order of `sampler`."""
        workers = self._workers(dataset)
        seed = partial(seed_worker, num_workers=workers, rank=self._args.process_index)
        if isinstance(dataset, PreferenceIterableDataset):
            collate = CollateAfterResuming(collate)
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
            self._evaluation[key] = dataset, loader  # the data set as well, because its id must not be reused
        return loader

    def in_batches(self, items: Dataset, batches: Sequence[Sequence[Any]], pairs: Pairs) -> DataLoader:
        """Return a loader of lists of items in this process alone, by batches of keys. `items` reads `pairs`."""
        options: dict[str, Any] = {"batch_sampler": batches, "collate_fn": list}
        return _plain_loader(self._args, items, self._workers(pairs), **options)

    def _make(
        self, dataset: Pairs, batch_size: int, sampler: Sampler | None, collate: Callable, start: WorkerStart
    ) -> DataLoader:
        args, accelerator = self._args, self._accelerator
        workers = self._workers(dataset)
        options: dict[str, Any] = {"sampler": sampler}
        processes: dict[str, Any] = {"torch_device_mesh": accelerator.torch_device_mesh}
        if isinstance(dataset, PreferenceIterableDataset):  # takes this process's share of the pairs itself
            dataset, options = dataset.for_process(Share(args.process_index, args.world_size)), {}
            processes = {"num_processes": 1, "process_index": 0}
        loader = _plain_loader(
            args,
            dataset,
            workers,
            start,
            batch_size=batch_size,
            collate_fn=collate,
            pin_memory=args.dataloader_pin_memory,
            drop_last=args.dataloader_drop_last,
            persistent_workers=args.dataloader_persistent_workers,
            in_order=keeps_order(args),
            **options,
        )
        # Not `Accelerator.prepare`: it keeps a reference to every loader, and its loaders move a batch to the device
        # when it is fetched, while the batch before it still trains.
        return prepare_data_loader(
            loader,
            put_on_device=False,
            split_batches=accelerator.split_batches,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
            **processes,
        )

    def _workers(self, dataset: Pairs) -> int:
        workers = self._args.dataloader_num_workers
        if not self._workers_are_chosen:
            return workers
        return max(_min_workers(self._args), min(workers, _max_workers(dataset)))


def load_one_by_one(args: TrainingArguments, items: Dataset, pairs: PreferenceDataset, item_bytes: int) -> DataLoader:
    """Return a loader of single items in their order, in this process alone.

    Args:
        items (`Dataset`): Reads `pairs`.
        item_bytes (`int`): Size of an item's tensors. Workers hold some items in shared memory.
    """
    workers = args.dataloader_num_workers
    if workers is None:
        chosen, _ = _workers_and_reason(args, pairs, item_bytes, most=MAX_READERS)
        workers = max(_min_workers(args), chosen)
    return _plain_loader(args, items, workers, batch_size=None)


def _plain_loader(
    args: TrainingArguments, items: Dataset, workers: int, start: WorkerStart | None = None, **options: Any
) -> DataLoader:
    collate = options.pop("collate_fn", default_convert)
    return DataLoader(
        items,
        num_workers=workers,
        collate_fn=CollateIntoSharedMemory(collate) if workers else collate,
        worker_init_fn=start or WorkerStart(),
        multiprocessing_context=worker_context(start_method(args)) if workers else None,
        prefetch_factor=args.dataloader_prefetch_factor,
        **options,
    )


def choose_workers(
    args: TrainingArguments,
    dataset: Pairs | None,
    *,
    resolution: tuple[int, int],
    evaluates: bool = False,
) -> str:
    """Set `args.dataloader_num_workers` by the training data if it is `None`.

    Args:
        resolution (`tuple[int, int]`): Height and width of the images in a batch.
        evaluates (`bool`): Whether evaluations interrupt training, while its prefetched batches stay in memory.

    Returns:
        `str`: The reason, for the log. It is empty if the user has set the number, or for small data.
    """
    if args.dataloader_num_workers is not None:
        return ""
    pairs = args.train_batch_size + (args.eval_batch_size if evaluates else 0)
    batch_bytes = 2 * pairs * 3 * resolution[0] * resolution[1]
    args.dataloader_num_workers, reason = _workers_and_reason(args, dataset, batch_bytes)
    if args.dataloader_num_workers < _min_workers(args):
        args.dataloader_num_workers, reason = _min_workers(args), "other settings of workers are set"
    return reason


def _min_workers(args: TrainingArguments) -> int:
    """Return 1 if there are settings that torch refuses without workers."""
    return int(args.dataloader_persistent_workers or args.dataloader_prefetch_factor is not None)


def _max_workers(dataset: Pairs, most: int = MAX_WORKERS) -> int:
    """Return one for a stream, because its order depends on their number."""
    return 1 if isinstance(dataset, PreferenceIterableDataset) else most


def _workers_and_reason(
    args: TrainingArguments, dataset: Pairs | None, batch_bytes: int, most: int = MAX_WORKERS
) -> tuple[int, str]:
    """Return a number of workers that the data need and the machine has room for, and the reason."""
    if dataset is None or (isinstance(dataset, PreferenceDataset) and len(dataset) < FEW_PAIRS):
        return 0, ""
    if start_method(args) is None and not forks_by_default():
        return 0, (
            "on this platform, workers re-import the main script. To use workers, put the training call under `if "
            "__name__ == '__main__':`, and set `dataloader_num_workers`"
        )
    most = _max_workers(dataset, most)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))  # on this machine
    spare = usable_cores(processes) - 1
    room = _workers_in_shared_memory(args, processes, batch_bytes)
    if isinstance(dataset, PreferenceIterableDataset):
        return min(most, spare, room), "the order of a stream depends on the number of workers"
    return min(most, spare, room), f"{spare} cores and shared memory for {room} workers are free"


def _workers_in_shared_memory(args: TrainingArguments, processes: int, batch_bytes: int) -> int:
    """Return the number of workers whose prefetched batches fit into half of the free shared memory, for each process
    of this machine. Containers often have little of it."""
    if not SHARED_MEMORY.is_dir():
        return MAX_READERS
    prefetched = args.dataloader_prefetch_factor
    batches = 1 + (PREFETCH_FACTOR if prefetched is None else prefetched)
    return shutil.disk_usage(SHARED_MEMORY).free // (2 * processes * batches * batch_bytes)
