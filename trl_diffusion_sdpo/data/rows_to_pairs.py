"""Makes pairs from the rows of any preference data set, and drops bad rows and bad images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np

from ..utils.errors import UserError
from ..utils.processes import ALONE, Peers
from .data_report import DataReport
from .dataset import PairOptions, PreferenceDataset
from .formats import SEED_COLUMNS, PreferenceFormat
from .images import Size
from .mixtures import PairMixture
from .pair_table import PairTable
from .pairs import Pairs
from .permuted_losers import PermutedLosers
from .single_images import match_again
from .sources import PairSource, make_source
from .streaming import PreferenceIterableDataset, Stream

logger = logging.getLogger(__name__)

EXAMINED_IMAGES = 2000  # of each kind, to find those that are liked and disliked
MISSING = "is missing: the row has fewer images than labels"


def prepare_dataset(dataset: Any, options: PairOptions, *, name: str = "train", peers: Peers = ALONE) -> Pairs:
    """Return a torch data set of pairs made from any preference data set.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or list of dicts): Rows in one of `FORMATS`, or a
            [`PairMixture`] of several data sets.
        options ([`PairOptions`]): Settings for making pairs from rows.
        name (`str`): Name of the data in messages.
        peers (`Peers`): The processes that prepare the same data. The first checks images for all.

    Returns:
        [`PreferenceDataset`] or, for a `datasets.IterableDataset`, [`PreferenceIterableDataset`].

    Raises:
        ValueError: If an argument, the type of the data set or its columns are invalid, or no pair remains.
    """
    is_mixture = isinstance(dataset, PairMixture)
    is_stream = dataset.is_stream if is_mixture else isinstance(dataset, datasets.IterableDataset)
    if is_stream:
        return _prepare_stream(dataset, options, name)

    # Recognize the columns.
    source = make_source(
        dataset,
        options.dataset_format,
        name,
        use_scores=options.use_scores,
        score_reading=options.score_reading,
        is_swapped=options.swap_labels,
        number_columns=(*options.number_columns, *(SEED_COLUMNS if options.noise_seeds else ())),
        reads_verdicts=not options.permutes,
        score_threshold=options.score_threshold,
    )
    check_columns(source.formats, options, name)

    # Index the pairs, and drop unusable pairs.
    report = DataReport(name, source.format_name, rows=len(source), is_swapped=options.swap_labels)
    report.unread = source.unread
    report.is_permuted = options.permutes
    pairs = source.index_pairs(report.add)
    if options.permutes:  # only winners: training draws the losers
        report.notes += notes_on_verdicts(source)
        pairs = PairTable(pairs.positions[:, [0, 1, 0, 1]], {})
    if len(pairs) and (options.verify_images == "all" or options.reads_sizes):
        pairs = _drop_bad_images(source, pairs, options, report, peers)
    if source.single_images and len(pairs) and not options.permutes:
        report.matching, images_of_both_kinds = peers.first(partial(describe_matching, source, pairs))
        report.notes += images_of_both_kinds

    if options.score_distances:
        pairs = pairs.with_columns(scores=source.scores_from_threshold(pairs.positions))

    # Make the data set, and check a sample of its pairs.
    losers = PermutedLosers.of(source, pairs.positions[:, 0], options.seed, name) if options.permutes else None
    source_sizes: dict[Size, set[tuple[Size, ...]]] = {}
    if source.has_sources and len(pairs):
        pairs, source_sizes = _fit_sources(source, pairs, options, report, peers)
    prepared = PreferenceDataset(source, pairs, options, report, losers, source_sizes)
    if options.verify_images != "none" and len(prepared):
        prepared.check_sample(peers)
    report = prepared.report
    if not report.pairs:
        raise UserError(f"No pair is left to train on. Check the labels and images of the data set.\n{report}")
    if peers.index == 0:  # all processes have the same report
        asks = report.dropped or report.cut_prompts or report.notes
        logger.log(logging.WARNING if asks else logging.INFO, "%s", report)
    return prepared


def check_columns(formats: Sequence[PreferenceFormat], options: PairOptions, name: str) -> None:
    """Raise `ValueError` if the data lack columns that the settings need, or have columns that these cannot use.

    Args:
        formats (`Sequence[PreferenceFormat]`): Format of the data set, or of each one of a mixture.
        name (`str`): Name of the data in messages.
    """
    has_scores = not options.permutes and all(row_format.score_columns for row_format in formats)
    has_masks = any(row_format.mask_columns for row_format in formats)
    has_sources = any(row_format.source_columns for row_format in formats)
    if not options.permutes and not all(row_format.has_losers for row_format in formats):
        raise UserError(
            f"Pairs need losers. The {name} data have only captions (format `captioned`). Use `losers='permute'` to "
            "take images with other captions as losers, add a column `label` that says which images are liked, or "
            "rename columns to match another format."
        )
    for column, has_it in (("a mask column", has_masks), ("a `source` column", has_sources)):
        if options.permutes and has_it:
            raise UserError(
                f"`losers='permute'` cannot be used on data with {column}: it takes losers from other pairs, but the "
                "column belongs to the two images of one row. Remove the column, or use `losers='data'`."
            )
    if options.needs_scores and any(row_format.single_images for row_format in formats) and not options.permutes:
        raise UserError(
            f"{options.needs_scores} needs pairs whose images both have a score, but the {name} data have single "
            "images, liked or disliked. Leave this loss or setting out."
        )
    if options.needs_scores and not has_scores:
        raise UserError(
            f"{options.needs_scores} needs the columns `chosen_score` and `rejected_score`. The {name} data lack these "
            "columns. Score the images with `trl-diffusion-sdpo pairs score`, or leave this loss or setting out."
        )
    are_scored = not options.permutes and all(("score",) in row_format.label_readers for row_format in formats)
    if options.score_distances and not are_scored:
        listed = "+".join(row_format.name for row_format in formats)
        raise UserError(
            "`tgo_distance_weight` needs single images that are liked or disliked by a `score`, and `losers='data'`. "
            f"The {name} data (format {listed}) are not, or have a `label`, which comes first. Give each image a "
            "`score` and no `label`, or leave the setting out."
        )
    if options.needs_masks and not has_masks:
        raise UserError(
            f"{options.needs_masks} needs data with a mask column, and the {name} data have none. Add it, or leave the "
            "setting out."
        )
    refused = {
        "`noise_source='generated'`": options.noise_seeds,
        "`pair_weights`": bool(options.number_columns),
    }
    if any(row_format.single_images for row_format in formats) and any(refused.values()):
        what = next(what for what, is_set in refused.items() if is_set)
        raise UserError(
            f"Single images, liked or disliked, cannot be used with {what} yet, as for the {name} data. Leave it out, "
            "or make pairs of the images."
        )
    if options.training and options.score_threshold is not None:
        if not any(row_format.has_image_scores for row_format in formats):
            logger.warning(
                "`score_threshold=%g` has no effect on the %s data: it judges single images by their column `score`, "
                "and these have the format %s%s. Leave it out.",
                options.score_threshold,
                name,
                "+".join(row_format.name for row_format in formats),
                " with a `label`" if any(row_format.single_images for row_format in formats) else "",
            )
    shared = [row_format.name for row_format in formats if row_format.images_in_list or row_format.group_column]
    if options.noise_seeds and shared:
        raise UserError(
            f"`noise_source='generated'` reads {' and '.join(SEED_COLUMNS)}, which belong to the one pair of a row. In "
            f"the {name} data (format {'+'.join(shared)}), a row may have images of several pairs. Write one row for "
            "each pair."
        )


def notes_on_verdicts(source: PairSource) -> tuple[str, ...]:
    """Return a line for the report if images are winners whatever their labels."""
    if "label" not in source.unread or "captioned" not in source.format_name:
        return ()
    return (
        "every image is a winner, whatever its `label`. If that says which images are disliked, leave them out with "
        "`dataset_format='single_images'`",
    )


def describe_matching(source: PairSource, pairs: PairTable) -> tuple[str, tuple[str, ...]]:
    """Return how liked and disliked images became pairs, and a note for the report if some are both."""
    positions = pairs.positions[source.are_single_images(pairs.positions[:, 0])]
    columns = (2, 0) if source.formats[0].is_swapped else (0, 2)
    liked, disliked = (np.unique(positions[:, column]) for column in columns)
    matched = f"{len(liked)} liked and {len(disliked)} disliked images are matched at random"
    if len(liked) != len(disliked):
        kind, few = min(("liked", len(liked)), ("disliked", len(disliked)), key=lambda each: each[1])
        matched += f"; each {kind} one comes {len(positions) / few:.3g} times an epoch"

    def content(row: int) -> tuple[str, bytes]:
        (image,) = source.images([(row, 0)])
        return image.prompt, hashlib.sha256(image.start()).digest()

    of_kinds = [set(map(content, rows[:EXAMINED_IMAGES].tolist())) for rows in (liked, disliked)]
    both = len(of_kinds[0] & of_kinds[1])
    some = f" of the first {EXAMINED_IMAGES} of each kind" if max(len(liked), len(disliked)) > EXAMINED_IMAGES else ""
    return matched, (f"{both} images{some} are liked and disliked, with the same prompt",) if both else ()


def _drop_bad_images(
    source: PairSource, pairs: PairTable, options: PairOptions, report: DataReport, peers: Peers
) -> PairTable:
    """Check every image, drop pairs with bad or too small ones, and assign the others to buckets.

    Images are decoded with `verify_images="all"`; otherwise, only their headers are read. The first process does it for
    all.
    """
    decode = options.verify_images == "all"
    sizes, reasons = source.examine_images(
        pairs.positions, options.reader, decode=decode, num_proc=options.num_proc, peers=peers
    )
    if not options.permutes and all(row_format.single_images for row_format in source.formats):
        return _drop_bad_single_images(source, pairs, sizes, reasons, options, report)
    is_readable = np.asarray((sizes > 0).all((1, 2)))
    is_large = np.asarray((sizes >= (options.min_side or 0)).all((1, 2)))
    for pair in np.flatnonzero(~is_readable).tolist():
        side = 0 if not sizes[pair, 0].all() else 1  # the winner (0) if it is bad, else the loser (1)
        row, image = pairs.positions[pair, 2 * side : 2 * side + 2].tolist()
        report.add("undecodable", row, f"image {image} {reasons.get((row, image), MISSING)}")
    for pair in np.flatnonzero(is_readable & ~is_large).tolist():
        reason = f"{sizes[pair].min()} pixels along the shorter side, and `min_side={options.min_side}`"
        report.add("too_small", int(pairs.positions[pair, 0]), reason)
    pairs = pairs.take(is_readable & is_large)
    sizes = sizes[is_readable & is_large]
    if options.buckets is not None:
        pairs = pairs.with_columns(size=options.buckets.assign(sizes.reshape(-1, 4).astype(np.int64)))
    if options.reads_sizes:
        enlarged = int((_targets(pairs, options)[:, None] > sizes).any(axis=(1, 2)).sum())
        if enlarged:
            target = options.transform
            size = f"{target.width}x{target.height}" if options.buckets is None else "of their bucket"
            report.notes += (f"{enlarged} pairs have an image that is enlarged to the size {size} (`resolution`)",)
    return pairs


def _drop_bad_single_images(
    source: PairSource,
    pairs: PairTable,
    sizes: np.ndarray,
    reasons: dict[tuple[int, int], str],
    options: PairOptions,
    report: DataReport,
) -> PairTable:
    """Match the images that remain anew, so that a bad one takes no good one with it, and as far as possible two of one
    bucket."""
    is_readable = np.asarray((sizes > 0).all(2))  # (P, 2)
    is_large = np.asarray((sizes >= (options.min_side or 0)).all(2))
    for kind, is_bad in (("undecodable", ~is_readable), ("too_small", is_readable & ~is_large)):
        found = {int(row): size for row, size in zip(pairs.positions[:, [0, 2]][is_bad], sizes[is_bad], strict=True)}
        for row, size in found.items():
            small = f"{min(size)} pixels along the shorter side, and `min_side={options.min_side}`"
            report.add(kind, row, f"image {reasons.get((row, 0), MISSING)}" if kind == "undecodable" else small)
    buckets = None
    if options.buckets is not None:
        flat = np.tile(sizes.reshape(-1, 2), 2).astype(np.int64)  # (2P, 4): each image twice
        buckets = options.buckets.assign(flat).reshape(-1, 2)
    matched = match_again(pairs.positions, is_readable & is_large, buckets)
    if options.buckets is None:
        return PairTable(matched, {})
    by_row = dict(zip(pairs.positions[:, [0, 2]].reshape(-1).tolist(), sizes.reshape(-1, 2), strict=True))
    of_pairs = np.array([[*by_row[liked], *by_row[disliked]] for liked, _, disliked, _ in matched.tolist()])
    return PairTable(matched, {"size": options.buckets.assign(of_pairs.reshape(-1, 4).astype(np.int64))})


def _targets(pairs: PairTable, options: PairOptions) -> np.ndarray:
    """Return the `(height, width)` at which each pair trains, `(P, 2)`."""
    if options.buckets is None:
        return np.tile([options.transform.height, options.transform.width], (len(pairs), 1))
    return np.array(options.buckets.sizes)[pairs.columns["size"]]


def _fit_sources(
    source: PairSource, pairs: PairTable, options: PairOptions, report: DataReport, peers: Peers
) -> tuple[PairTable, dict[Size, set[tuple[Size, ...]]]]:
    """Read the headers of all images, and add the columns `source_rows` and `sources_cut`, `(P, 2)`: the row with the
    sources of winner and loser, and bit i of a number says whether source i is cropped with its pair. Also return the
    sizes that sources have in items, by the size at which their pair trains. Add a note to the report if sources are
    not cropped with their pairs.

    The two images of a pair have one source, that of the winner's row, but single images each have their own.

    Pairs with an unreadable image are left out: they are counted when they are read.
    """
    images, _ = source.examine_images(
        pairs.positions, options.reader, decode=False, num_proc=options.num_proc, peers=peers
    )
    have_own = source.are_single_images(pairs.positions[:, 0])
    source_rows = pairs.positions[:, [0, 2]]
    source_rows[~have_own, 1] = source_rows[~have_own, 0]
    rows, numbers = np.unique(source_rows, return_inverse=True)
    sizes_of_rows = source.source_sizes(rows, options.reader, num_proc=options.num_proc, peers=peers)
    targets = _targets(pairs, options).tolist()
    found: dict[Size, set[tuple[Size, ...]]] = {}
    are_cut = np.zeros((len(pairs), 2), dtype=np.int64)
    are_whole = np.zeros(len(pairs), dtype=bool)
    numbers = numbers.reshape(-1, 2)  # a flat array in some versions of numpy
    for (pair, side), number in np.ndenumerate(numbers):
        sources = sizes_of_rows[number]
        target = tuple(targets[pair])
        if not sources or not images[pair].all():
            continue
        beside = images[pair, side : side + 1] if have_own[pair] else images[pair]
        is_cut = [options.transform.is_cut_with_pair(each, beside.tolist(), target) for each in sources]
        are_cut[pair, side] = sum(cut << position for position, cut in enumerate(is_cut))
        fitted = tuple(target if cut else each for each, cut in zip(sources, is_cut, strict=True))
        found.setdefault(target, set()).add(fitted)
        are_whole[pair] |= not all(is_cut)
    if whole := int(are_whole.sum()):
        report.notes += (
            f"{whole} of {len(pairs)} pairs have a source whose shape differs from that of their images: it stays "
            "whole, and is not cropped with them",
        )
    return pairs.with_columns(source_rows=source_rows, sources_cut=are_cut), found


def _prepare_stream(dataset: Any, options: PairOptions, name: str) -> PreferenceIterableDataset:
    needs_all_rows = {
        "`losers='permute'`": options.permutes,
        "`aspect_ratio_buckets` and `min_side`": options.reads_sizes,
        "`noise_source='generated'`": options.noise_seeds,
        "`pair_weights`": bool(options.number_columns),
        "`tgo_distance_weight`": options.score_distances,
        **dict.fromkeys(options.needs_all_rows, True),
    }
    for setting, is_set in needs_all_rows.items():
        if is_set:
            raise UserError(
                f"{setting} must read all rows before the first batch, but the {name} data are a stream. Load the data "
                "without `streaming=True`, or remove the setting."
            )
    listed = [(name, dataset, options.dataset_format)]
    weights = None
    if isinstance(dataset, PairMixture):
        listed = list(dataset.entries(options.dataset_format, name))
        weights = dataset.weights
    streams = [Stream(rows, row_format, label, options) for label, rows, row_format in listed]
    check_columns([stream.format for stream in streams], options, name)
    if any(stream.format.has_image_scores and stream.format.score_threshold is None for stream in streams):
        raise UserError(
            f"Single images with scores need `score_threshold` in a stream, whose median is not known, and it is unset "
            f"for the {name} stream. Set it, or load the data without `streaming=True`."
        )
    if any(stream.format.source_columns for stream in streams):
        raise UserError(
            f"Streams cannot have a `source` column yet, and the {name} stream has one. Load the data without "
            "`streaming`, or remove the column."
        )
    return PreferenceIterableDataset(streams, options, weights=weights, name=name)
