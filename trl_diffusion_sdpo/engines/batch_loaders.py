"""Data loaders: batches stay on the host until their turn comes, generators are dealt out before they are decoded, and
there are as many workers as pay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import seed_worker

from .._compat import keeps_order, start_method
from ..data.checking import forks_by_default, usable_cores
from ..data.pairs import PreferenceDataset, PreferenceIterableDataset
from ..data.streaming import Share
from .worker_processes import WorkerStart, worker_context

if TYPE_CHECKING:
    from ..trainer.diffusion_sdpo_config import DiffusionSDPOConfig

MOST_WORKERS = 4  # decode some hundred pairs a second, more than a denoiser trains on
FEW_PAIRS = 512  # decoded in seconds
PREFETCHED = 2  # batches a worker, as in torch
SHARED_MEMORY = Path("/dev/shm")

Pairs = PreferenceDataset | PreferenceIterableDataset


class BatchLoaders:
    """Makes a trainer's data loaders.

    Args:
        args ([`DiffusionSDPOConfig`]): With the number of workers decided.
        accelerator (`Accelerator`): Knows the processes and how samplers are seeded.
        workers_are_chosen (`bool`): Whether the number of workers is `choose_workers`', which looks at the training
            data; a loader of other data then takes no more than those bear.
    """

    def __init__(self, args: DiffusionSDPOConfig, accelerator: Accelerator, *, workers_are_chosen: bool = False):
        self._args, self._accelerator, self._workers_are_chosen = args, accelerator, workers_are_chosen
        self._evaluation: dict[tuple[int, int], tuple[Pairs, DataLoader]] = {}

    def training(self, dataset: Pairs, batch_size: int, sampler: Sampler | None, collate: Callable) -> DataLoader:
        """A loader of this process's batches, shuffled by `sampler`."""
        workers = self._workers(dataset)
        seed = partial(seed_worker, num_workers=workers, rank=self._args.process_index)
        return self._make(dataset, batch_size, sampler, collate, WorkerStart(seed))

    def evaluation(
        self, dataset: Pairs, sampler: Sampler | None, collate: Callable, *, keep: bool = False
    ) -> DataLoader:
        """A loader in the data's own order; with `keep` the same one at every call."""
        key = (id(dataset), self._args.eval_batch_size)
        if key in self._evaluation:
            return self._evaluation[key][1]
        loader = self._make(dataset.for_evaluation(), self._args.eval_batch_size, sampler, collate, WorkerStart())
        if keep:
            self._evaluation[key] = dataset, loader  # the data set as well: ids are given again
        return loader

    def _make(
        self, dataset: Pairs, batch_size: int, sampler: Sampler | None, collate: Callable, start: WorkerStart
    ) -> DataLoader:
        args, accelerator = self._args, self._accelerator
        options: dict[str, Any] = {"sampler": sampler}
        workers = self._workers(dataset)
        processes: dict[str, Any] = {"torch_device_mesh": accelerator.torch_device_mesh}
        if isinstance(dataset, PreferenceIterableDataset):  # which deals out its pairs by itself
            dataset, options = dataset.for_process(self._share(dataset, batch_size)), {}
            processes = {"num_processes": 1, "process_index": 0}
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            drop_last=args.dataloader_drop_last,
            worker_init_fn=start,
            multiprocessing_context=worker_context(start_method(args)) if workers else None,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            in_order=keeps_order(args),
            **options,
        )
        # Not `Accelerator.prepare`: it keeps every loader for ever, and its loaders move each batch to the device when
        # they are asked for it, which for all micro-batches of a step is before the first one trains.
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
        return max(_least_workers(self._args), min(workers, _most_workers(dataset)))

    def _share(self, dataset: PreferenceIterableDataset, batch_size: int) -> Share:
        args = self._args
        return Share(
            args.process_index, args.world_size, batch_size, args.dataloader_drop_last, apart=dataset.is_split
        )


def choose_workers(args: DiffusionSDPOConfig, dataset: Pairs | None, *, evaluates: bool = False) -> str:
    """Set the number of DataLoader workers where it was left open.

    Args:
        args ([`DiffusionSDPOConfig`]): The settings, which are changed.
        dataset ([`PreferenceDataset`] or [`PreferenceIterableDataset`], *optional*): What is trained on.
        evaluates (`bool`): Whether there are evaluations in between, whose batches wait beside those of the training.

    Returns:
        `str`: Why so many, for the log; empty if it was given, or there is nothing to say.
    """
    if args.dataloader_num_workers is not None:
        return ""
    args.dataloader_num_workers, reason = _sensible_workers(args, dataset, evaluates)
    if args.dataloader_num_workers < _least_workers(args):
        args.dataloader_num_workers, reason = _least_workers(args), "settings of workers are given"
    return reason


def _least_workers(args: DiffusionSDPOConfig) -> int:
    """One where there are settings that torch refuses without any."""
    return int(args.dataloader_persistent_workers or args.dataloader_prefetch_factor is not None)


def _most_workers(dataset: Pairs) -> int:
    """As many as a kind of data bears: none where its class may not be copied, one for a stream, whose order and draws
    depend on their number."""
    if isinstance(dataset, PreferenceIterableDataset):
        return 1
    return MOST_WORKERS if dataset.forks else 0


def _sensible_workers(args: DiffusionSDPOConfig, dataset: Pairs | None, evaluates: bool) -> tuple[int, str]:
    """As many as the data need and the machine bears, and the reason."""
    if dataset is None or (isinstance(dataset, PreferenceDataset) and len(dataset) < FEW_PAIRS):
        return 0, ""
    if start_method(args) is None and not forks_by_default():
        return 0, "here new processes import the main module, which may not be made for it"
    most = _most_workers(dataset)
    if most == 0:
        return 0, "a data set of another class may not bear being copied into other processes"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))  # on this machine
    spare = usable_cores(processes) - 1
    room = _workers_in_shared_memory(args, processes, evaluates)
    if isinstance(dataset, PreferenceIterableDataset):
        return min(most, spare, room), "with more workers a stream's order would depend on their number"
    return min(most, spare, room), f"{spare} cores and shared memory for {room} workers are free"


def _workers_in_shared_memory(args: DiffusionSDPOConfig, processes: int, evaluates: bool) -> int:
    """How many workers' batches fit into this process's part of half of the shared memory that is free, which
    containers often have little of. During an evaluation the training's batches wait there as well."""
    if not SHARED_MEMORY.is_dir():
        return MOST_WORKERS
    sides = (args.resolution,) if isinstance(args.resolution, int) else args.resolution
    pairs = args.train_batch_size + (args.eval_batch_size if evaluates else 0)
    batches = 1 + (PREFETCHED if args.dataloader_prefetch_factor is None else args.dataloader_prefetch_factor)
    worker = batches * 2 * pairs * 3 * sides[0] * sides[-1]  # bytes
    return shutil.disk_usage(SHARED_MEMORY).free // (2 * processes * worker)
