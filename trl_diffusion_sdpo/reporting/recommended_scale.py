"""Which scale a sweep recommends, by the winners' errors on held-out pairs and by the scores of images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..losses import standard_error
from .scale_sweep import percent, word_of

# The rule and its reasons: docs/cli.md#the-recommended-scale.
FEWEST_IMAGES = 8  # of a scale; with fewer, the standard error of their scores is too small too often
KEPT = ("better", "unchanged")  # words of the verdict on winners that are not worse
LOST = ("worse", "ruined")

Scores = Mapping[float, Sequence[float]]  # by scale, of the images of all prompts in one order


@dataclass(frozen=True)
class RecommendedScale:
    """A recommended scale of each form."""

    weights: float | None  # `None` where none is recommended
    prediction: float | None
    sentence: str  # why, with the numbers
    scorer: str | None = None  # its name, where scores decided
    guidance_scale: float | None = (
        None  # classifier-free, with which the images were generated; the pipeline's if unset
    )

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def recommend(
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Scores] | None = None,
    *,
    scorer: str | None = None,
    guidance_scale: float | None = None,
    is_negative: bool = False,
) -> RecommendedScale:
    """The recommended scale of a run's weights and that of guidance in its prediction.

    Args:
        rows (`Sequence[Mapping]`): Of the sweep, see [`~trl_diffusion_sdpo.reporting.scale_sweep.sweep_row`].
        scores (`Mapping[str, Mapping]`, *optional*): Of the forms `"weights"` and `"prediction"`.
        scorer (`str`, *optional*): The name of what gave them.
        guidance_scale (`float`, *optional*): Of the images.
        is_negative (`bool`): Whether the run was tuned on swapped labels.
    """
    kept = [row for row in rows if row["scale"] > 0 and word_of(row) in KEPT]
    scores = scores if scores and _are_enough(scores) else {}
    weights, of_weights = _of_weights(rows, kept, scores.get("weights"))
    prediction, of_prediction = (None, _OF_NEGATIVE) if is_negative else _of_prediction(rows, scores.get("prediction"))
    by = f" Scores are those of `{scorer}`{_guided(guidance_scale)}." if scores else _why_unscored(scorer)
    return RecommendedScale(
        weights, prediction, f"{of_weights} {of_prediction}{by}", scorer if scores else None, guidance_scale
    )


def best_scale(scores: Scores) -> float:
    """The smallest scale whose images score less than those of the highest mean by at most the standard error of the
    difference, over images of equal prompts and noise."""
    best = max(scores, key=lambda scale: statistics.fmean(scores[scale]))
    for scale in sorted(scores):
        drops = [high - low for high, low in zip(scores[best], scores[scale], strict=True)]
        if statistics.fmean(drops) <= standard_error(drops):
            return scale
    raise AssertionError("The best is no drop from itself.")


def _of_weights(
    rows: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], scores: Scores | None
) -> tuple[float | None, str]:
    """A scale of the weights, and why."""
    # Without scores, nothing says whether images beyond the tuned model are better.
    kept = [row for row in kept if (row["scale"] <= 1 if scores is None else row["scale"] in scores)]
    if not kept:
        words = ", ".join(f"{word_of(row)} at {row['scale']:g}" for row in rows if row["scale"] > 0)
        return None, f"No scale of the weights is recommended: the held-out winners are {words or 'not measured'}."
    if scores is None:
        row = max(kept, key=lambda row: row["margin"])
        why = "that of the largest margin among those up to 1 whose held-out winners are not worse"
        return row["scale"], f"Recommended scale of the weights: {row['scale']:g}, {why} ({_change(row)})."
    allowed = {row["scale"]: row for row in kept}
    scale = best_scale({scale: found for scale, found in scores.items() if scale == 0 or scale in allowed})
    if scale == 0:
        why = f"generate with the base, which no scale with kept winners {_EXCELS}"
        return 0.0, f"Recommended scale of the weights: 0; {why}."
    why = f"{_BEST}, of those whose held-out winners are not worse"
    return (
        scale,
        f"Recommended scale of the weights: {scale:g}, {why} ({_change(allowed[scale])}; {_mean(scores, scale)}).",
    )


def _of_prediction(rows: Sequence[Mapping[str, Any]], scores: Scores | None) -> tuple[float | None, str]:
    """A scale of guidance in the prediction, and why."""
    if not scores:
        return 1.0, "Recommended scale of preference guidance: 1, as nothing scored the images of larger ones."
    tuned = next((word_of(row) for row in rows if row["scale"] == 1), "not measured")
    capped = ""
    if tuned in LOST:  # more of a model's direction is more of what it lost
        scores = {scale: found for scale, found in scores.items() if scale <= 1}
        capped = f" None above 1 is, as the tuned model's held-out winners are {tuned}."
    if not scores:
        return None, f"No scale of preference guidance is recommended.{capped}"
    scale = best_scale(scores)
    if scale == 0:
        why = f"generate with the base, which no scale {_EXCELS}"
        return 0.0, f"Recommended scale of preference guidance: 0; {why}.{capped}"
    return scale, f"Recommended scale of preference guidance: {scale:g}, {_BEST} ({_mean(scores, scale)}).{capped}"


_BEST = "the smallest whose images score as the best ones, within a standard error"
_EXCELS = "excels by more than the standard error of the difference"
_OF_NEGATIVE = (
    "Of a negative model, which is a reference, no scale of preference guidance is recommended: sweep the tuned model."
)


def _are_enough(scores: Mapping[str, Scores]) -> bool:
    return all(len(found) >= FEWEST_IMAGES for form in scores.values() for found in form.values())


def _why_unscored(scorer: str | None) -> str:
    return "" if scorer is None else f" Scores of fewer than {FEWEST_IMAGES} images do not count."


def _guided(guidance_scale: float | None) -> str:
    return "" if guidance_scale is None else f" on images of guidance_scale {guidance_scale:g}"


def _change(row: Mapping[str, Any]) -> str:
    return f"error {percent(row['winner_change_relative'], row.get('winner_change_relative_stderr'))}"


def _mean(scores: Scores, scale: float) -> str:
    """The mean score at a scale, beside the tuned model's and the base's."""
    others = [(at, name) for at, name in ((1.0, "scale 1"), (0.0, "the base")) if at in scores and at != scale]
    beside = ", ".join(f"{statistics.fmean(scores[at]):.4g} at {name}" for at, name in others)
    return f"mean score {statistics.fmean(scores[scale]):.4g}" + (f", against {beside}" if beside else "")
