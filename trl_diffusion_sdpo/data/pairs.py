"""Makes training pairs out of any preference set: an index over the label columns, built without reading an image, and
torch data sets that read, check and transform the images."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets

from .buckets import AspectRatioBuckets
from .checking import ALONE, COUNTS, DataReport, Peers, parse_verify_images
from .columns import numbers_of_rows
from .formats import FORMATS
from .image_sizes import ENLARGED
from .images import SCHEMES, ImageReader, parse_schemes
from .map_style import PreferenceDataset
from .mixture import MixedSource, PairMixture, Source
from .streaming import PreferenceIterableDataset, Stream
from .tables import make_source
from .transforms import ItemMaker, PairTransform

__all__ = ["COUNTS", "DataReport", "PairMixture", "PreferenceDataset", "PreferenceIterableDataset"]
__all__ += ["prepare_dataset"]

logger = logging.getLogger(__name__)

WITHOUT_MEAN = (
    "`pair_weights` reads the columns {columns} of all pairs before the first batch, as weights are divided by their "
    "mean, and the {name} data are a stream, which has none before it ends. Load them without `streaming=True`, or "
    "leave it out."
)
TABLES = (datasets.Dataset, datasets.IterableDataset)


def prepare_dataset(
    dataset: Any,
    *,
    transform: PairTransform,
    prompt_dropout: float = 0.0,
    seed: int = 42,
    dataset_format: str | None = None,
    on_bad_row: str = "drop",
    verify_images: str | bool = "sample",
    num_proc: int | None = None,
    image_schemes: str | Sequence[str] | None = None,
    buckets: AspectRatioBuckets | None = None,
    min_side: int | None = None,
    peers: Peers = ALONE,
    compare: bool = True,
    training: bool = True,
    repeat: bool = False,
    use_scores: bool = True,
    swap_labels: bool = False,
    number_columns: Sequence[str] = (),
    losers: str = "data",
    name: str = "train",
) -> "PreferenceDataset | PreferenceIterableDataset":
    """A torch data set of pairs from any preference set.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, map-style torch data set or sequence of dicts):
            In one of `FORMATS`. Or several as a [`PairMixture`], or as a list, which is one without weights.
        transform (`PairTransform`): How images become pixels.
        prompt_dropout (`float` in `[0, 1]`): Probability of an empty prompt.
        seed (`int`, not negative): Seed of every random draw.
        dataset_format (`str`, *optional*): A key of `FORMATS`; detected from the columns by default.
        on_bad_row (`str`): `"drop"` leaves bad prompts, bad labels and undecodable images out and counts them;
            `"raise"` stops at the first. Ties are not bad rows: they are left out and counted either way.
        verify_images (`str`): Which images of a map-style set to decode beforehand: `"sample"`, those of
            `SAMPLED_PAIRS` evenly spaced pairs; `"all"`, with a progress bar, cached by `datasets`; `"none"`. `True`
            is all, `False` none. `"all"` drops the pairs of bad images. Otherwise a bad image is found when it is
            read, and its pair is replaced by the next good one.
        num_proc (`int`, *optional*): Processes that check all images; as many as there are cores if unset.
        image_schemes (`str` or `Sequence[str]`, *optional*): URL schemes that rows may use besides `SCHEMES`, such as
            `"s3"`.
        buckets ([`AspectRatioBuckets`], *optional*): Sizes that pairs are trained at by their aspect ratios, in place
            of the transform's. The header of every image is read for it, which `datasets` caches.
        min_side (`int`, *optional*): Pairs with an image whose shorter side has fewer pixels are left out and counted.
        peers (`Peers`): The processes that prepare the same data at the same time, and divide the check.
        compare (`bool`): Whether to refuse data whose checked pairs have identical images.
        training (`bool`): `False` center-crops, never flips, keeps prompts and ignores the epoch.
        repeat (`bool`): Whether a stream restarts when it ends, each time with new draws and, if it is shuffled, in a
            new order; training, and resuming, then continue across its end. No effect on map-style sets.
        use_scores (`bool`): Whether to read score columns where present; a row without a score is then a bad row.
        swap_labels (`bool`): Whether the published loser of a pair is its winner from here on, for all that reads it.
        number_columns (`Sequence[str]`): Columns of a map-style set that must have finite numbers; a row without is a
            bad row.
        losers (`str`): `"data"`, those of the data; or `"permute"`, in place of each the winner of a pair of another
            prompt, by a permutation that depends on the seed and the epoch alone.
        name (`str`): Name of the set in messages.

    Returns:
        [`PreferenceDataset`] or, for a `datasets.IterableDataset`, [`PreferenceIterableDataset`].

    Raises:
        ValueError: If an argument, the kind of data set or its columns are not accepted, or if no pair remains.
    """
    verify, reader = parse_verify_images(verify_images), ImageReader((*SCHEMES, *parse_schemes(image_schemes)))
    strict, maker = on_bad_row == "raise", ItemMaker(transform, prompt_dropout, seed, training)
    dataset, is_stream = _recognized(dataset)
    permutes = _check_losers(losers, is_stream=is_stream, buckets=buckets, swap_labels=swap_labels)
    reads = {"verifies": verify == "all", "reads_sizes": buckets is not None or min_side is not None}
    _check_reading(on_bad_row, is_stream, num_proc, name, **reads)
    if is_stream:
        _refuse_number_columns(number_columns, name)
        options: dict[str, Any] = {"strict": strict, "repeat": repeat, "compare": compare}
        streams, weights = _streams(dataset, dataset_format, name, use_scores, swap_labels)
        return PreferenceIterableDataset(streams, maker, reader, weights=weights, name=name, **options)
    source = _source(dataset, dataset_format, name, use_scores, swap_labels, number_columns)
    _refuse_without_losers([source], name, permutes=permutes)
    prepared = PreferenceDataset(source, maker, reader, strict=strict, name=name, permutes=permutes)
    _drop_bad_numbers(prepared, number_columns)
    _check_images(prepared, verify, buckets, min_side, num_proc, peers, compare)
    return prepared


def _recognized(dataset: Any) -> tuple[Any, bool]:
    """A data set, several in a list as a mixture, and whether it is a stream."""
    if isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], TABLES):
        dataset = PairMixture(dataset)
    is_mixture = isinstance(dataset, PairMixture)
    return dataset, dataset.is_stream if is_mixture else isinstance(dataset, datasets.IterableDataset)


def _check_reading(
    on_bad_row: str, is_stream: bool, num_proc: int | None, name: str, *, verifies: bool, reads_sizes: bool
) -> None:
    if on_bad_row not in ("drop", "raise"):
        raise ValueError(f'`on_bad_row` must be "drop" or "raise", got {on_bad_row!r}.')
    if num_proc is not None and (is_stream or not (verifies or reads_sizes)):
        logger.warning(
            "`num_proc=%s` has no effect: it is for checks of all images of a map-style set, or of their sizes.",
            num_proc,
        )
    if is_stream and reads_sizes:
        raise ValueError(
            "`aspect_ratio_buckets` and `min_side` need the sizes of all images before the first batch, and the "
            f"{name} data are a stream, which has none. Load them without `streaming=True`, or leave both out."
        )


def _check_images(
    prepared: PreferenceDataset,
    verify: str,
    buckets: AspectRatioBuckets | None,
    min_side: int | None,
    num_proc: int | None,
    peers: Peers,
    compare: bool,
) -> None:
    """Check all images and their sizes as asked for, draw the losers of pairs none of which is left out any more, and
    check a sample; then log the report."""
    if verify == "all":
        prepared.check_all(num_proc, peers)
    if buckets is not None or min_side is not None:
        prepared.settle_sizes(buckets, min_side, num_proc, peers)
    if prepared.is_permuted:
        prepared.permute_losers()
    if verify != "none" and len(prepared):
        prepared.check_sample(peers, compare=compare)
    _log_report(prepared.report)


def _refuse_number_columns(number_columns: Sequence[str], name: str) -> None:
    if number_columns:
        raise ValueError(WITHOUT_MEAN.format(columns=list(number_columns), name=name))


def _drop_bad_numbers(prepared: PreferenceDataset, number_columns: Sequence[str]) -> None:
    source, _ = prepared.origins()
    for column in number_columns:
        prepared.drop_bad_rows(numbers_of_rows(source.values(column), column)[1])


def _check_losers(losers: str, *, is_stream: bool, buckets: AspectRatioBuckets | None, swap_labels: bool) -> bool:
    """Whether losers are permuted; `ValueError` where they cannot be."""
    if losers not in ("data", "permute"):
        raise ValueError(f'`losers` must be "data" or "permute", got {losers!r}.')
    reasons = {
        "the data are a stream, of which a row knows only the rows of its buffer, and losers would depend on what was "
        "read. Load them without `streaming=True`": is_stream,
        "`aspect_ratio_buckets` train a pair at the winner's size, to which a loser of another aspect ratio would be "
        "cropped more than winners ever are. Leave the buckets off": buckets is not None,
        "`swap_labels` would make the image of another prompt the winner. Leave it off": swap_labels,
    }
    for reason, holds in reasons.items():
        if losers == "permute" and holds:
            raise ValueError(f"`losers='permute'` cannot act: {reason}.")
    return losers == "permute"


def _refuse_without_losers(parts: Sequence[Any], name: str, *, permutes: bool) -> None:
    if not permutes and not all(part.format.has_losers for part in parts):
        others = "\n".join(f"  {known.describe()}" for known in FORMATS.values() if known.has_losers)
        raise ValueError(
            f"The {name} data have captions and no losers (format `captioned`). Train with `losers='permute'`, where "
            "the loser of an image is that of another caption, or rename columns so that they match one of:\n" + others
        )


def _log_report(report: DataReport) -> None:
    if not report.pairs:
        raise ValueError(f"No pair is left to train on. Check the labels and images of the data set.\n{report}")
    noteworthy = report.dropped or any(note.startswith(ENLARGED) for note in report.notes)
    logger.log(logging.WARNING if noteworthy else logging.INFO, "%s", report)


def _streams(
    dataset: Any, dataset_format: str | None, name: str, use_scores: bool, swap_labels: bool
) -> tuple[list[Stream], Sequence[float] | None]:
    parts = [
        Stream(part, part_format, part_name, use_scores)
        for _, part, part_format, part_name in _parts(dataset, dataset_format, name)
    ]
    _refuse_without_losers(parts, name, permutes=False)  # which streams cannot
    for stream in parts:
        stream.format = replace(stream.format, is_swapped=swap_labels)
    return parts, dataset.weights if isinstance(dataset, PairMixture) else None


def _source(
    dataset: Any,
    dataset_format: str | None,
    name: str,
    use_scores: bool,
    swap_labels: bool,
    number_columns: Sequence[str],
) -> Source:
    parts = {
        label: make_source(part, part_format, part_name, use_scores, number_columns)
        for label, part, part_format, part_name in _parts(dataset, dataset_format, name)
    }
    for source in parts.values():
        source.format = replace(source.format, is_swapped=swap_labels)
    return MixedSource(parts, dataset.weights) if isinstance(dataset, PairMixture) else parts[name]


def _parts(dataset: Any, dataset_format: str | None, name: str) -> list[tuple[str, Any, str | None, str]]:
    """A data set, or each of a mixture's: its label, its rows, its format as given, and its name in messages."""
    if not isinstance(dataset, PairMixture):
        return [(name, dataset, dataset_format, name)]
    return [
        (label, part, dataset.format_of(number, dataset_format), f"{name} ({label})")
        for number, (label, part) in enumerate(dataset.parts.items())
    ]
