"""Prepares a user's data as the trainer's settings say, and checks that the data have enough pairs for a batch.

`data/preparing.py` turns rows into pairs and does not know the trainer's settings.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from ..cache.encoding import PairEncoding
from ..cache.reference_errors import repeating_pairs
from ..data.dataset import PairOptions, PreferenceDataset
from ..data.pair_scores import ScoreSettings
from ..data.preparing import prepare_dataset
from ..data.streaming import PreferenceIterableDataset, StreamPosition
from ..data.transforms import PairTransform
from ..engines.processes import peers
from ..families import Family
from ..losses import LossSpec
from ..models.text_checks import note_on_long_prompts
from ..utils._compat import keeps_order
from .config.complete import aspect_ratio_buckets, image_size
from .diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

POSITION_FILE = "stream_position_{}.json"  # in a checkpoint, one file for each process
CHECKED_PROMPTS = 10_000  # number of first pairs whose prompts are checked for length
PREPARED = (PreferenceDataset, PreferenceIterableDataset)


class PairPreparation:
    """Prepares the data of one trainer: rows become pairs, and images and prompts are encoded if `precompute_latents`
    is set.

    Args:
        args ([`DiffusionSDPOConfig`]): The trainer's settings, after `check_and_complete`.
        loss ([`LossSpec`]): Properties of the loss.
        family ([`~trl_diffusion_sdpo.families.Family`]): The model family, whose tokenizers find the prompts that are
            too long.
        encoding ([`PairEncoding`], *optional*): Object that encodes images and prompts before training.
    """

    def __init__(self, args: DiffusionSDPOConfig, loss: LossSpec, family: Family, encoding: PairEncoding | None):
        self._args = args
        self._loss = loss
        self._family = family
        self._encoding = encoding
        self._own: WeakSet[Any] = WeakSet()  # data sets whose encodings and reference errors this trainer computed
        # Copies for evaluation of data sets that the user had already prepared as pairs, by the user's data set.
        self._copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def prepare(self, dataset: Any, *, name: str, training: bool) -> Any:
        """Return a user's data as a data set of pairs, encoded if `precompute_latents` is set. `None` is returned
        unchanged. All processes must call this method together.

        Args:
            name (`str`): Name of the data in messages.
        """
        if not training and isinstance(dataset, PreferenceDataset) and dataset in self._copies:
            return self._copies[dataset]
        prepared = prepare_pairs(dataset, self._args, self._loss, name=name, training=training)
        if prepared is None:
            return None
        is_new = prepared not in self._own
        if is_new:
            check_source_column(prepared, self._family, self._args, name=name)
        was_prepared = prepared is dataset and isinstance(prepared, PreferenceDataset) and is_new
        if isinstance(prepared, PreferenceDataset) and is_new:
            self._count_long_prompts(prepared, name)
        if was_prepared:
            prepared = prepared.from_source()  # drop encodings and errors that another trainer computed
        if self._args.precompute_ref_errors:
            prepared = repeating_pairs(prepared, self._args.precompute_epochs, name=name, training=training)
        if self._encoding is not None:
            self._encoding.add_to(prepared, name, compare=self._loss.uses_loser)
        self._own.add(prepared)
        if was_prepared and not training:
            self._copies[dataset] = prepared
        return prepared

    def _count_long_prompts(self, pairs: PreferenceDataset, name: str) -> None:
        """Count the prompts that a tokenizer truncates, add their number to the data report, and log it."""
        few = pairs if len(pairs) <= CHECKED_PROMPTS else pairs.first(CHECKED_PROMPTS)
        note = note_on_long_prompts(self._family, few.prompts())
        if note:
            pairs.add_note(note)
            logger.warning("%s data: %s", name, note)


def check_source_column(
    pairs: PreferenceDataset | PreferenceIterableDataset, family: Family, args: DiffusionSDPOConfig, *, name: str
) -> None:
    """Raise `ValueError` if the model needs source images and the data have none, if the data have some and the model
    takes none, or if `random_crop` is on, which does not support source images."""
    if not pairs.has_sources and not family.takes_source:
        return
    if not pairs.has_sources or not (family.takes_source or family.may_take_source):
        has = "has" if pairs.has_sources else "does not have"
        advice = "Use an edit model, or remove the column." if pairs.has_sources else "Add the column."
        raise ValueError(
            f"A `source` column is needed by edit models and allowed for no others. {family.name} "
            f"{'is' if family.takes_source else 'is not'} one, and the {name} data {has} the column. {advice}"
        )
    if args.random_crop:
        raise ValueError(
            f"`random_crop` does not work with source images yet, and the {name} data have some. Leave `random_crop` "
            "out."
        )


def _reading(args: DiffusionSDPOConfig) -> tuple[int, int, int]:
    """Return the numbers on which a position in a stream depends: batch size, DataLoader workers and processes."""
    return args.train_batch_size, args.dataloader_num_workers or 0, args.world_size


def save_position(position: StreamPosition, args: DiffusionSDPOConfig, folder: Path) -> None:
    """Write how far this process has read a stream into the checkpoint `folder`."""
    content = {"reading": _reading(args), "readers": position.readers}
    (folder / POSITION_FILE.format(args.process_index)).write_text(json.dumps(content))


def load_position(
    stream: PreferenceIterableDataset, args: DiffusionSDPOConfig, batches: int, checkpoint: str | None
) -> StreamPosition:
    """Read from a checkpoint the position in the stream after `batches` batches.

    If the number of processes, the number of workers or the batch size has changed, the position is the beginning of
    the stream. Training then decodes and discards the first `batches` batches.
    """
    beginning = stream.position(*_reading(args))
    if checkpoint is None or not batches:
        return beginning
    file = Path(checkpoint) / POSITION_FILE.format(args.process_index)
    content = json.loads(file.read_text()) if file.is_file() else {}
    if content.get("reading") == list(_reading(args)) and keeps_order(args):
        position = stream.position(*_reading(args), content["readers"])
        if position.batches == batches:
            return position
    logger.warning(
        "The checkpoint does not say where in the stream to continue after %d batches with %d pairs per batch, %d "
        "workers and %d processes. These batches are decoded again and discarded.",
        *(batches, *_reading(args)),
    )
    return beginning


def prepare_pairs(dataset: Any, args: DiffusionSDPOConfig, loss: LossSpec, *, name: str, training: bool) -> Any:
    """Return a user's data as a torch data set of pairs. A data set of pairs that is already prepared is returned
    unchanged, and so is `None`. Every process prepares all rows, but the processes divide the check of the images among
    themselves.

    Raises:
        `ValueError`: If the columns match no format, no pair is usable, the loss needs scores that the data do not
            have, or several processes would evaluate on shares of a stream that may differ in length.
    """
    if dataset is None or isinstance(dataset, PREPARED):
        _check_prepared(dataset, args, loss, name, training=training)
        return dataset
    scores = score_settings(args, loss, training=training)
    options = PairOptions(
        transform=PairTransform(
            image_size(args),
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
        noise_seeds=training and args.noise_source == "generated",
        losers=args.losers,
    )
    prepared = prepare_dataset(dataset, options, name=name, peers=peers(args))
    if not training:
        _refuse_parts(prepared, args, name)
    if scores.needs_scores and not prepared.has_scores:
        what = f"The loss {args.loss_type!r}" if scores.sorts_by_scores else "`pair_weights`"
        raise ValueError(
            f"{what} needs the columns `chosen_score` and `rejected_score`. The {name} data have none. Score the "
            "images first, or choose another loss or setting."
        )
    if args.mask_anchor and not prepared.has_masks:
        raise ValueError(
            f"`mask_anchor={args.mask_anchor}` needs data with a mask column, and the {name} data have none. Add the "
            "column, or leave `mask_anchor` out."
        )
    scores.apply_to(prepared, peers(args))
    return prepared


def score_settings(args: DiffusionSDPOConfig, loss: LossSpec, *, training: bool) -> ScoreSettings:
    """Return the settings for the scores in the data. The settings for evaluation (`training=False`) have no
    `pair_weights`."""
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
    prepared = {"swap_labels": dataset.is_swapped, "losers": dataset.is_permuted}
    if training:
        prepared["noise_source"] = dataset.has_noise_seeds
    for setting, of_data in prepared.items():
        if of_data != (getattr(args, setting) in (True, "permute", "generated")):
            raise ValueError(
                f"The {name} data are already prepared as pairs, but with a value of `{setting}` other than "
                f"{getattr(args, setting)!r}. Pass the original data set instead."
            )


def _refuse_parts(dataset: Any, args: DiffusionSDPOConfig, name: str) -> None:
    """Raise `ValueError` if each process would evaluate on its own part of a stream that the user has split. Without
    this check, a process with more batches than another would wait for the other process forever."""
    if isinstance(dataset, PreferenceIterableDataset) and dataset.is_split and args.world_size > 1:
        raise ValueError(
            f"Every process must evaluate on the same number of batches. `split_dataset_by_node` has split the {name} "
            f"stream among {args.world_size} processes, and the parts may have different lengths. Pass the stream "
            "without this split, because the trainer splits it evenly itself."
        )
