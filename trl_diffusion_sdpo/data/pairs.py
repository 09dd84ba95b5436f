"""Makes training pairs out of any preference set: an index over label columns, built without touching a pixel, and two
torch data sets that read, check and transform the images behind it."""

import logging
from collections.abc import Sequence
from typing import Any

import datasets

from .checking import ALONE, Peers, verify_choice
from .images import SCHEMES, ImageReader, settled_schemes
from .map_style import PreferenceDataset
from .report import COUNTS, DataReport
from .sources import make_source
from .streaming import PreferenceIterableDataset
from .transforms import ItemMaker, PairTransform

__all__ = ["COUNTS", "DataReport", "PreferenceDataset", "PreferenceIterableDataset", "prepare_dataset"]

logger = logging.getLogger(__name__)


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
    peers: Peers = ALONE,
    compare: bool = True,
    training: bool = True,
    repeat: bool = False,
    use_scores: bool = True,
    name: str = "train",
) -> "PreferenceDataset | PreferenceIterableDataset":
    """A torch data set of pairs over any preference set.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, map-style torch data set or sequence of dicts):
            In one of `FORMATS`.
        transform (`PairTransform`): How images become pixels.
        prompt_dropout (`float` in `[0, 1]`): Probability of an empty prompt.
        seed (`int`, not negative): Start of every random draw.
        dataset_format (`str`, *optional*): A key of `FORMATS`; detected from the columns by default.
        on_bad_row (`str`): `"drop"` leaves bad prompts, bad labels and undecodable images out and counts them;
            `"raise"` stops at the first. Ties are no bad rows: they are left out and counted either way.
        verify_images (`str`): Which images of a map-style set to decode up front: `"sample"`, those of
            `SAMPLED_PAIRS` pairs spread over it; `"all"`, with a progress bar, cached by `datasets`; `"none"`. `True`
            is all, `False` none. Any other bad image is noticed when its turn comes. The next good pair stands in for
            a bad one, unless all were looked at: then there are none.
        num_proc (`int`, *optional*): Processes that check all images; as many as there are cores if unset.
        image_schemes (`str` or `Sequence[str]`, *optional*): Of URLs that rows may name besides those of `SCHEMES`,
            such as `"s3"`.
        peers (`Peers`): The processes that prepare the same data at this time, and share the check.
        compare (`bool`): Whether to refuse data whose pairs are twice the same image, as far as they are looked at.
        training (`bool`): `False` crops in the middle, never flips, keeps prompts and ignores the epoch.
        repeat (`bool`): Whether a stream begins anew when it ends, each time with other draws and, if it is shuffled,
            in another order; a run then goes on, and resumes, across its end. No effect on map-style sets.
        use_scores (`bool`): Whether to read score columns where there are some; without a score, a row then is bad.
        name (`str`): What to call the set in messages.

    Returns:
        [`PreferenceDataset`] or, for a `datasets.IterableDataset`, [`PreferenceIterableDataset`].

    Raises:
        ValueError: If an argument, the kind of data set or its columns are not accepted, or if no pair remains.
    """
    if on_bad_row not in ("drop", "raise"):
        raise ValueError(f'`on_bad_row` must be "drop" or "raise", got {on_bad_row!r}.')
    verify = verify_choice(verify_images)
    strict, maker = on_bad_row == "raise", ItemMaker(transform, prompt_dropout, seed, training)
    reader = ImageReader((*SCHEMES, *settled_schemes(image_schemes)))
    if num_proc is not None and (verify != "all" or isinstance(dataset, datasets.IterableDataset)):
        logger.warning("`num_proc=%s` has no effect: it serves the check of all images of a map-style set.", num_proc)
    if isinstance(dataset, datasets.IterableDataset):
        options = {"strict": strict, "repeat": repeat, "use_scores": use_scores, "compare": compare, "name": name}
        return PreferenceIterableDataset(dataset, maker, reader, dataset_format, **options)
    source = make_source(dataset, dataset_format, name, use_scores)
    prepared = PreferenceDataset(source, maker, reader, strict=strict, name=name)
    if verify == "all":
        prepared.check_all(num_proc, peers)
    if verify != "none" and len(prepared):
        prepared.check_sample(peers, compare=compare)
    report = prepared.report
    if not report.pairs:
        raise ValueError(f"No pair is left to train on. Check the labels and images of the data set.\n{report}")
    logger.log(logging.WARNING if report.dropped else logging.INFO, "%s", report)
    return prepared
