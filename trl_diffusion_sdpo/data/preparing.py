"""Preparation of pairs for training from any preference set: rows become pairs, and bad rows and images are dropped."""

from __future__ import annotations

import logging
from typing import Any

import datasets

from ..utils.processes import ALONE, Peers
from .checking import ENLARGED
from .dataset import PairOptions, PreferenceDataset
from .formats import FORMATS, SEED_COLUMNS
from .sources import PairMixture, bad_seeds, make_source, numbers_of_rows
from .streaming import PreferenceIterableDataset, Stream

logger = logging.getLogger(__name__)


def prepare_dataset(
    dataset: Any, options: PairOptions, *, name: str = "train", peers: Peers = ALONE
) -> PreferenceDataset | PreferenceIterableDataset:
    """Return a torch data set of pairs from any preference set.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or list of dicts): Rows in one of `FORMATS`; or several
            data sets as a list or a [`PairMixture`].
        options ([`PairOptions`]): Settings by which the data set becomes pairs.
        name (`str`): Name of the set in messages.
        peers (`Peers`): The processes that prepare the same data at the same time, and divide the checks.

    Returns:
        [`PreferenceDataset`] or, for a `datasets.IterableDataset`, [`PreferenceIterableDataset`].

    Raises:
        ValueError: If an argument, the kind of data set or its columns are not accepted, or if no pair remains.
    """
    if isinstance(dataset, list | tuple) and dataset:
        if isinstance(dataset[0], datasets.Dataset | datasets.IterableDataset):
            dataset = PairMixture(dataset)
    is_mixture = isinstance(dataset, PairMixture)
    is_stream = dataset.is_stream if is_mixture else isinstance(dataset, datasets.IterableDataset)
    if options.num_proc is not None and (is_stream or not (options.verify_images == "all" or options.reads_sizes)):
        logger.warning(
            "`num_proc=%s` has no effect. It is used only if all images of a map-style set, or their sizes, are "
            "checked.",
            options.num_proc,
        )
    if is_stream:
        return _prepare_stream(dataset, options, name)

    number_columns = (*options.number_columns, *(SEED_COLUMNS if options.noise_seeds else ()))
    source = make_source(
        dataset,
        options.dataset_format,
        name,
        use_scores=options.use_scores,
        is_swapped=options.swap_labels,
        number_columns=number_columns,
    )
    if not options.permutes and not source.has_losers:
        raise ValueError(_without_losers(name))
    prepared = PreferenceDataset.of(source, options, name)
    for column in options.number_columns:
        prepared.drop_bad_rows(numbers_of_rows(source.values(column), column)[1])
    for column in SEED_COLUMNS if options.noise_seeds else ():
        prepared.drop_bad_rows(bad_seeds(source.values(column), column))
    if options.verify_images == "all" or options.reads_sizes:
        prepared.check_images(options.num_proc, peers, decode=options.verify_images == "all")
    if options.permutes:
        prepared.permute_losers()
    if options.verify_images != "none" and len(prepared):
        prepared.check_sample(peers, compare=options.compare)
    report = prepared.report
    if not report.pairs:
        raise ValueError(f"No pair is left to train on. Check the labels and images of the data set.\n{report}")
    noteworthy = report.dropped or any(note.startswith(ENLARGED) for note in report.notes)
    logger.log(logging.WARNING if noteworthy else logging.INFO, "%s", report)
    return prepared


def _prepare_stream(dataset: Any, options: PairOptions, name: str) -> PreferenceIterableDataset:
    needs_all_rows = {
        "`losers='permute'`": options.permutes,
        "`aspect_ratio_buckets` and `min_side`": options.reads_sizes,
        "`noise_source='generated'`": options.noise_seeds,
        "`pair_weights`": bool(options.number_columns),
    }
    for setting, is_set in needs_all_rows.items():
        if is_set:
            raise ValueError(
                f"{setting} must read all rows before the first batch, and the {name} data are a stream. Load them "
                "without `streaming=True`, or leave the setting out."
            )
    entries, weights = [(name, dataset, options.dataset_format)], None
    if isinstance(dataset, PairMixture):
        entries, weights = list(dataset.entries(options.dataset_format, name)), dataset.weights
    streams = [Stream(rows, row_format, label, options) for label, rows, row_format in entries]
    if not all(stream.format.has_losers for stream in streams):
        raise ValueError(_without_losers(name))
    return PreferenceIterableDataset(streams, options, weights=weights, name=name)


def _without_losers(name: str) -> str:
    others = "\n".join(f"  {each.describe()}" for each in FORMATS.values() if each.has_losers)
    return (
        f"Pairs need losers. The {name} data have only captions (format `captioned`). Use `losers='permute'` to take "
        "images of other captions as losers, or rename columns so that they match one of:\n" + others
    )
