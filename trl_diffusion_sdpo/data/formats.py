"""Formats of published preference sets, and the pairs that their labels describe. `FORMATS` has one entry per format.

A format reads one score per image from a row; larger is better. One function turns scores into winners, losers and
ties. No image is read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, groupby
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

LARGEST = 1e9  # a larger score or weight would outweigh all other pairs together
SOURCE_COLUMNS = ("source_image", "source")  # images that prompts edit; the first one present is read
# (kind of drop, row, reason, amount): counts the drop, or raises
Reject = Callable[[str, int, str, int], object]

ALONE_IN_GROUP, JUDGED_EQUAL = "one image alone: nothing to compare it with", "images judged equal"


class PairReference(NamedTuple):
    """Images of a pair. Each is given by its row in the source and its index within the row."""

    winner_row: int
    winner_image: int
    loser_row: int
    loser_image: int
    scores: tuple[float, float] | None

    def swapped(self) -> PairReference:
        """Return the pair with winner and loser swapped. Scores change sign, so that larger scores are still better."""
        scores = None if self.scores is None else (-self.scores[1], -self.scores[0])
        return PairReference(self.loser_row, self.loser_image, self.winner_row, self.winner_image, scores)


@dataclass(frozen=True)
class PreferenceFormat:
    """Columns of prompts, images and labels in one kind of preference set.

    Attributes:
        name (`str`): Key in `FORMATS`.
        prompt_columns (`tuple[str, ...]`): Accepted names of the prompt column; the first one present is read.
        image_columns (`tuple[str, ...]`): The two image columns, or the single one.
        other_image_columns (`tuple[str, ...]`): Other accepted names of the single one; the first one present is read.
        label_readers (`Mapping`): Label columns to the function that turns their values into `ImageScores`, in order
            of preference. A row uses the first one whose columns are all present and filled.
        images_in_list (`bool`): The single image column holds a list of images.
        group_column (`str`, *optional*): Rows of one image each are compared within equal values of this column.
        validity_column (`str`, *optional*): If present and false, the row has no label.
        score_columns (`tuple[str, str]`, *optional*): Reward scores of winner and loser, read if present.
        text_members (`bool`): Prompts are members of an archive. They may be bytes, or end in a newline.
        prompt_of_each_image (`bool`): `prompt_columns` are the prompts of the two images, in place of one prompt.
        has_losers (`bool`): Whether rows have a loser. Otherwise a pair's loser is the winner of another.
        is_swapped (`bool`): Whether the published loser is the winner of a pair.
        mask_columns (`tuple[str, ...]`): The mask column of the row, or one for each of two image columns; empty
            without masks.
        source_columns (`tuple[str, ...]`): The column of the image, or of the list of images, that is edited; empty
            without sources.
    """

    name: str
    prompt_columns: tuple[str, ...]
    image_columns: tuple[str, ...]
    label_readers: Mapping[tuple[str, ...], Callable[[Sequence[Any]], ImageScores]]
    other_image_columns: tuple[str, ...] = ()
    images_in_list: bool = False
    group_column: str | None = None
    validity_column: str | None = None
    score_columns: tuple[str, str] | None = None
    text_members: bool = False
    prompt_of_each_image: bool = False
    has_losers: bool = True
    is_swapped: bool = False
    mask_columns: tuple[str, ...] = ()
    source_columns: tuple[str, ...] = ()
    _text_columns: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names: list[str | None] = [*self.prompt_columns, *(c for columns in self.label_readers for c in columns)]
        names += [self.group_column, self.validity_column, *(self.score_columns or ())]
        object.__setattr__(self, "_text_columns", tuple(dict.fromkeys(n for n in names if n is not None)))

    def missing(self, column_names: Iterable[str]) -> list[str]:
        """Return the columns that this format needs and `column_names` lacks."""
        present = set(column_names)
        lacking = [column for column in (*self.image_columns, self.group_column) if column and column not in present]
        if present.intersection(self.other_image_columns):
            lacking = [column for column in lacking if column not in self.image_columns]
        if self.prompt_of_each_image:
            lacking += [column for column in self.prompt_columns if column not in present]
        elif not present.intersection(self.prompt_columns):
            lacking.append(" or ".join(self.prompt_columns))
        if not any(present.issuperset(columns) for columns in self.label_readers):
            lacking.append(" or ".join("+".join(columns) for columns in self.label_readers))
        return lacking

    def text_columns(self, column_names: Iterable[str]) -> list[str]:
        """Return the columns that this format reads besides images."""
        present = set(column_names)
        return [column for column in self._text_columns if column in present]

    def prompt_column(self, column_names: Iterable[str]) -> str:
        """Return the column of prompts. If each image has its own prompt, it is that of the published winners."""
        present = set(column_names)
        return next(column for column in self.prompt_columns if column in present)

    def read_prompt_columns(self, column_names: Iterable[str]) -> list[str]:
        """Return all columns of prompts that are read: one, or one for each image."""
        return list(self.prompt_columns) if self.prompt_of_each_image else [self.prompt_column(column_names)]

    def describe(self) -> str:
        """Return the accepted columns in one line, for error messages."""
        labels = " or ".join("+".join(columns) for columns in self.label_readers)
        prompts = self.prompt_columns if self.prompt_of_each_image else [" or ".join(self.prompt_columns)]
        images = [" or ".join((*self.image_columns, *self.other_image_columns))]
        parts = [*prompts, *(images if self.other_image_columns else self.image_columns), self.group_column, labels]
        return f"{self.name}: " + ", ".join(part for part in parts if part)

    def prompt(self, row: Mapping[str, Any], image: int = 0) -> str:
        """Return the row's prompt, or the prompt of one of its images.

        Raises:
            ValueError: If the prompt is no valid string.
        """
        columns = self.prompt_columns[image : image + 1] if self.prompt_of_each_image else self.prompt_columns
        value = next((row[column] for column in columns if column in row), None)
        if self.text_members:
            value = member_text(value)
        if not isinstance(value, str):
            name = f"`{columns[0]}`" if self.prompt_of_each_image else "the prompt"
            raise ValueError(f"{name} must be a string, got {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt has half a character (a lone surrogate) at {error.start}") from error
        return value

    def prompts(self, row: Mapping[str, Any]) -> list[str]:
        """Return the row's prompt, or the prompts of its images. Raises the errors of `prompt`."""
        return [self.prompt(row, image) for image in range(2 if self.prompt_of_each_image else 1)]

    def image_scores(self, row: Mapping[str, Any]) -> ImageScores:
        """Return the label of a row as one score per image.

        Raises:
            LabelError: If the label is missing or unreadable.
        """
        if self.validity_column is not None and not is_valid(row.get(self.validity_column), self.validity_column):
            raise LabelError(f"`{self.validity_column}` is false")
        if self.group_column is not None and row.get(self.group_column) is None:
            raise LabelError(f"`{self.group_column}` is missing")
        for columns, read in self.label_readers.items():
            values = [row.get(column) for column in columns]
            if all(value is not None for value in values):
                return read(values)
        raise LabelError("no label: " + " or ".join("+".join(columns) for columns in self.label_readers) + " is empty")

    def reward_scores(self, row: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return reward scores of winner and loser, or `None` if there are no score columns.

        Raises:
            LabelError: If the row's scores are not numbers.
        """
        if self.score_columns is None or self.score_columns[0] not in row:
            return None
        winner, loser = (finite_number(row.get(column), column) for column in self.score_columns)
        return winner, loser


# ---- Reading of label columns


class LabelError(ValueError):
    """Error for a row whose label or score is missing or unreadable."""


class ImageScores(NamedTuple):
    """Scores of the images of a row, from its label."""

    values: tuple[float, ...]  # one number per image; larger is better
    ranked: bool = True  # whether equal numbers are a tie; false if nobody compared the images that were not picked


def member_text(value: Any) -> Any:
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
    return text.strip() if isinstance(text, str) else text


def is_valid(value: Any, what: str) -> bool:
    """Convert a value to a boolean. A missing value is true. CSV and JSON files may contain booleans as text."""
    if value is None or value != value:  # NaN, as pandas reads an empty cell
        return True
    word = str(member_text(value)).lower()
    if word in ("true", "1", "1.0", "yes"):
        return True
    if word in ("false", "0", "0.0", "no"):
        return False
    raise LabelError(f"`{what}` must be true or false, got {value!r}")


def finite_number(value: Any, what: str = "label") -> float:
    """Convert a number to a float. The number may be text, or bytes from a member of an archive.

    Raises:
        LabelError: If the value is no number, not finite or larger than `LARGEST`.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise LabelError(f"`{what}` must be a number, got {value!r}") from error
    if not math.isfinite(number):
        raise LabelError(f"`{what}` must be finite, got {number}")
    if abs(number) > LARGEST:
        raise LabelError(f"`{what}` must be between -{LARGEST:g} and {LARGEST:g}, got {number:g}")
    return number


def _numbers(values: Any) -> tuple[float, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise LabelError(f"the label must be a list with one number per image, got {values!r}")
    numbers = tuple(finite_number(value) for value in values)
    if not numbers:
        raise LabelError("the label is an empty list")
    return numbers


def first_is_preferred(_: Sequence[Any]) -> ImageScores:
    return ImageScores((1.0, 0.0))


def larger_is_better(values: Sequence[Any]) -> ImageScores:
    return ImageScores(_numbers(values))


def probability_of_first(values: Sequence[Any]) -> ImageScores:
    first = finite_number(values[0])
    return ImageScores((first, 1.0 - first))


def picked_from_list(values: Sequence[Any]) -> ImageScores:
    return ImageScores(_numbers(values[0]), ranked=False)


def rank_list(values: Sequence[Any]) -> ImageScores:
    return ImageScores(tuple(-rank for rank in _numbers(values[0])))


def rank_of_row(values: Sequence[Any]) -> ImageScores:
    return ImageScores((-finite_number(values[0], "rank"),))


def left_or_right(values: Sequence[Any]) -> ImageScores:
    """Read the vote of EditReward-Data and GenAI-Bench: `leftvote`, `rightvote`, `tie`, `tievote` or `bothbad_vote`."""
    vote = member_text(values[0])
    if vote in ("leftvote", "rightvote"):
        return ImageScores((1.0, 0.0) if vote == "leftvote" else (0.0, 1.0))
    if isinstance(vote, str) and vote.startswith(("tie", "both")):
        return ImageScores((0.0, 0.0))
    raise LabelError(f"`vote_type` must be leftvote, rightvote or tie, got {vote!r}")


def detect_format(column_names: Iterable[str]) -> PreferenceFormat:
    """Return the first of `FORMATS` that fits the columns of a set.

    Raises:
        ValueError: If no format fits, or one of two score columns is missing.
    """
    columns = list(column_names)
    for candidate in FORMATS.values():
        if not candidate.missing(columns):
            _check_scores(candidate, columns)
            _check_prompts(candidate, columns)
            return candidate
    _check_prompts(FORMATS["canonical"], columns)
    raise ValueError(
        f"No known preference format has the columns {columns}. Rename columns (`dataset.rename_columns`) so that "
        "they match one of:\n" + "\n".join(f"  {row_format.describe()}" for row_format in FORMATS.values())
    )


def resolve_format(
    dataset_format: str | None, column_names: Iterable[str], *, use_scores: bool = True
) -> PreferenceFormat:
    """Return the named format, after checking that the columns fit it, or the detected one for `None`.

    With `use_scores=False`, score columns are not read, and a row without a score is valid.
    """
    columns = list(column_names)
    if dataset_format is None:
        row_format = detect_format(columns)
    elif dataset_format not in FORMATS:
        raise ValueError(f"`dataset_format` must be one of {sorted(FORMATS)}, got {dataset_format!r}.")
    else:
        row_format = FORMATS[dataset_format]
        if lacking := row_format.missing(columns):
            raise ValueError(
                f"`dataset_format={dataset_format!r}` needs {row_format.describe()}; the data set has {columns} and "
                f"lacks {lacking}. Rename its columns or leave `dataset_format` out."
            )
        _check_scores(row_format, columns)
    images = [column for column in (*row_format.image_columns, *row_format.other_image_columns) if column in columns]
    row_format = replace(row_format, image_columns=tuple(images[:1])) if row_format.other_image_columns else row_format
    row_format = replace(row_format, mask_columns=_mask_columns(row_format, columns))
    row_format = replace(row_format, source_columns=tuple(name for name in SOURCE_COLUMNS if name in columns)[:1])
    return row_format if use_scores else replace(row_format, score_columns=None)


def compare(scores: Sequence[float], *, ranked: bool = True) -> tuple[list[tuple[int, int]], int]:
    """Return all pairs that a list of image scores implies.

    Args:
        scores (`Sequence[float]`): One number per image; larger is better.
        ranked (`bool`): Whether equal images are ties even if other images of the list differ.

    Returns:
        `tuple`: Pairs `(winner, loser)` of indices into `scores`, and the number of ties.
    """
    pairs, ties = [], 0
    for first, second in combinations(range(len(scores)), 2):
        if scores[first] == scores[second]:
            ties += 1
        else:
            pairs.append((first, second) if scores[first] > scores[second] else (second, first))
    return pairs, ties if ranked or not pairs else 0


def groups(row_format: PreferenceFormat, rows: Iterable[tuple[int, Mapping]]) -> Iterator[list[tuple[int, Mapping]]]:
    """Yield rows whose images are compared with one another: single rows, or consecutive rows of one group."""
    if row_format.group_column is None:
        yield from ([numbered] for numbered in rows)
        return
    for _, group in groupby(rows, key=lambda numbered: numbered[1].get(row_format.group_column)):
        yield list(group)


def pairs_in_group(
    row_format: PreferenceFormat, group: list[tuple[int, Mapping]], reject: Reject
) -> Iterator[PairReference]:
    """Yield the pairs of a group. Bad prompts, bad labels and ties go to `reject`."""
    images: list[tuple[int, int]] = []
    scores: list[Any] = []
    ranked, reward_scores = True, None
    for number, row in group:
        try:
            labels, reward_scores = row_format.image_scores(row), row_format.reward_scores(row)
            row_format.prompts(row)
        except ValueError as error:
            reject("bad_labels" if isinstance(error, LabelError) else "bad_prompts", number, str(error), 1)
            continue
        images += [(number, image) for image in range(len(labels.values))]
        scores += labels.values
        ranked = labels.ranked
    if len(scores) == 1:
        reject("bad_labels", images[0][0], ALONE_IN_GROUP, 1)
    pairs, ties = compare(scores, ranked=ranked)
    if ties:
        reject("ties", images[0][0], JUDGED_EQUAL, ties)
    for winner, loser in pairs:
        pair = PairReference(*images[winner], *images[loser], reward_scores)
        yield pair.swapped() if row_format.is_swapped else pair


def images_of_row(row: Mapping[str, Any], image_columns: Sequence[str], in_list: bool) -> list[Any]:
    """Return the row's undecoded images, in the order of `ImageScores.values`."""
    if not in_list:
        return [row.get(column) for column in image_columns]
    images = row.get(image_columns[0])
    return list(images) if isinstance(images, Iterable) and not isinstance(images, str | bytes | Mapping) else []


def mask_of_row(row: Mapping[str, Any], row_format: PreferenceFormat, image: int) -> Any:
    """Return the undecoded mask of one of the row's images."""
    columns = row_format.mask_columns
    return row.get(columns[image if len(columns) > 1 else 0])


def _mask_columns(row_format: PreferenceFormat, columns: Sequence[str]) -> tuple[str, ...]:
    """Return `mask`, or the mask columns of two image columns, such as `chosen_mask` and `rejected_mask`."""
    of_row = ("mask",) if "mask" in columns else ()
    of_images: tuple[str, ...] = ()
    if len(row_format.image_columns) == 2:
        of_images = tuple(f"{column}_mask" for column in row_format.image_columns)
    present = tuple(column for column in of_images if column in columns)
    if present and (of_row or present != of_images):
        raise ValueError(
            f"Masks must be in one column `mask` or in both of {list(of_images)}; got {[*of_row, *present]}. Rename or "
            "remove columns."
        )
    return of_row or present


def _check_scores(chosen: PreferenceFormat, columns: list[str]) -> None:
    if chosen.score_columns is None:
        return
    present = [column for column in chosen.score_columns if column in columns]
    if len(present) == 1:
        raise ValueError(
            f"Score columns must come in pairs: found `{present[0]}`, expected both of {list(chosen.score_columns)}. "
            "Add the other one or remove it."
        )


def _check_prompts(detected: PreferenceFormat, columns: list[str]) -> None:
    """Refuse data with a prompt column for only one image. Warn if there is also a prompt for both images."""
    present = [column for column in BRANCH_PROMPTS if column in columns]
    if detected.prompt_of_each_image:
        plain = [column for column in _PROMPTS if column in columns]
        if plain:
            logger.warning(
                "`%s` and `%s` are read as the prompts of chosen and rejected images, and `%s` is not read. With "
                "`dataset_format=canonical` it would be the prompt of both.",
                *(*BRANCH_PROMPTS, plain[0]),
            )
    elif len(present) == 1 and detected.image_columns == ("chosen", "rejected"):
        raise ValueError(_ALONE.format(present[0]))


_PROMPTS = ("prompt", "caption", "original_prompt", "text")
BRANCH_PROMPTS = ("chosen_prompt", "rejected_prompt")
_ALONE = (
    f"Prompts of chosen and rejected images must come in pairs: found `{{}}`, expected both of {list(BRANCH_PROMPTS)}. "
    "Add the other one, or name `dataset_format='canonical'` to read one prompt for both images."
)

# If a set fits two formats, the earlier one is taken.
FORMATS: dict[str, PreferenceFormat] = {
    row_format.name: row_format
    for row_format in (
        PreferenceFormat(
            name="branch_prompts",
            prompt_columns=BRANCH_PROMPTS,
            image_columns=("chosen", "rejected"),
            label_readers={(): first_is_preferred},
            score_columns=("chosen_score", "rejected_score"),
            prompt_of_each_image=True,
        ),
        PreferenceFormat(
            name="canonical",
            prompt_columns=_PROMPTS,
            image_columns=("chosen", "rejected"),
            label_readers={(): first_is_preferred},
            score_columns=("chosen_score", "rejected_score"),
        ),
        PreferenceFormat(
            name="pickapic",
            prompt_columns=("caption", "prompt", "original_prompt", "text"),
            image_columns=("jpg_0", "jpg_1"),
            label_readers={("label_0", "label_1"): larger_is_better, ("label_0",): probability_of_first},
            validity_column="has_label",
        ),
        PreferenceFormat(
            name="pickapic_webdataset",
            prompt_columns=("original_prompt.txt", "caption.txt", "prompt.txt"),
            image_columns=("jpg_0.jpg", "jpg_1.jpg"),
            label_readers={("label_0.txt", "label_1.txt"): larger_is_better, ("label_0.txt",): probability_of_first},
            text_members=True,
        ),
        PreferenceFormat(
            name="hpdv2",
            prompt_columns=_PROMPTS,
            image_columns=("image_path",),
            label_readers={("human_preference",): picked_from_list, ("rank",): rank_list},
            images_in_list=True,
        ),
        PreferenceFormat(
            name="hpdv3",
            prompt_columns=_PROMPTS,
            image_columns=("path1", "path2"),
            label_readers={(): first_is_preferred},
        ),
        PreferenceFormat(
            name="imagerewarddb",
            prompt_columns=_PROMPTS,
            image_columns=("image",),
            label_readers={("rank",): rank_of_row},
            group_column="prompt_id",
        ),
        PreferenceFormat(
            name="rapidata",
            prompt_columns=_PROMPTS,
            image_columns=("image1", "image2"),
            label_readers={
                ("weighted_results_image1_preference", "weighted_results_image2_preference"): larger_is_better,
                ("votes_image1", "votes_image2"): larger_is_better,
            },
        ),
        PreferenceFormat(
            name="editreward",
            prompt_columns=("instruction", *_PROMPTS),
            image_columns=("left_image", "right_image"),
            label_readers={("vote_type",): left_or_right},
        ),
        PreferenceFormat(
            name="captioned",
            prompt_columns=_PROMPTS,
            image_columns=("image",),
            other_image_columns=("jpg", "png"),
            label_readers={(): first_is_preferred},  # losers come from other rows
            has_losers=False,
        ),
    )
}
