"""The way of the data into the trainer: prepared as pairs, checked against the batch size, loaded, moved to the
device one micro-batch at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._compat import is_split_by_node
from ..data.checking import ALONE, Peers
from ..data.pairs import PreferenceDataset, PreferenceIterableDataset, prepare_dataset
from ..data.transforms import PairTransform
from ..losses import LossSpec
from .diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

PREPARED = (PreferenceDataset, PreferenceIterableDataset)
BATCH_COLUMNS = ["rows", "pixel_values", "prompts", "original_sizes", "crop_top_lefts", "seeds", "scores"]


class DataLoadingMixin:
    """Overrides of [`~transformers.Trainer`] that concern data; what they need of the trainer's own is `_loaders`, a
    [`BatchLoaders`]."""

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`, got none.")
        sampler = self._get_train_sampler(self.train_dataset)
        return self._loaders.training(self.train_dataset, self._train_batch_size, sampler, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The loader of a data set for evaluation; of the trainer's own sets, given by name or as they are, it is the
        same at every call."""
        own = list(self.eval_dataset.values()) if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        if eval_dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`, got none.")
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        prepared = self._prepare(eval_dataset, self.args, name="eval", training=False)
        keep = any(prepared is part for part in own)
        return self._loaders.evaluation(prepared, self._get_eval_sampler(prepared), self.data_collator, keep=keep)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        prepared = self._prepare(test_dataset, self.args, name="test", training=False)
        return self._loaders.evaluation(prepared, self._get_eval_sampler(prepared), self.data_collator)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device. Until now it was on the host: of a step's micro-batches only the one whose turn it is
        takes memory on the device."""
        return super()._prepare_inputs(on_device(inputs, self.args.device))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = BATCH_COLUMNS

    def _prepare(self, dataset: Any, args: DiffusionSDPOConfig, *, name: str, training: bool) -> Any:
        return prepare_pairs(dataset, args, self.loss_spec, name=name, training=training)

    def _prepare_eval(self, dataset: Any, args: DiffusionSDPOConfig) -> Any:
        if isinstance(dataset, dict):
            return {name: self._prepare(part, args, name=name, training=False) for name, part in dataset.items()}
        return self._prepare(dataset, args, name="eval", training=False)


class DataReportCallback(TrainerCallback):
    """Says at the end of training what became of the data, where more bad pairs were found on the way.

    Args:
        dataset ([`PreferenceDataset`] or [`PreferenceIterableDataset`]): What was trained on.
    """

    def __init__(self, dataset: PreferenceDataset | PreferenceIterableDataset):
        self._dataset = dataset
        self._known = int(dataset.found_late.sum()) if isinstance(dataset, PreferenceDataset) else 0

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        late = 0
        if isinstance(self._dataset, PreferenceDataset):
            bad = self._dataset.found_late
            for found in _peers(args).gather(torch.nonzero(bad).flatten().tolist()):
                bad[found] = 1
            self._dataset.mark_late(bad)
            late = int(bad.sum()) - self._known
        else:
            late = self._dataset.report.dropped
        if late and state.is_world_process_zero:
            logger.warning("Bad pairs were found in training. %s", self._dataset.report)


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device. From pinned memory they are copied while the host goes on, and the device
    finishes what it has to do."""
    waits = device.type == "mps"  # which pins none
    return {
        name: value.to(device, non_blocking=not waits) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def prepare_pairs(dataset: Any, args: DiffusionSDPOConfig, loss: LossSpec, *, name: str, training: bool) -> Any:
    """A user's data as a torch data set of pairs; one that is prepared already, or `None`, as it is. All processes
    prepare all of it, but for the check of the images, which they share; none waits
    for another longer than their shares differ in time.

    Raises:
        `ValueError`: If the data are in no known format, none are left, the loss needs scores that are not there, or
            several processes are to evaluate on parts of a stream that may differ in length.
    """
    if dataset is None or isinstance(dataset, PREPARED):
        if not training:
            _refuse_parts(dataset, args, name)
        return dataset
    transform = PairTransform(
        args.resolution,
        center_crop=not (training and args.random_crop),
        random_flip=training and args.random_flip,
        interpolation=args.image_interpolation,
    )
    prepared = prepare_dataset(
        dataset,
        transform=transform,
        prompt_dropout=args.proportion_empty_prompts if training else 0.0,
        seed=args.seed if args.data_seed is None else args.data_seed,
        dataset_format=args.dataset_format,
        on_bad_row=args.on_bad_row,
        verify_images=args.verify_images,
        num_proc=args.dataset_num_proc,
        image_schemes=args.image_schemes,
        peers=_peers(args),
        compare=loss.uses_loser,
        training=training,
        repeat=training,
        use_scores=loss.needs_scores,
        name=name,
    )
    if isinstance(prepared, PreferenceIterableDataset):
        prepared.is_split = is_split_by_node(dataset)
        if not training:
            _refuse_parts(prepared, args, name)
    if loss.needs_scores and not prepared.has_scores:
        raise ValueError(
            f"The loss {args.loss_type!r} needs score columns (`chosen_score`, `rejected_score`), and the {name} data "
            "has none. Score the images first, or choose another loss."
        )
    return prepared


def _refuse_parts(dataset: Any, args: DiffusionSDPOConfig, name: str) -> None:
    """Raise `ValueError` where processes would evaluate on parts of a stream: a part that has fewer batches than
    another leaves its process out of the others' exchanges, and they would wait for ever."""
    if isinstance(dataset, PreferenceIterableDataset) and dataset.is_split and args.world_size > 1:
        raise ValueError(
            f"The {name} data are a stream that `split_dataset_by_node` has given {args.world_size} processes parts "
            "of, and an evaluation needs as many batches in each. Pass the stream as it was before: it is dealt out "
            "evenly."
        )


def check_batches(dataset: PreferenceDataset | PreferenceIterableDataset | None, args: DiffusionSDPOConfig) -> None:
    """Say where a step cannot have as many pairs as was asked for, as there are fewer.

    Raises:
        `ValueError`: If an epoch would not have a single batch.
    """
    if not isinstance(dataset, PreferenceDataset):
        return
    pairs, batch, processes = len(dataset), args.train_batch_size, args.world_size
    parts = f"{args.per_device_train_batch_size} pairs a device"
    parts += f" on {processes} processes" if processes > 1 else ""
    if args.dataloader_drop_last and pairs < batch * processes:
        raise ValueError(
            f"`dataloader_drop_last=True` leaves no batch: {parts} are {batch * processes}, and the training data are "
            f"{pairs} pairs. Use a smaller `per_device_train_batch_size`, or keep the last batch."
        )
    if pairs < batch * processes:
        logger.warning(
            "A batch is larger than the training data: %s are %d, and there are %d pairs. Every batch is the whole "
            "data%s.",
            *(parts, batch * processes, pairs, ", some pairs twice" if processes > 1 else ""),
        )
    step = batch * processes * args.gradient_accumulation_steps
    if args.gradient_accumulation_steps > 1 and pairs < step:
        batches = -(-pairs // (batch * processes))
        logger.warning(
            "An optimizer step is larger than the training data: %s over %d accumulation steps are %d, and there are "
            "%d pairs. Every step is one epoch of %d micro-batches.",
            *(parts, args.gradient_accumulation_steps, step, pairs, batches),
        )


def _peers(args: TrainingArguments) -> Peers:
    """The processes of this training."""
    if args.world_size == 1:
        return ALONE
    return Peers(args.process_index, args.world_size, lambda value: gather_object([value]))
