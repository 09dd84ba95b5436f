"""Loss weights of pairs, computed from scores or read from a column, and calibrated scores of images."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..losses import WEIGHT_FUNCTIONS, calibrated_scores, score_gaps, with_mean_one
from ..losses.pair_weights import WeightFunction
from ..utils.processes import ALONE, Peers
from .dataset import PreferenceDataset
from .images import ImageReader, UndecodableImageError
from .sources import PairSource, numbers_of_rows

logger = logging.getLogger(__name__)

COMPARED_AT_ONCE = 1 << 22  # number of comparisons of two images that are in memory at a time
SCORER_COLUMNS = ("chosen_scores", "rejected_scores")  # columns of lists with one number per scorer


@dataclass(frozen=True)
class ScoreSettings:
    """Settings that say how the loss and the pair weights use the scores of images.

    Args:
        pair_weights (`str`, *optional*): A key of [`~trl_diffusion_sdpo.losses.WEIGHT_FUNCTIONS`], or the name of a
            column with weights.
        calibrated (`bool`): Whether to replace scores by calibrated scores: each image's expected share of wins against
            the other images of its prompt.
        sorts_by_scores (`bool`): Whether the loss reads scores, and takes the image with the higher score as the
            winner.
        in_unit_range (`bool`): Whether the loss expects each score to be an image's expected share of wins, in
            `[0, 1]`.
    """

    pair_weights: str | None = None
    calibrated: bool = False
    sorts_by_scores: bool = False
    in_unit_range: bool = False

    @property
    def _weighting(self) -> WeightFunction | None:
        """The function that `pair_weights` names, or `None` if `pair_weights` is unset or names a column."""
        return WEIGHT_FUNCTIONS.get(self.pair_weights or "")

    @property
    def number_columns(self) -> tuple[str, ...]:
        """Columns with numbers that these settings read in addition to the columns of the format."""
        if self.pair_weights is None:
            return ()
        if self._weighting is None:
            return (self.pair_weights,)
        return SCORER_COLUMNS if self._weighting.several_scorers else ()

    @property
    def _reads_gaps(self) -> bool:
        """Whether weights are computed from the two score columns of the format."""
        return self._weighting is not None and not self._weighting.several_scorers

    @property
    def _weighed_by(self) -> str | None:
        """Description of how weights were computed, or `None` without weights."""
        if self.pair_weights is None:
            return None
        ordered = " of pairs ordered by scores" if self._reads_gaps and self.sorts_by_scores else ""
        return repr(self.pair_weights) + ordered

    @property
    def needs_scores(self) -> bool:
        """Whether these settings read the score columns."""
        return self.sorts_by_scores or self._reads_gaps

    @property
    def _calibrates(self) -> bool:
        """Whether scores are read and must be calibrated."""
        return self.calibrated and self.needs_scores

    def apply_to(self, dataset: Any, peers: Peers = ALONE) -> None:
        """Compute calibrated scores and pair weights, and store them in the data set. All processes must call this.

        Raises:
            ValueError: If the data are a stream, if all pairs have the same score gap, or if weights are negative or
                all 0.
        """
        if not isinstance(dataset, PreferenceDataset):
            self._refuse_stream(dataset.report.name)
            return
        self._warn_of_range(dataset)
        calibrated = peers.first(partial(calibrate, dataset)) if self._calibrates else None
        if calibrated is not None:
            dataset.use_scores(calibrated=calibrated, weights=None)
        if self._reads_gaps:
            self._check_gaps(dataset)
        if self.pair_weights is not None:
            dataset.use_scores(calibrated=calibrated, weights=self._weights(dataset), by=self._weighed_by)

    def check_prepared(self, dataset: Any, name: str, *, training: bool) -> None:
        """Raise `ValueError` if a prepared data set was made with other score settings than these."""
        if not isinstance(dataset, PreferenceDataset):
            self._refuse_stream(name)
            return
        calibrated, weighed_by = dataset.score_uses
        weighed_by = weighed_by if training else None
        if (calibrated, weighed_by) != (self._calibrates, self._weighed_by):
            raise ValueError(
                f"Data must be prepared with the trainer's score settings. The {name} data were prepared with "
                f"`calibrated_scores={calibrated}` and `pair_weights={weighed_by}`. The trainer has "
                f"`calibrated_scores={self.calibrated}` and `pair_weights={self._weighed_by}`. Pass the original data "
                "instead of the prepared data."
            )
        if training:  # evaluation data would give the warning again in every evaluation
            self._warn_of_range(dataset)
        if self.sorts_by_scores and not dataset.has_scores:
            raise ValueError(
                f"The loss needs scores. The {name} data were prepared without scores. Pass the original "
                "data instead of the prepared data."
            )

    def _refuse_stream(self, name: str) -> None:
        if self.pair_weights or self._calibrates:
            setting = "pair_weights" if self.pair_weights else "calibrated_scores"
            raise ValueError(
                f"`{setting}` needs the scores or weights of all pairs before the first batch. The {name} data are a "
                "stream. Load the data without `streaming=True`, or remove the setting."
            )

    def _warn_of_range(self, dataset: PreferenceDataset) -> None:
        """Warn of scores outside [0, 1] if the loss expects each score to be an expected share of wins."""
        if not self.in_unit_range or self.calibrated or dataset.scores is None or not len(dataset):
            return
        scores = -dataset.scores if dataset.is_swapped else dataset.scores  # the swap changed their signs
        low, high = float(scores.min()), float(scores.max())
        if low < 0 or high > 1:
            logger.warning(
                "%s data: the loss expects scores in [0, 1]: the share of wins of an image. The scores range "
                "from %.4g to %.4g. Set `calibrated_scores` to replace each score by the image's share of wins.",
                *(dataset.report.name, low, high),
            )

    def _check_gaps(self, dataset: PreferenceDataset) -> None:
        assert dataset.scores is not None
        name, pairs = dataset.report.name, len(dataset)
        gaps = score_gaps(torch.tensor(dataset.scores), sorts_by_scores=self.sorts_by_scores)
        if gaps.min() == gaps.max():
            raise ValueError(
                f"`pair_weights` needs pairs with different score gaps (winner minus loser). All {pairs} pairs of the "
                f"{name} data have the gap {float(gaps.max()):g}. Use another scorer, or remove `pair_weights`."
            )
        contradicted = int((dataset.scores[:, 0] < dataset.scores[:, 1]).sum())
        if contradicted:
            effect = "the loss exchanges their images" if self.sorts_by_scores else "their gap counts as 0"
            note = f"in {contradicted} of {pairs} pairs the rejected image has the higher score: {effect}"
            dataset.add_note(note)
            logger.warning("%s data: %s.", name, note)

    def _weights(self, dataset: PreferenceDataset) -> np.ndarray:
        """Return the weights of all pairs, `(P,)`."""
        assert self.pair_weights is not None
        if self._weighting is None:
            weights = _weights_of_column(dataset, self.pair_weights)
        else:
            if self._weighting.several_scorers:
                scores = _scores_of_several(dataset)
            else:
                scores = torch.tensor(dataset.scores)[:, :, None]  # (P, 2, 1)
            weights = self._weighting.function(scores, sorts_by_scores=self.sorts_by_scores)
        if not weights.any():
            raise ValueError(
                f"Some pairs must have a weight above 0. `pair_weights={self.pair_weights!r}` is 0 for all "
                f"{len(weights)} pairs of the {dataset.report.name} data. Choose other weights. For "
                "`pair_weights='gain'`, scale the scores down."
            )
        if weights.min() == weights.max():
            logger.warning("`pair_weights=%r` has no effect: all pairs have the same weight.", self.pair_weights)
        weights = with_mean_one(weights)
        logger.info(
            "%s data: weights of pairs by %r are between %.3g and %.3g, with a mean of 1. %d of %d weights are 0.",
            *(dataset.report.name, self.pair_weights, float(weights.min()), float(weights.max())),
            *(int((weights == 0).sum()), len(weights)),
        )
        return weights.numpy()


def _numbers(dataset: PreferenceDataset, column: str) -> torch.Tensor:
    """Return the numbers of a column for each pair, `(P, K)` in float64. Pairs of bad rows are already dropped."""
    source, index = dataset.origins()
    if (index[:, 0] != index[:, 2]).any():
        raise ValueError(
            f"`pair_weights={column!r}` needs one value for each pair. In the {dataset.report.name} data, the images "
            "of a pair are in two rows. Use a format with one row for each pair."
        )
    return torch.from_numpy(numbers_of_rows(source.values(column), column)[0][index[:, 0]])


def _weights_of_column(dataset: PreferenceDataset, column: str) -> torch.Tensor:
    weights, what = _numbers(dataset, column), f"`pair_weights={column!r}`"
    if weights.shape[1] != 1:
        raise ValueError(
            f"{what} must name a column with one number in each row. The rows have {weights.shape[1]} numbers."
        )
    if negative := int((weights < 0).sum()):
        raise ValueError(
            f"{what} must not be negative, because a negative weight would exchange winner and loser. The weight is "
            f"negative for {negative} of {len(weights)} pairs of the {dataset.report.name} data, down to "
            f"{float(weights.min()):g}. Remove these pairs, or give them the weight 0."
        )
    return weights[:, 0]


def _scores_of_several(dataset: PreferenceDataset) -> torch.Tensor:
    """Return the scores of K scorers for winners and losers, `(P, 2, K)`."""
    chosen, rejected = (_numbers(dataset, column) for column in SCORER_COLUMNS)
    if chosen.shape != rejected.shape or chosen.shape[1] < 2:
        raise ValueError(
            "`pair_weights='agreement'` needs the scores of at least 2 scorers for both images. "
            f"`{SCORER_COLUMNS[0]}` has {chosen.shape[1]} numbers in a row and `{SCORER_COLUMNS[1]}` has "
            f"{rejected.shape[1]}."
        )
    scores = torch.stack([chosen, rejected], dim=1)
    constant = [number for number, equal in enumerate((chosen == rejected).all(dim=0).tolist()) if equal]
    if constant:
        raise ValueError(
            "`pair_weights='agreement'` needs scorers that distinguish images. The scorers "
            f"{constant} (numbered from 0) give both images of all {len(scores)} pairs the same score. Remove them "
            f"from `{SCORER_COLUMNS[0]}` and `{SCORER_COLUMNS[1]}`."
        )
    return scores


# ---- Calibrated scores


def calibrate(dataset: PreferenceDataset) -> np.ndarray:
    """Return each image's expected share of wins against the other images of its prompt (its calibrated score).

    The result has the shape `(P, 2)`, for winners and losers, in float64. Each image is compared with the other
    distinct images of its prompt. Two images of a prompt with equal scores and equal pixels count as one image. An
    image is decoded only if another image of its prompt has the same score.
    """
    assert dataset.scores is not None
    source, index = dataset.origins()
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(prompt, len(numbers)) for prompt in source.prompts_of_rows(index[:, 0])]
    prompts = np.repeat(np.array(codes, dtype=np.int64), 2)
    places, flat_scores = index.reshape(-1, 2), dataset.scores.reshape(-1)
    images, prompts, scores = _different_images(source, dataset.reader, places, prompts, flat_scores)
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
    source: PairSource, reader: ImageReader, places: np.ndarray, prompts: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the index of each image in the list of distinct images, and the prompts and scores of that list.

    Args:
        places (`np.ndarray` of shape `(N, 2)`): Row of each image, and the image's number within the row.
    """
    rows = list(zip(prompts.tolist(), scores.tolist(), map(tuple, places.tolist()), strict=True))
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
