"""Formats of preference data: which columns a row has, and which pairs follow from its labels.

`FORMATS` has one entry per format. A format turns a row's label into one score per image, larger is better, and
[`compare`] turns scores into winners, losers and ties. No images are read here.

Whatever else can be trained on has rows in one of these formats: lines of Flow-Factory become rows of `canonical`
([`flow_factory_row`]), and folders of images become rows of `canonical`, or of `hpdv2` if their names are ranked
(`image_folders.py`). A stream has a table's rows, one after the other (`streaming.py`). `loading.py`, which looks at no
label, finds files and names of images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any, NamedTuple

from ..utils.errors import UserError
from ..utils.score_scale import SCALE_COLUMN, ScoreReading, ScoreScale

logger = logging.getLogger(__name__)

SOURCE_COLUMNS = ("source_image", "source")  # columns of images to edit; the first that exists is read
SEED_COLUMNS = ("chosen_noise_seed", "rejected_noise_seed")  # seeds of the CPU generators that drew the images' noise
TEXT = ("string", "large_string")
LARGEST = 1e9  # a larger score or weight would outweigh all other pairs together
SHOWN = 60  # characters of a prompt in a reason
VALID = ("true", "1", "1.0", "yes")  # words of a validity column
INVALID = ("false", "0", "0.0", "no")
LIKED = ("true", "1", "1.0", "yes", "up", "like", "liked", "good")
DISLIKED = ("false", "0", "0.0", "-1", "-1.0", "no", "down", "dislike", "disliked", "bad")
# Longest prompt, in characters. Text encoders read 77 to 1024 tokens of about 4 characters, so at 16 characters a token
# nothing that they read is cut off. Longer texts, such as a book, would take minutes and gigabytes to tokenize.
LONGEST_PROMPT = 1024 * 16
# Counts dropped rows or pairs: kind of drop, row, reason, amount.
Reject = Callable[[str, int, str, int], object]


class PairReference(NamedTuple):
    """The two images of a pair, each by its row and its number within the row."""

    winner_row: int
    winner_image: int
    loser_row: int
    loser_image: int
    scores: tuple[float, float] | None

    def swapped(self) -> PairReference:
        """Return the pair with winner and loser exchanged, and scores negated: the worse image now counts as better."""
        scores = None if self.scores is None else (-self.scores[1], -self.scores[0])
        return PairReference(self.loser_row, self.loser_image, self.winner_row, self.winner_image, scores)


@dataclass(frozen=True)
class PreferenceFormat:
    """Columns of prompts, images and labels in one kind of data set.

    Attributes:
        name (`str`): Key in `FORMATS`.
        prompt_columns (`tuple[str, ...]`): Accepted prompt columns. The first that exists is read.
        image_columns (`tuple[str, ...]`): The two image columns, or the single one.
        other_image_columns (`tuple[str, ...]`): Further accepted names of a single image column.
        label_readers (`Mapping`): From label columns to a function that makes `ImageScores` of their values. A row uses
            the first entry whose columns all have a value.
        images_in_list (`bool`): Whether the single image column has lists of images.
        group_column (`str`, *optional*): Column whose equal values group rows, in formats with one image a row. Images
            of a group are compared.
        validity_column (`str`, *optional*): Column that is false in rows without a valid label, which are dropped.
        score_columns (`tuple[str, str]`, *optional*): Columns of the reward scores of winner and loser.
        scale_column (`str`, *optional*): Column that says the scale of the reward scores.
        score_reading (`ScoreReading`): How the run reads reward scores.
        text_members (`bool`): Whether prompts are text files in an archive, which may be bytes, or end in a newline.
        prompt_of_each_image (`bool`): Whether `prompt_columns` are two, one for each image.
        has_losers (`bool`): Whether rows have a loser. Without, `losers="permute"` must be set, which makes losers of
            other pairs' winners.
        single_images (`bool`): Whether a row has one image and a verdict on it. `single_images.py` matches it with that
            of another row.
        score_threshold (`float`, *optional*): Score from which on a single image is liked.
        is_swapped (`bool`): Whether the winner of a pair is the image that the data set calls the loser.
        mask_columns (`tuple[str, ...]`): The mask column for both images, or one for each of the two image columns.
            Empty without masks.
        source_columns (`tuple[str, ...]`): The column with the source image or images that the prompt edits. Empty
            without source images.
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
    scale_column: str | None = None
    score_reading: ScoreReading = ScoreReading()
    text_members: bool = False
    prompt_of_each_image: bool = False
    has_losers: bool = True
    single_images: bool = False
    score_threshold: float | None = None
    is_swapped: bool = False
    mask_columns: tuple[str, ...] = ()
    source_columns: tuple[str, ...] = ()

    @property
    def has_image_scores(self) -> bool:
        """Whether scores say which single images are liked, in a format of [`resolve_format`]."""
        return ("score",) in self.label_readers

    def missing(self, column_names: Iterable[str]) -> list[str]:
        """Return the columns that this format needs and `column_names` lack."""
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
        """Return those of `column_names` that this format reads, except images."""
        labels = [column for columns in self.label_readers for column in columns]
        others = [self.group_column, self.validity_column, self.scale_column, *(self.score_columns or ())]
        present = set(column_names)
        return [column for column in dict.fromkeys((*self.prompt_columns, *labels, *others)) if column in present]

    def describe(self) -> str:
        """Return one line with the columns of this format, for error messages."""
        labels = " or ".join("+".join(columns) for columns in self.label_readers)
        prompts = self.prompt_columns if self.prompt_of_each_image else [" or ".join(self.prompt_columns)]
        images = [" or ".join((*self.image_columns, *self.other_image_columns))]
        columns = [*prompts, *(images if self.other_image_columns else self.image_columns), self.group_column, labels]
        return f"{self.name}: " + ", ".join(column for column in columns if column)

    def prompt(self, row: Mapping[str, Any], image: int = 0) -> str:
        """Return the prompt of a row, or of one image if each has its own, cut off after `LONGEST_PROMPT` characters.

        Raises:
            ValueError: If the prompt is not a valid string.
        """
        return self.whole_prompt(row, image)[:LONGEST_PROMPT]

    def whole_prompt(self, row: Mapping[str, Any], image: int = 0) -> str:
        """Return the prompt as `prompt` does, but whole."""
        column = self.prompt_columns[image if self.prompt_of_each_image else 0]
        value = row.get(column)
        if self.text_members:
            value = member_text(value)
        if not isinstance(value, str):
            name = f"`{column}`" if self.prompt_of_each_image else "the prompt"
            raise UserError(f"{name} must be a string, got {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt has an invalid character (lone surrogate) at index {error.start}") from error
        return value

    def image_scores(self, row: Mapping[str, Any]) -> ImageScores:
        """Return one score per image, from the label of a row.

        Raises:
            LabelError: If the label is missing or unreadable.
        """
        is_valid = member_text(row.get(self.validity_column)) if self.validity_column is not None else None
        word = str(is_valid).lower()
        if word in INVALID:
            raise LabelError(f"`{self.validity_column}` is false")
        if is_valid is not None and word not in VALID:
            raise LabelError(f"`{self.validity_column}` must be true or false, got {is_valid!r}")
        if self.group_column is not None and row.get(self.group_column) is None:
            raise LabelError(f"`{self.group_column}` is missing")
        for columns, read in self.label_readers.items():
            values = [row.get(column) for column in columns]
            if all(value is not None for value in values):
                return read(values)
        raise LabelError("no label: " + " or ".join("+".join(columns) for columns in self.label_readers) + " is empty")

    def reward_scores(self, row: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return the reward scores of winner and loser, or `None` without score columns. Scores that say their scale
        are converted to the unit that the run needs.

        Raises:
            LabelError: If the row's scores are not numbers, are beyond their scale's limits, or cannot be converted.
        """
        if self.score_columns is None:
            return None
        reading = self.score_reading
        winner, loser = (finite_number(row.get(column), column) for column in self.score_columns)
        try:
            scale = ScoreScale.read(row.get(self.scale_column)) if self.scale_column else reading.assumed
            for score, column in zip((winner, loser), self.score_columns, strict=True):
                scale.check(score, column)
            factor = scale.factor(reading.unit) if self.scale_column else 1.0
        except ValueError as error:
            raise LabelError(str(error)) from None
        return factor * winner, factor * loser


# ---- Reading of label columns


class LabelError(UserError):
    """A row's label or score is missing or unreadable."""


class ImageScores(NamedTuple):
    """Scores of the images of a row, from its label."""

    values: tuple[float, ...]  # one number per image; larger is better
    ranked: bool = True  # whether equal numbers are ties; false if the label only names the best image


def member_text(value: Any) -> Any:
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
    return text.strip() if isinstance(text, str) else text


def finite_number(value: Any, what: str = "label") -> float:
    """Convert a number, or a number written as text or bytes, to a float.

    Raises:
        LabelError: If the value is not a number, not finite, or above `LARGEST` in absolute value.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise LabelError(f"`{what}` must be a number, got {value!r}") from error
    if not math.isfinite(number):
        raise LabelError(f"`{what}` must be finite, got {number}")
    if abs(number) > LARGEST:
        raise LabelError(f"`{what}` must be between {-LARGEST:g} and {LARGEST:g}, got {number:g}")
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
    if not 0 <= first <= 1:
        raise LabelError(f"the label of the first image must be in [0, 1] if it is the only one, got {first:g}")
    return ImageScores((first, 1.0 - first))


def picked_from_list(values: Sequence[Any]) -> ImageScores:
    return ImageScores(_numbers(values[0]), ranked=False)


def rank_list(values: Sequence[Any]) -> ImageScores:
    return ImageScores(tuple(-rank for rank in _numbers(values[0])))


def rank_of_row(values: Sequence[Any]) -> ImageScores:
    return ImageScores((-finite_number(values[0], "rank"),))


def liked_or_disliked(values: Sequence[Any]) -> ImageScores:
    """Return 1 for an image that a word or number of `LIKED` calls liked, and 0 for one of `DISLIKED`."""
    word = str(member_text(values[0])).lower()
    if word not in (*LIKED, *DISLIKED):
        raise LabelError(
            f"`label` must be true or false, or one of {', '.join((*LIKED, *DISLIKED))}; got {values[0]!r}"
        )
    return ImageScores((float(word in LIKED),))


def score_of_row(values: Sequence[Any]) -> ImageScores:
    return ImageScores((finite_number(values[0], "score"),))


def left_or_right(values: Sequence[Any]) -> ImageScores:
    """Return scores for a vote of EditReward-Data or GenAI-Bench: `leftvote`, `rightvote`, `tie...` or `both...`."""
    vote = member_text(values[0])
    if vote in ("leftvote", "rightvote"):
        return ImageScores((1.0, 0.0) if vote == "leftvote" else (0.0, 1.0))
    if isinstance(vote, str) and vote.startswith(("tie", "both")):
        return ImageScores((0.0, 0.0))
    raise LabelError(f"`vote_type` must be leftvote, rightvote or tie, got {vote!r}")


def detect_format(column_names: Iterable[str], *, reads_verdicts: bool = True) -> PreferenceFormat:
    """Return the first format in `FORMATS` whose required columns all exist, without `reads_verdicts` except that of
    single images.

    Raises:
        ValueError: If the columns match no format.
    """
    columns = list(column_names)
    for candidate in FORMATS.values():
        if not candidate.missing(columns) and (reads_verdicts or not candidate.single_images):
            return candidate
    raise UserError(
        f"The columns {columns} match no known preference format. Rename columns (`dataset.rename_columns`) to "
        "match one of these formats:\n" + "\n".join(f"  {row_format.describe()}" for row_format in FORMATS.values())
    )


def resolve_format(
    dataset_format: str | None,
    column_names: Iterable[str],
    features: Mapping[str, Any] | None = None,
    *,
    use_scores: bool = True,
    score_reading: ScoreReading | None = None,
    is_swapped: bool = False,
    reads_verdicts: bool = True,
    score_threshold: float | None = None,
) -> PreferenceFormat:
    """Return the format of a data set, by default detected from its columns, reduced to those that exist.

    Args:
        features (`Mapping[str, Any]`, *optional*): Types of the columns. A column `source` with text is not read as an
            image to edit, because it usually names the origin of a row.
        use_scores (`bool`): Whether to read score columns. Every row then needs scores.
        score_reading (`ScoreReading`, *optional*): How the run reads scores.
        is_swapped (`bool`): Whether to exchange winner and loser of every pair.
        reads_verdicts (`bool`): Whether the format of single images may be detected. Without, they are `captioned`.
        score_threshold (`float`, *optional*): Score from which on a single image is liked.

    Raises:
        ValueError: If the columns do not fit the format, or both the data and a setting say the scale of scores.
    """
    columns = list(column_names)
    if dataset_format is None:
        row_format = detect_format(columns, reads_verdicts=reads_verdicts)
        alone = [column for column in BRANCH_PROMPTS if column in columns]
        if len(alone) == 1 and row_format.image_columns == ("chosen", "rejected"):
            raise UserError(
                f"Prompts of chosen and rejected images must be in both of the columns {list(BRANCH_PROMPTS)}. The "
                f"data have only `{alone[0]}`. Add the other column, or set `dataset_format='canonical'` to read one "
                "prompt for both images."
            )
    elif dataset_format not in FORMATS:
        raise UserError(f"`dataset_format` must be one of {sorted(FORMATS)}, got {dataset_format!r}.")
    else:
        row_format = FORMATS[dataset_format]
        if lacking := row_format.missing(columns):
            raise UserError(
                f"`dataset_format={dataset_format!r}` needs {row_format.describe()}; the data set has {columns} and "
                f"lacks {lacking}. Rename columns, or leave `dataset_format` unset."
            )
    image_columns = row_format.image_columns
    prompt_columns = row_format.prompt_columns
    if row_format.other_image_columns:
        names = (*image_columns, *row_format.other_image_columns)
        image_columns = tuple(name for name in names if name in columns)[:1]
    if not row_format.prompt_of_each_image:
        prompt_columns = tuple(name for name in prompt_columns if name in columns)[:1]
    source_columns = tuple(name for name in SOURCE_COLUMNS if name in columns)[:1]
    if source_columns == ("source",) and getattr((features or {}).get("source"), "dtype", None) in TEXT:
        source_columns = ()
    if row_format.single_images:  # one column judges all rows
        column = next(names for names in row_format.label_readers if set(names) <= set(columns))
        row_format = replace(row_format, label_readers={column: row_format.label_readers[column]})
        if row_format.has_image_scores:
            row_format = replace(row_format, score_threshold=score_threshold)
    has_scores = use_scores and row_format.score_columns is not None and set(row_format.score_columns) <= set(columns)
    reading = score_reading or ScoreReading()
    is_described = has_scores and SCALE_COLUMN in columns
    if is_described and reading.typed is not None:
        raise UserError(
            f"The scale of scores must be said once. The data say it in the column `{SCALE_COLUMN}`, and the settings "
            f"say `{reading.typed}`. Leave the setting out."
        )
    if has_scores and not is_described and reading.advice is not None:
        logger.warning(reading.advice)
    return replace(
        row_format,
        image_columns=image_columns,
        prompt_columns=prompt_columns,
        mask_columns=_mask_columns(row_format, columns),
        source_columns=source_columns,
        score_columns=row_format.score_columns if has_scores else None,
        scale_column=SCALE_COLUMN if is_described else None,
        score_reading=reading,
        is_swapped=is_swapped,
    )


def compare(scores: Sequence[float], *, ranked: bool = True) -> tuple[list[tuple[int, int]], int]:
    """Return all pairs of winner and loser among some images, by their scores.

    Args:
        scores (`Sequence[float]`): One number per image; larger is better.
        ranked (`bool`): Whether every two images with equal scores are a tie. Otherwise, ties are counted only if all
            scores are equal.

    Returns:
        `tuple`: Pairs `(winner, loser)` of indices into `scores`, and the number of ties.
    """
    pairs = []
    ties = 0
    for first, second in combinations(range(len(scores)), 2):
        if scores[first] == scores[second]:
            ties += 1
        else:
            pairs.append((first, second) if scores[first] > scores[second] else (second, first))
    return pairs, ties if ranked or not pairs else 0


def groups(row_format: PreferenceFormat, rows: Iterable[tuple[int, Mapping]]) -> Iterator[list[tuple[int, Mapping]]]:
    """Yield lists of rows whose images are compared: one row, or consecutive rows of a group."""
    if row_format.group_column is None:
        yield from ([numbered] for numbered in rows)
        return
    for _, group in groupby(rows, key=lambda numbered: numbered[1].get(row_format.group_column)):
        yield list(group)


def pairs_in_group(
    row_format: PreferenceFormat, group: list[tuple[int, Mapping]], reject: Reject
) -> Iterator[PairReference]:
    """Yield the pairs of a group of rows. Call `reject` for bad prompts, bad labels and ties."""
    if row_format.single_images:  # `match_in_order` has read them, and the winner comes first
        (winner_row, _), (loser_row, _) = group
        yield PairReference(winner_row, 0, loser_row, 0, None)
        return
    images: list[tuple[int, int]] = []
    scores: list[Any] = []
    ranked = True
    reward_scores = None
    prompt_of_group = None
    for number, row in group:
        try:
            labels = row_format.image_scores(row)
            reward_scores = row_format.reward_scores(row)
            prompts = [
                row_format.whole_prompt(row, image) for image in range(2 if row_format.prompt_of_each_image else 1)
            ]
            prompt_of_group = prompts[0] if prompt_of_group is None else prompt_of_group
            if len(group) > 1 and prompts[0].strip() != prompt_of_group.strip():
                raise UserError(
                    f"the prompt differs from that of other rows with this `{row_format.group_column}`: "
                    f"{prompts[0][:SHOWN]!r} and {prompt_of_group[:SHOWN]!r}"
                )
        except ValueError as error:
            reject("bad_labels" if isinstance(error, LabelError) else "bad_prompts", number, str(error), 1)
            continue
        if max(map(len, prompts)) > LONGEST_PROMPT:
            reject("cut_prompts", number, f"only the first {LONGEST_PROMPT} characters of the prompt are read", 1)
        images += [(number, image) for image in range(len(labels.values))]
        scores += labels.values
        ranked = labels.ranked
    if len(scores) == 1:
        reject("bad_labels", images[0][0], "the group has a single image, so there is no image to compare it with", 1)
    pairs, ties = compare(scores, ranked=ranked)
    if ties:
        reject("ties", images[0][0], "images judged equal", ties)
    for winner, loser in pairs:
        pair = PairReference(*images[winner], *images[loser], reward_scores)
        yield pair.swapped() if row_format.is_swapped else pair


def _mask_columns(row_format: PreferenceFormat, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the mask columns that exist: `mask`, or one for each image column, such as `chosen_mask`."""
    of_row = ("mask",) if "mask" in columns else ()
    of_images: tuple[str, ...] = ()
    if len(row_format.image_columns) == 2:
        of_images = tuple(f"{column}_mask" for column in row_format.image_columns)
    present = tuple(column for column in of_images if column in columns)
    if present and (of_row or present != of_images):
        raise UserError(
            f"Masks must be in one column `mask` or in both of {list(of_images)}; got {[*of_row, *present]}. Rename or "
            "remove mask columns."
        )
    return of_row or present


_PROMPTS = ("prompt", "caption", "original_prompt", "text")
BRANCH_PROMPTS = ("chosen_prompt", "rejected_prompt")

# The first format that matches the columns is used.
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
            name="single_images",
            prompt_columns=_PROMPTS,
            image_columns=("image",),
            other_image_columns=("jpg", "png"),
            label_readers={("label",): liked_or_disliked, ("score",): score_of_row},
            single_images=True,
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

_IMAGES = [name for each in FORMATS.values() for name in (*each.image_columns, *each.other_image_columns)]
_MASKS = ("mask", *(f"{name}_mask" for name in _IMAGES))
IMAGE_COLUMNS = tuple(dict.fromkeys((*_IMAGES, *SOURCE_COLUMNS, *_MASKS)))  # of all formats
PROMPT_COLUMNS = tuple(dict.fromkeys(name for each in FORMATS.values() for name in each.prompt_columns))


# ---- Flow-Factory's JSONL (`schema_version` 2), whose columns are nested

FLOW_FACTORY_COLUMNS = ("schema_version", "input", "supervision")


def flow_factory_row(row: Mapping[str, Any], *, has_sources: bool) -> dict[str, Any]:
    """Convert a line of Flow-Factory to a row of the format `canonical`. If it is no pair, its prompt becomes `None`,
    which drops it later."""
    task = row["supervision"] or {}
    is_pair = task.get("type") == "preference"
    flat: dict[str, Any] = {"prompt": (row["input"] or {}).get("prompt") if is_pair else None}
    for side in ("chosen", "rejected"):
        flat[side] = next(iter(flow_factory_images(task.get(side))), None)
    if has_sources:
        flat["source_image"] = flow_factory_images(row["input"])
    return flat


def flow_factory_images(message: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the images in a Flow-Factory message."""
    media = (message or {}).get("media") or []
    return [medium["path"] for medium in media if medium.get("type") == "image"]
