"""Data of a run: how its settings read a user's rows, and what model and loss ask of the pairs.

`data/rows_to_pairs.py` makes the pairs, and knows neither settings nor model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sized
from typing import Any
from weakref import WeakSet

from PIL import Image

from ..cache.encoding import PairEncoding
from ..data.dataset import PairOptions, PreferenceDataset
from ..data.images import Size
from ..data.mixtures import PairMixture
from ..data.pair_scores import ScoreSettings
from ..data.pairs import Pairs
from ..data.rows_to_pairs import prepare_dataset
from ..data.transforms import PairTransform
from ..engines.processes import peers
from ..families import Family
from ..losses import LossSpec
from ..models.text_checks import note_on_long_prompts
from ..utils.errors import UserError
from ..utils.score_scale import SCORE_SCALES, SHARES, ScoreReading, ScoreScale, score_scale
from .config.complete import aspect_ratio_buckets, image_size, pairs_of_a_step
from .config.diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

CHECKED_PROMPTS = 10_000  # so many pairs, from the first, have their prompts checked for length


class PairPreparation:
    """Prepares the data of one trainer: rows become pairs, encoded with `precompute_latents`.

    Args:
        args ([`DiffusionSDPOConfig`]): The trainer's settings, after `check_and_complete`.
        family ([`~trl_diffusion_sdpo.families.Family`]): The model family. Its tokenizers find prompts that are too
            long.
    """

    def __init__(self, args: DiffusionSDPOConfig, loss: LossSpec, family: Family, encoding: PairEncoding | None):
        self._args = args
        self._loss = loss
        self._family = family
        self._encoding = encoding
        self._threshold: float | None = None  # that of the training images, by which held-out ones are judged
        self._own: WeakSet[Pairs] = WeakSet()  # data sets that this object has prepared

    def has_prepared(self, dataset: Any) -> bool:
        """Whether this object has prepared a data set."""
        return isinstance(dataset, Pairs) and dataset in self._own

    def prepare(self, dataset: Any, *, name: str, training: bool) -> Pairs:
        """Return a user's data as pairs, encoded with `precompute_latents`. What it has returned before is not prepared
        again. Call it in all processes together."""
        if self.has_prepared(dataset):
            if self._args.precompute_ref_errors and dataset.is_for_training and not training:
                # An evaluation has other noise and timesteps than training, so it cannot use training's reference
                # errors.
                return dataset.for_evaluation()
            return dataset
        prepared = prepare_pairs(
            dataset, self._args, self._loss, name=name, training=training, score_threshold=self._threshold
        )
        check_source_column(prepared, self._family, self._args, name=name, training=training)
        if training and self._args.should_log:
            say_if_matched_images_are_compared(prepared, self._args, self._loss)
        if isinstance(prepared, PreferenceDataset):
            if training:
                self._threshold = prepared.source.score_threshold
                check_full_batch(prepared, self._args)
            self._count_long_prompts(prepared, name)
            if training and self._args.should_log:
                say_what_repeats(prepared, self._args)
            if self._encoding is not None:
                self._encoding.add_to(prepared, name)
        self._own.add(prepared)
        return prepared

    def _count_long_prompts(self, pairs: PreferenceDataset, name: str) -> None:
        """Count the prompts that a tokenizer truncates, for the log and the data report."""
        note = note_on_long_prompts(self._family, pairs.prompts(first=CHECKED_PROMPTS))
        if note:
            pairs.add_note(note)
            if self._args.should_log:
                logger.warning("%s data: %s", name, note)


def check_source_column(
    pairs: Pairs,
    family: Family,
    args: DiffusionSDPOConfig,
    *,
    name: str,
    training: bool,
) -> None:
    """Raise `ValueError` if the data have no source images but the model needs them, or more than it takes; if the
    pairs of a batch would differ in their number or size; or with `random_crop`, which does not support them."""
    if not pairs.has_sources and not family.takes_source:
        return
    if not pairs.has_sources or not (family.takes_source or family.may_take_source):
        has = "has" if pairs.has_sources else "does not have"
        advice = "Use an edit model, or remove the column." if pairs.has_sources else "Add the column."
        raise UserError(
            f"Edit models need a `source` column, and other models allow no such column. {family.name} "
            f"{'is' if family.takes_source else 'is not'} an edit model, and the {name} data {has} the column. {advice}"
        )
    if args.random_crop:
        raise UserError(
            f"`random_crop` does not work with source images yet, which the {name} data have. Leave `random_crop` out."
        )
    assert isinstance(pairs, PreferenceDataset), "Streams with sources are refused."
    batch = args.train_batch_size if training else args.eval_batch_size
    are_together = batch > 1 or pairs.has_loser_sources
    for layouts in pairs.source_sizes.values():  # the pairs of a batch have one training size
        first, *others = sorted(layouts, key=len, reverse=True)
        family.pixels_of_sources([_blank(first)])
        for layout in others if are_together else ():
            family.pixels_of_sources([_blank(first), _blank(layout)])


def _blank(sizes: tuple[Size, ...]) -> list[Image.Image]:
    return [Image.new("RGB", (width, height)) for height, width in sizes]


def check_full_batch(pairs: PreferenceDataset, args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` if training would drop its only batch as incomplete."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(pairs) < batch:
        raise UserError(
            f"`dataloader_drop_last=True` leaves no batch. One batch of all processes takes {batch} pairs, and the "
            f"training data have {len(pairs)}. Lower `per_device_train_batch_size`, or set "
            "`dataloader_drop_last=False`."
        )


def say_what_repeats(pairs: PreferenceDataset, args: DiffusionSDPOConfig) -> None:
    """Warn if some pairs never train, or if later epochs repeat the random choices of the first ones."""
    batch = pairs_of_a_step(args, args.train_batch_size)
    if pairs.sizes is not None and args.dataloader_drop_last:
        shuffled = args.train_sampling_strategy == "random"
        left_out = pairs.sizes.left_out(batch, shuffled=shuffled)
        if left_out:
            listed = ", ".join(f"{count} of {height} x {width} pixels" for (height, width), count in left_out.items())
            logger.warning(
                "`dataloader_drop_last=True` drops incomplete batches, and a batch has pairs of one size. %d of %d "
                "pairs never train (%s), because a step takes %d pairs. Leave it off, or use smaller batches.",
                sum(left_out.values()),
                len(pairs),
                listed,
                batch,
            )
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps * args.gradient_accumulation_steps * batch / max(len(pairs), 1)
    if epochs <= args.precompute_epochs:
        return
    repeated = {
        "`precompute_ref_errors`, crop, flip, dropped prompt, noise and timestep of a pair": args.precompute_ref_errors,
        "`precompute_latents` and `random_crop`, the crops of a pair": args.precompute_latents and args.random_crop,
    }
    for what, repeats in repeated.items():
        if repeats:
            logger.warning(
                "With %s are drawn for `precompute_epochs=%d` epochs and repeat in later ones. This run has %g epochs. "
                "Raise `precompute_epochs` for new ones in each epoch.",
                what,
                args.precompute_epochs,
                round(epochs, 1),
            )


def say_if_matched_images_are_compared(pairs: Pairs, args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    """Log if the loss compares images that belong together only by chance. With `safeguard="parameter"`, the study of
    single images shows no difference to pairs, so it is no warning there. Others were not tried."""
    are_matched = "single_images" in pairs.report.format.split("+") and args.losers != "permute"
    if not (are_matched and loss.compares_images):
        return
    logger.log(
        logging.INFO if args.safeguard == "parameter" else logging.WARNING,
        "%s data: the loss %r compares the two images of each pair, but liked and disliked images form pairs by "
        "chance. Set `loss_type='tgo'` to train on each image by itself.",
        pairs.report.name,
        args.loss_type,
    )


def outline(dataset: Any) -> Any:
    """Return a data set's type, number of rows and column names, without reading rows; for several, a dictionary of
    them."""
    if isinstance(dataset, PairMixture):
        dataset = dataset.by_name
    if isinstance(dataset, Mapping):
        return {name: outline(source) for name, source in dataset.items()}
    rows = len(dataset) if isinstance(dataset, Sized) else None
    return [type(dataset).__name__, rows, getattr(dataset, "column_names", None)]


def prepare_pairs(
    dataset: Any,
    args: DiffusionSDPOConfig,
    loss: LossSpec,
    *,
    name: str,
    training: bool,
    score_threshold: float | None = None,
) -> Pairs:
    """Return a user's data as a torch data set of pairs. Every process prepares all rows; the first checks the images.

    Args:
        score_threshold (`float`, *optional*): That of the training data, for held-out data if the setting is unset.

    Raises:
        `ValueError`: If the columns match no format or lack what the settings need, or no pair is usable.
    """
    scores = score_settings(args, loss, training=training)
    reads_scores = f"The loss {args.loss_type!r}" if scores.sorts_by_scores else "`pair_weights`"
    precomputed = {
        "`precompute_latents`": args.precompute_latents,
        "`precompute_ref_errors`": args.precompute_ref_errors,
    }
    options = PairOptions(
        transform=PairTransform(
            image_size(args),
            center_crop=not (training and args.random_crop),
            random_flip=training and args.random_flip,
        ),
        prompt_dropout=args.proportion_empty_prompts if training else 0.0,
        seed=args.seed if args.data_seed is None else args.data_seed,
        dataset_format=args.dataset_format,
        verify_images="none" if args.precompute_latents and args.verify_images == "sample" else args.verify_images,
        num_proc=args.dataset_num_proc,
        image_schemes=args.image_schemes,
        buckets=aspect_ratio_buckets(args),
        min_side=args.min_side,
        training=training,
        repeat=training,
        distinct_epochs=args.precompute_epochs if training and args.precompute_ref_errors else None,
        use_scores=scores.needs_scores,
        needs_scores=reads_scores if scores.needs_scores else "",
        needs_masks=f"`mask_anchor={args.mask_anchor}`" if args.mask_anchor else "",
        needs_all_rows=(*scores.needs_all_rows, *(setting for setting, is_set in precomputed.items() if is_set)),
        score_reading=score_reading(args),
        score_threshold=args.score_threshold if training or args.score_threshold is not None else score_threshold,
        score_distances=bool(args.loss_kwargs.get("tgo_distance_weight")),
        swap_labels=args.swap_labels,
        number_columns=scores.number_columns,
        noise_seeds=training and args.noise_source == "generated",
        losers=args.losers,
    )
    prepared = prepare_dataset(dataset, options, name=name, peers=peers(args))
    if isinstance(prepared, PreferenceDataset):
        if loss.uses_loser:
            check_identical(prepared, args)
        scores.apply_to(prepared, peers(args))
    return prepared


def check_identical(pairs: PreferenceDataset, args: DiffusionSDPOConfig) -> None:
    """Compare the two images of a sample of pairs. Warn if most pairs have the same image twice.

    Raises:
        `ValueError`: If all of them have.
    """
    same = peers(args).first(pairs.sample_of_identical)
    what = f"{sum(same)} of {len(same)} pairs of the {pairs.report.name} data that were compared"
    if all(same):
        raise UserError(
            f"The two images of a pair must differ, and {what} have the same image twice. Check the columns, or use "
            "`loss_type='sft'` to train on winners alone."
        )
    if 2 * sum(same) > len(same) and args.should_log:
        logger.warning("%s have the same image twice, and teach nothing. Check the columns.", what)


def score_settings(args: DiffusionSDPOConfig, loss: LossSpec, *, training: bool) -> ScoreSettings:
    """Return the settings of how scores are used, with `pair_weights` for training only."""
    return ScoreSettings(
        pair_weights=args.pair_weights if training else None,
        calibrated=args.calibrated_scores,
        sorts_by_scores=loss.needs_scores,
    )


def score_reading(args: DiffusionSDPOConfig) -> ScoreReading:
    """Return what the loss and `pair_weights` need of the scores in the data."""
    names = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
    if args.calibrated_scores:
        return ScoreReading("log_odds")
    if "capo" in names:
        return ScoreReading("share", assumed=SHARES)
    typed = args.loss_kwargs.get("smpo_score_scale")
    if typed is not None:
        named = (scale for name, scale in SCORE_SCALES.items() if score_scale(name) == typed)
        return ScoreReading("range", next(named, ScoreScale()), typed=f"smpo_score_scale: {typed:g}")
    advice = (
        "The data do not say the scale of their scores, so `smpo` divides their differences by 1. Score the images "
        "with `trl-diffusion-sdpo pairs score`, or set `smpo_score_scale` in `loss_kwargs`."
    )
    return ScoreReading("range", advice=advice if "smpo" in names else None)
