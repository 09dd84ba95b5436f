"""A user's data as pairs: prepared, checked against the batch size, and loaded one micro-batch at a time."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments

from ..cache.encoding import PairEncoding, check_prompt_padding
from ..cache.reference_errors import ReferenceErrors, repeating_pairs, warn_of_repeated_draws
from ..data.buckets import AspectRatioBuckets, BucketSampler
from ..data.pair_scores import ScoreSettings
from ..data.pairs import PairOptions, PreferenceDataset, PreferenceIterableDataset, prepare_dataset
from ..data.sources import PairMixture
from ..data.transforms import PairTransform
from ..engines.batch_loaders import BatchLoaders, LazyBatches, choose_workers
from ..engines.processes import check_agreement, peers
from ..families import Family
from ..losses import LossSpec
from ..models.text_checks import note_on_long_prompts
from ..step.winner_budget import ProbeInputs, probe_inputs, probe_items
from ..utils._compat import keeps_order
from .diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

POSITION_FILE = "stream_position_{}.json"  # in a checkpoint, of each process
CHECKED_PROMPTS = 10_000  # pairs whose prompts are counted by their lengths
PREPARED = (PreferenceDataset, PreferenceIterableDataset)
BATCH_COLUMNS = [
    *("rows", "pixel_values", "prompts", "original_sizes", "crop_top_lefts", "seeds", "scores", "ref_errors"),
    "pair_weights",
    *("moments", "target_size", "conditioning", "host_conditioning"),  # of pairs that were encoded before
    "counted",
]


class DataOverrides(Trainer):
    """Overrides of [`~transformers.Trainer`] that concern data."""

    args: DiffusionSDPOConfig
    loss_spec: LossSpec
    family: Family
    train_dataset: Any
    encoding: PairEncoding | None
    _has_eval_data: bool
    _loaders: BatchLoaders
    _own_pairs: WeakSet  # data sets whose moments and errors of the reference are this trainer's
    _own_copies: WeakKeyDictionary  # such ones that are evaluated, by the prepared pairs that a user gave
    _reference_errors: ReferenceErrors | None  # where they are computed before training
    _signature_columns: Any

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`, got none.")
        sampler = self._get_train_sampler(self.train_dataset)
        return self._loaders.training(self.train_dataset, self._train_batch_size, sampler, self.data_collator)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[Any, None]:
        """Return the micro-batches of an optimizer step, each of which is loaded in its turn. transformers would load
        all of them first. Those of a stream are loaded first, because a stream does not say when it ends. The number of
        items is `None`, because losses are means over pairs."""
        if isinstance(self.train_dataset, PreferenceDataset):
            return LazyBatches(epoch_iterator, num_batches), None
        return list(islice(epoch_iterator, num_batches)), None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The loader of an evaluation's data; the same one at every call for a data set of the trainer's, given by name
        or object."""
        own = list(self.eval_dataset.values()) if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if eval_dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`, got none.")
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        prepared = self._prepare_pairs(eval_dataset, self.args, name="eval", training=False)
        prepared = self._with_reference_errors(prepared)
        keep = any(prepared is dataset for dataset in own)
        return self._loaders.evaluation(prepared, self._get_eval_sampler(prepared), self.data_collator, keep=keep)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        prepared = self._prepare_pairs(test_dataset, self.args, name="test", training=False)
        prepared = self._with_reference_errors(prepared)
        return self._loaders.evaluation(prepared, self._get_eval_sampler(prepared), self.data_collator)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, PreferenceDataset) or dataset.sizes is None:
            return super()._get_train_sampler(train_dataset)
        return BucketSampler(
            dataset.sizes,
            pairs_of_a_step(self.args, self._train_batch_size),
            seed=dataset.seed,
            epoch=(lambda: dataset.epoch) if self.args.train_sampling_strategy == "random" else None,
            drop_last=self.args.dataloader_drop_last,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        if not isinstance(eval_dataset, PreferenceDataset) or eval_dataset.sizes is None:
            return super()._get_eval_sampler(eval_dataset)
        group = pairs_of_a_step(self.args, self.args.eval_batch_size)
        return BucketSampler(eval_dataset.sizes, group, seed=eval_dataset.seed)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device. The loaders leave it on the host, so that only the current micro-batch of a step takes
        memory on the device. Under DeepSpeed, transformers would also round scores, errors and moments to the dtype of
        the weights."""
        return on_device(inputs, self.args.device)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, PreferenceIterableDataset):
            batches = self.state.global_step * self.args.gradient_accumulation_steps
            save_position(self.train_dataset, self.args, batches, Path(output_dir))

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args)
        if isinstance(self.train_dataset, PreferenceIterableDataset):
            checkpoint = args[3]
            load_position(self.train_dataset, self.args, batches, None if checkpoint is None else Path(checkpoint))
        return epochs, batches

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = BATCH_COLUMNS

    def _prepare_pairs(self, dataset: Any, args: DiffusionSDPOConfig, *, name: str, training: bool) -> Any:
        if not training and isinstance(dataset, PreferenceDataset) and dataset in self._own_copies:
            return self._own_copies[dataset]
        prepared = prepare_pairs(dataset, args, self.loss_spec, name=name, training=training)
        if prepared is None:
            return None
        is_given = prepared is dataset and isinstance(prepared, PreferenceDataset) and prepared not in self._own_pairs
        if isinstance(prepared, PreferenceDataset) and prepared not in self._own_pairs:
            self._count_long_prompts(prepared, name)
        if is_given:
            prepared = prepared.from_source()  # what it reads was computed for another trainer, or nothing was
        if args.precompute_ref_errors:
            prepared = repeating_pairs(prepared, args.ref_noise_draws, name=name, training=training)
        if self.encoding is not None:
            epochs = self._encoded_epochs(prepared, args) if training else 0
            self.encoding.add_to(prepared, name, epochs=epochs, compare=self.loss_spec.uses_loser)
        self._own_pairs.add(prepared)
        if is_given and not training:
            self._own_copies[dataset] = prepared
        return prepared

    def _count_long_prompts(self, pairs: PreferenceDataset, name: str) -> None:
        """Add the number of prompts that a tokenizer truncates to the report of the data, and log it."""
        few = pairs if len(pairs) <= CHECKED_PROMPTS else pairs.first(CHECKED_PROMPTS)
        note = note_on_long_prompts(self.family, few.prompts())
        if note:
            pairs.add_note(note)
            logger.warning("%s data: %s", name, note)

    def _encoded_epochs(self, dataset: Any, args: DiffusionSDPOConfig) -> int | None:
        """Epochs whose flips are encoded; `None` for all flips. The winner budget's probe needs plain images."""
        probes_training = args.winner_budget is not None and not self._has_eval_data
        return None if probes_training else epochs_of_training(args, dataset)

    def _prepare_eval_pairs(self, dataset: Any, args: DiffusionSDPOConfig) -> Any:
        if isinstance(dataset, dict):
            return {name: self._prepare_pairs(part, args, name=name, training=False) for name, part in dataset.items()}
        return self._prepare_pairs(dataset, args, name="eval", training=False)

    def _prepare_data(self, train_dataset: Any, eval_dataset: Any, args: DiffusionSDPOConfig) -> tuple[Any, Any]:
        """Both data sets as pairs; sets `args.dataloader_num_workers` if it is `None`."""
        # Processes prepare data together, and one that prepared other data would wait for what nobody sends.
        check_agreement({"train_dataset": outline(train_dataset), "eval_dataset": outline(eval_dataset)})
        self._has_eval_data = eval_dataset is not None
        train_dataset = self._prepare_pairs(train_dataset, args, name="train", training=True)
        eval_dataset = self._prepare_eval_pairs(eval_dataset, args)
        check_batches(train_dataset, args)
        if isinstance(train_dataset, PreferenceDataset):
            step = pairs_of_a_step(args, args.train_batch_size) * args.gradient_accumulation_steps
            steps_of_epoch = -(-len(train_dataset) // step)
            if args.precompute_ref_errors:
                warn_of_repeated_draws(args, args.ref_noise_draws, steps_of_epoch)
        evaluates = eval_dataset is not None
        if reason := choose_workers(args, train_dataset, resolution=args.resolution, evaluates=evaluates):
            logger.warning("Chosen: dataloader_num_workers=%d (%s).", args.dataloader_num_workers, reason)
        return train_dataset, eval_dataset

    def precompute_reference_errors(self) -> None:
        """Compute the reference's errors on the training and evaluation data, those that are not stored yet, and free
        the reference, with `precompute_ref_errors=True`. `train` calls it; all processes must call it together."""
        if self._reference_errors is None:
            return
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for dataset in (self.train_dataset, *evaluated.values()):
            if dataset is not None:
                self._with_reference_errors(dataset)
        self._reference_errors.release()

    def _with_reference_errors(self, dataset: Any) -> Any:
        """The data set, whose items carry the reference's errors where these are computed before training."""
        if self._reference_errors is not None and not dataset.has_reference_errors:
            check_prompt_padding("precompute_ref_errors", self.family, largest_batch(self.args))
            self._reference_errors.add_to(dataset)
        return dataset

    def _load_probe(self) -> list[ProbeInputs]:
        """This process's pairs of the winner budget's probe."""
        if self.eval_dataset is None:
            logger.warning("`winner_budget` is measured on training pairs, as there is no `eval_dataset`.")
        if self.loss_spec.anchor == "error":
            logger.warning(
                "Under the loss %r a winner's own branch can raise its error: noise bins over the budget may stay over "
                "it although their losers' gradients are scaled to 0.",
                self.args.loss_type,
            )
        data = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        batch_size = 2 * (self._train_batch_size or self.args.per_device_train_batch_size)
        if self.encoding is not None and self.family.prompt_padding == "start":
            batch_size = 1  # prompts were encoded alone, and padding would change them
        return probe_inputs(
            probe_items(data, self.args.winner_budget_pairs),
            batch_size,
            lambda items: self._prepare_inputs(self.data_collator(items)),
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )


def outline(dataset: Any) -> Any:
    """What can be told of data before they are read: kind, number of rows and columns, of each of several sets."""
    if isinstance(dataset, PairMixture):
        dataset = dataset.parts
    if isinstance(dataset, Mapping):
        return {name: outline(part) for name, part in dataset.items()}
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    return [type(dataset).__name__, rows, getattr(dataset, "column_names", None)]


def _reading(args: TrainingArguments) -> list[int]:
    """What a position in a stream depends on beside the stream."""
    return [args.train_batch_size, args.world_size, args.dataloader_num_workers]


def save_position(stream: PreferenceIterableDataset, args: TrainingArguments, batches: int, folder: Path) -> None:
    """Write where this process has read to in a stream, after so many batches, into a checkpoint."""
    position = None
    if keeps_order(args):
        position = stream.position(batches, args.dataloader_num_workers, args.world_size)
    if position is not None:
        content = {"batches": batches, "reading": _reading(args), "position": position}
        (folder / POSITION_FILE.format(args.process_index)).write_text(json.dumps(content))


def load_position(
    stream: PreferenceIterableDataset, args: TrainingArguments, batches: int, checkpoint: Path | None
) -> None:
    """Let a stream continue where the checkpoint's run has read to. Without a position, or under another number of
    processes, workers or pairs in a batch, the batches that were trained on are read again and discarded."""
    stream.resume_at(None)
    file = None if checkpoint is None else checkpoint / POSITION_FILE.format(args.process_index)
    if file is None or batches == 0:
        return
    content = json.loads(file.read_text()) if file.is_file() else {}
    if content.get("batches") == batches and content.get("reading") == _reading(args):
        stream.resume_at(content["position"])
        return
    logger.warning(
        "The checkpoint has no position in the stream for %d batches of %d pairs, %d processes and %d workers: the "
        "batches that were trained on are read and decoded again.",
        *(batches, *_reading(args)),
    )


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device; from pinned memory, by asynchronous copies."""
    waits = device.type == "mps"  # which has no pinned memory
    return {
        name: value.to(device, non_blocking=not waits)
        if isinstance(value, torch.Tensor)
        else on_device(value, device)
        if isinstance(value, Mapping)
        else value
        for name, value in inputs.items()
    }


def aspect_ratio_buckets(args: DiffusionSDPOConfig) -> AspectRatioBuckets | None:
    """The sizes that pairs are trained at; `None` if at `args.resolution`, which is set."""
    if not args.aspect_ratio_buckets:
        return None
    sides = cast(Any, [args.resolution] if isinstance(args.resolution, int) else args.resolution)
    return AspectRatioBuckets((sides[0], sides[-1]), args.bucket_step, args.bucket_max_aspect_ratio)


def pairs_of_a_step(args: TrainingArguments, batch_size: int) -> int:
    """Pairs of the batches that all processes have at the same time."""
    shared = bool(cast(Any, args.accelerator_config).split_batches)
    return batch_size * (1 if shared else args.world_size)


def largest_batch(args: TrainingArguments) -> int:
    """Pairs of the largest batch in training and evaluation."""
    return max(args.per_device_train_batch_size, args.per_device_eval_batch_size)


def epochs_of_training(args: DiffusionSDPOConfig, dataset: Any) -> int | None:
    """Return an upper bound of the epochs whose draws training reads; `None` if it is not known."""
    if args.precompute_ref_errors:
        return args.ref_noise_draws
    if not isinstance(dataset, PreferenceDataset):
        return None
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    if dataset.sizes is not None:  # buckets may leave out pairs of an epoch
        return None
    batches = len(dataset) // pairs_of_a_step(args, args.train_batch_size)
    return math.ceil(args.max_steps / max(1, batches // args.gradient_accumulation_steps))


def prepare_pairs(dataset: Any, args: DiffusionSDPOConfig, loss: LossSpec, *, name: str, training: bool) -> Any:
    """A user's data as a torch data set of pairs; one that is prepared already, or `None`, unchanged. All processes
    prepare all of it, but share the check of the images.

    Raises:
        `ValueError`: If the data are in no known format, none are left, the loss needs scores that are not there, or
            several processes are to evaluate on parts of a stream that may differ in length.
    """
    if dataset is None or isinstance(dataset, PREPARED):
        _check_prepared(dataset, args, loss, name, training=training)
        return dataset
    scores = score_settings(args, loss, training=training)
    options = PairOptions(
        transform=PairTransform(
            cast(Any, args.resolution),
            center_crop=not (training and args.random_crop),
            random_flip=training and args.random_flip,
            interpolation=args.image_interpolation,
        ),
        prompt_dropout=args.proportion_empty_prompts if training else 0.0,
        seed=args.seed if args.data_seed is None else args.data_seed,
        dataset_format=args.dataset_format,
        on_bad_row=args.on_bad_row,
        verify_images="none" if args.precompute_latents and args.verify_images == "sample" else args.verify_images,
        num_proc=args.dataset_num_proc,
        image_schemes=args.image_schemes,
        buckets=aspect_ratio_buckets(args),
        min_side=args.min_side,
        compare=loss.uses_loser,
        training=training,
        repeat=training,
        use_scores=scores.needs_scores,
        swap_labels=args.swap_labels,
        number_columns=scores.number_columns,
        losers=args.losers,
    )
    prepared = prepare_dataset(dataset, options, name=name, peers=peers(args))
    if not training:
        _refuse_parts(prepared, args, name)
    _check_scores(prepared, scores, args, name)
    scores.apply_to(prepared, peers(args))
    return prepared


def _check_scores(dataset: Any, scores: ScoreSettings, args: DiffusionSDPOConfig, name: str) -> None:
    if scores.needs_scores and not dataset.has_scores:
        what = f"The loss {args.loss_type!r}" if scores.sorts_by_scores else "`pair_weights`"
        raise ValueError(
            f"{what} needs score columns (`chosen_score`, `rejected_score`), and the {name} data has none. Score the "
            "images first, or choose another loss or setting."
        )


def score_settings(args: DiffusionSDPOConfig, loss: LossSpec, *, training: bool) -> ScoreSettings:
    """Return how scores are used; weights of pairs are of training alone."""
    return ScoreSettings(
        pair_weights=args.pair_weights if training else None,
        calibrated=args.calibrated_scores,
        sorts_by_scores=loss.needs_scores,
        in_unit_range=loss.reads_shares,
    )


def _check_prepared(dataset: Any, args: DiffusionSDPOConfig, loss: LossSpec, name: str, *, training: bool) -> None:
    if dataset is not None:
        score_settings(args, loss, training=training).check_prepared(dataset, name, training=training)
    if not training:
        _refuse_parts(dataset, args, name)
    if dataset is None:
        return
    for setting, of_data in {"swap_labels": dataset.is_swapped, "losers": dataset.is_permuted}.items():
        if of_data != (getattr(args, setting) in (True, "permute")):
            raise ValueError(
                f"The {name} data were prepared with another `{setting}` than {getattr(args, setting)!r}. Pass the "
                "data set that they were prepared from."
            )


def _refuse_parts(dataset: Any, args: DiffusionSDPOConfig, name: str) -> None:
    """Raise `ValueError` where processes would evaluate on parts of a stream: a process with fewer batches than another
    misses its collectives, which would never end."""
    if isinstance(dataset, PreferenceIterableDataset) and dataset.is_split and args.world_size > 1:
        raise ValueError(
            f"The {name} data are a stream that `split_dataset_by_node` has given {args.world_size} processes parts "
            "of, and an evaluation needs as many batches in each. Pass the stream as it was before: it is dealt out "
            "evenly."
        )


def check_batches(dataset: PreferenceDataset | PreferenceIterableDataset | None, args: DiffusionSDPOConfig) -> None:
    """Warn where a batch or a step is larger than the training data; `ValueError` where an epoch has no batch."""
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
    if dataset.sizes is not None:
        group = pairs_of_a_step(args, batch)
        BucketSampler(dataset.sizes, group, seed=0, drop_last=args.dataloader_drop_last)  # raises what loaders would
        told, warns = dataset.sizes.describe_epoch(
            group,
            drop_last=args.dataloader_drop_last,
            shuffled=args.train_sampling_strategy == "random",
        )
        logger.log(logging.WARNING if warns else logging.INFO, told)
        return
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
