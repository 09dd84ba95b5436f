"""Calibrated scores of images, and loss weights of pairs from scores or from a column of weights."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..losses import WEIGHT_FUNCTIONS, calibrated_scores, with_mean_one
from ..losses.pair_weights import WeightFunction
from ..utils.errors import UserError
from ..utils.processes import ALONE, Peers
from .dataset import PreferenceDataset
from .images import ImageReader, UndecodableImageError
from .number_columns import numbers_of_rows
from .sources import PairSource

logger = logging.getLogger(__name__)

COMPARED_AT_ONCE = 1 << 22  # most comparisons of two images in memory at a time
SCORER_COLUMNS = ("chosen_scores", "rejected_scores")  # lists with one score per scorer


@dataclass(frozen=True)
class ScoreSettings:
    """How the loss and the pair weights use the scores of images.

    Args:
        pair_weights (`str`, *optional*): A key of [`~trl_diffusion_sdpo.losses.WEIGHT_FUNCTIONS`], or the name of a
            column with weights.
        calibrated (`bool`): Whether to replace scores by calibrated ones: each image's expected share of wins against
            the other images of its prompt.
        sorts_by_scores (`bool`): Whether the loss regards the image with the higher score as the winner.
    """

    pair_weights: str | None = None
    calibrated: bool = False
    sorts_by_scores: bool = False

    @property
    def _weighting(self) -> WeightFunction | None:
        """The function that `pair_weights` names, or `None` if it is unset or names a column."""
        return WEIGHT_FUNCTIONS.get(self.pair_weights or "")

    @property
    def number_columns(self) -> tuple[str, ...]:
        """Columns of numbers that these settings read besides those of the format."""
        if self.pair_weights is None:
            return ()
        if self._weighting is None:
            return (self.pair_weights,)
        return SCORER_COLUMNS if self._weighting.several_scorers else ()

    @property
    def _reads_score_columns(self) -> bool:
        """Whether weights come from the two score columns of the format."""
        return self._weighting is not None and not self._weighting.several_scorers

    @property
    def needs_scores(self) -> bool:
        """Whether these settings read the score columns."""
        return self.sorts_by_scores or self._reads_score_columns

    @property
    def _calibrates(self) -> bool:
        return self.calibrated and self.needs_scores

    @property
    def needs_all_rows(self) -> tuple[str, ...]:
        """Names of the settings that need the scores or weights of all pairs before the first batch."""
        settings = {"`pair_weights`": self.pair_weights is not None, "`calibrated_scores`": self._calibrates}
        return tuple(name for name, is_set in settings.items() if is_set)

    def apply_to(self, dataset: PreferenceDataset, peers: Peers = ALONE) -> None:
        """Compute and store calibrated scores and pair weights. Call it in all processes together.

        Raises:
            ValueError: If weights are negative or all 0.
        """
        if self.needs_scores:
            self._count_contradictions(dataset, peers)
        if self._calibrates:
            dataset.set_calibrated_scores(peers.first(partial(calibrate, dataset)))
        if self.pair_weights is not None:
            dataset.set_weights(self._weights(dataset))

    def _count_contradictions(self, dataset: PreferenceDataset, peers: Peers) -> None:
        """Note how many pairs have a loser with the higher score."""
        assert dataset.scores is not None
        contradicted = int((dataset.scores[:, 0] < dataset.scores[:, 1]).sum())
        if not contradicted:
            return
        if self.sorts_by_scores:
            effect = "the loss exchanges the two images"
        elif self._weighting is not None and self._weighting.reads_gaps:
            effect = "their gap counts as 0"
        else:
            effect = "the loss keeps their labels"
        note = f"in {contradicted} of {len(dataset)} pairs, the rejected image has the higher score: {effect}"
        dataset.add_note(note)
        if peers.index == 0:
            logger.warning("%s data: %s.", dataset.report.name, note)

    def _weights(self, dataset: PreferenceDataset) -> np.ndarray:
        assert self.pair_weights is not None
        if self._weighting is None:
            weights = _weights_of_column(dataset, self.pair_weights)
        else:
            if self._weighting.several_scorers:
                scores = _scores_of_several(dataset)
            else:
                scores = torch.tensor(dataset.scores)[:, :, None]  # (P, 2, 1)
            weights = self._weighting.function(scores, sorts_by_scores=self.sorts_by_scores)
        if not (weights > 0).any():  # true also for NaN
            raise UserError(
                f"Some pairs must have a weight above 0. With `pair_weights={self.pair_weights!r}` and these scores, "
                f"none of the {len(weights)} pairs of the {dataset.report.name} data has such a weight. Choose other "
                "weights or other scores. For `pair_weights='gain'`, scale the scores down."
            )
        if len(weights) > 1 and (weights == weights[0]).all():
            logger.warning(
                "`pair_weights=%r` has no effect: all pairs of the %s data have the same weight.",
                self.pair_weights,
                dataset.report.name,
            )
        return with_mean_one(weights).numpy()


def _numbers(dataset: PreferenceDataset, column: str) -> torch.Tensor:
    """Return a column's K numbers for each of the P pairs, `(P, K)` in float64."""
    rows = dataset.positions[:, 0]
    if (rows != dataset.positions[:, 2]).any():
        raise UserError(
            f"`pair_weights={column!r}` needs one value for each pair. In the {dataset.report.name} data, the images "
            "of a pair are in two rows. Use a format with one row for each pair."
        )
    return torch.from_numpy(numbers_of_rows(dataset.source.values(column), column)[0][rows])


def _weights_of_column(dataset: PreferenceDataset, column: str) -> torch.Tensor:
    weights = _numbers(dataset, column)
    what = f"`pair_weights={column!r}`"
    if weights.shape[1] != 1:
        raise UserError(
            f"{what} must name a column with one number in each row. The rows have {weights.shape[1]} numbers."
        )
    if negative := int((weights < 0).sum()):
        raise UserError(
            f"{what} must not be negative, because a negative weight would exchange winner and loser. The weight is "
            f"negative for {negative} of {len(weights)} pairs of the {dataset.report.name} data, down to "
            f"{float(weights.min()):g}. Remove these pairs, or give them the weight 0."
        )
    return weights[:, 0]


def _scores_of_several(dataset: PreferenceDataset) -> torch.Tensor:
    """Return the scores of K scorers for winners and losers, `(P, 2, K)`."""
    chosen, rejected = (_numbers(dataset, column) for column in SCORER_COLUMNS)
    if chosen.shape != rejected.shape or chosen.shape[1] < 2:
        raise UserError(
            "`pair_weights='agreement'` needs the scores of at least 2 scorers for both images. "
            f"`{SCORER_COLUMNS[0]}` has {chosen.shape[1]} numbers in a row and `{SCORER_COLUMNS[1]}` has "
            f"{rejected.shape[1]}."
        )
    return torch.stack([chosen, rejected], dim=1)


# ---- Calibrated scores


def calibrate(dataset: PreferenceDataset) -> np.ndarray:
    """Return each image's calibrated score, its expected share of wins against the other images of its prompt: `(P, 2)`
    in float64, for winner and loser of P pairs.

    Two images of a prompt with equal scores and equal pixels count as one. An image is decoded only if another of its
    prompt has the same score.
    """
    assert dataset.scores is not None
    numbers: dict[str, int] = {}
    texts = dataset.source.prompts_of_rows(dataset.positions[:, 0])
    codes = [numbers.setdefault(text, len(numbers)) for text in texts]
    prompts = np.repeat(np.array(codes, dtype=np.int64), 2)
    positions = dataset.positions.reshape(-1, 2)
    images, prompts, scores = _different_images(
        dataset.source, dataset.reader, positions, prompts, dataset.scores.reshape(-1)
    )
    order = np.argsort(prompts, kind="stable")
    calibrated = np.empty(len(order))
    sizes = np.unique(prompts, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes).tolist():
        groups = order[starts[sizes == size, None] + np.arange(size)]  # (groups, size)
        for chunk in np.array_split(groups, -(-groups.size * size // COMPARED_AT_ONCE)):
            calibrated[chunk] = calibrated_scores(torch.from_numpy(scores[chunk])).numpy()
    return calibrated[images].reshape(-1, 2)


def _different_images(
    source: PairSource, reader: ImageReader, positions: np.ndarray, prompts: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the distinct images. Return the index of each image in this list, and the list's prompts and scores.

    Args:
        positions (`np.ndarray` of shape `(N, 2)`): Row of each image, and its number within the row.
    """
    rows = list(zip(prompts.tolist(), scores.tolist(), map(tuple, positions.tolist()), strict=True))
    alike = Counter((prompt, score) for prompt, score, _ in set(rows))
    contents: dict[tuple[int, int], str] = {}
    numbers: dict[tuple, int] = {}
    image_numbers = np.empty(len(rows), dtype=np.int64)
    for number, (prompt, score, image) in enumerate(rows):
        content = ""
        if alike[prompt, score] > 1:
            content = contents.get(image) or contents.setdefault(image, _content(source, reader, *image))
        image_numbers[number] = numbers.setdefault((prompt, score, content), len(numbers))
    return (
        image_numbers,
        np.array([key[0] for key in numbers]),
        np.array([key[1] for key in numbers], dtype=np.float64),
    )


def _content(source: PairSource, reader: ImageReader, row: int, image: int) -> str:
    try:
        decoded = source.images([(row, image)])[0].decode(reader)
    except UndecodableImageError:
        return f"unreadable image {image} of row {row}"
    return f"{decoded.size} {hashlib.sha256(decoded.tobytes()).hexdigest()}"
