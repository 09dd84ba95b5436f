"""Meaning of a scorer's numbers: their usual range, their limits, and how they relate to preferences.

`pairs score` and `pairs generate` write a scale beside the scores, in the column [`SCALE_COLUMN`], so that nobody types
a loss's numbers by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .errors import UserError

SCALE_COLUMN = "score_scales"  # in each row, one scale for each scorer
# What a loss needs: scores divided by their usual range, differences that are log-odds, or shares of comparisons.
Unit = Literal["range", "log_odds", "share"]
ROUNDING = 1e-3  # share by which a score may exceed a limit


@dataclass(frozen=True)
class ScoreScale:
    """Meaning of a scorer's numbers. `None` is unknown.

    Args:
        scorer (`str`): Name of the scorer.
        low, high (`float`, *optional*): Usual range of the scores.
        lowest, highest (`float`, *optional*): Limits that no score exceeds.
        log_odds (`float`, *optional*): Factor that turns the difference of two scores into the log-odds that people
            prefer the first image.
    """

    scorer: str = ""
    low: float | None = None
    high: float | None = None
    lowest: float | None = None
    highest: float | None = None
    log_odds: float | None = None

    @classmethod
    def read(cls, value: Any) -> ScoreScale:
        """Return the first scorer's scale in a row's value of [`SCALE_COLUMN`].

        Raises:
            ValueError: If the value is not a list of scales.
        """
        first = value[0] if isinstance(value, list) and value else None
        if not isinstance(first, Mapping) or not isinstance(first.get("scorer"), str):
            raise UserError(
                f"`{SCALE_COLUMN}` must be a list of scales as `pairs score` writes it, got {value!r}. Remove the "
                "column, or score the pairs again"
            )
        values: dict[str, Any] = {field.name: first.get(field.name) for field in fields(cls)}
        return cls(**values)

    def check(self, score: float, column: str) -> None:
        """Raise `ValueError` if a score is beyond the limits by more than rounding."""
        lowest = -math.inf if self.lowest is None else self.lowest
        highest = math.inf if self.highest is None else self.highest
        if not lowest - ROUNDING * abs(lowest) <= score <= highest + ROUNDING * abs(highest):
            raise UserError(
                f"`{column}` must be in [{lowest:g}, {highest:g}], because it has the scale of {self.scorer}, got "
                f"{score:g}. Score the images with `pairs score`, which also writes their scale"
            )

    def factor(self, unit: Unit) -> float:
        """Return the number to multiply scores by, so that they have a unit.

        Raises:
            ValueError: If the scale does not say how.
        """
        if unit == "share":
            raise UserError(
                f"`capo` needs shares of comparisons, got scores of {self.scorer}. Set `calibrated_scores: true`"
            )
        if unit == "log_odds":
            if self.log_odds is None:
                raise UserError(
                    "`calibrated_scores` needs scores whose differences are log-odds of a preference, and those of "
                    f"{self.scorer} are not. Score the images with pickscore, hpsv2.1 or image_reward, or remove the "
                    f"column `{SCALE_COLUMN}` and multiply the scores yourself"
                )
            return self.log_odds
        if self.low is None or self.high is None or not self.high > self.low:
            raise UserError(f"the usual range of {self.scorer} is not known. Score the images again")
        return 1 / (self.high - self.low)


@dataclass(frozen=True)
class ScoreReading:
    """How a run reads score columns.

    Args:
        unit (`str`): What the loss needs of scores that say their scale.
        assumed ([`ScoreScale`]): Limits of scores that do not say their scale. These are not converted.
        typed (`str`, *optional*): A setting that says the scale by hand, for the message that refuses it if the scores
            say theirs themselves.
        advice (`str`, *optional*): A warning for scores that do not say their scale.
    """

    unit: Unit = "range"
    assumed: ScoreScale = ScoreScale()
    typed: str | None = None
    advice: str | None = None


# Range of PickScore's cosines in the training code of https://huggingface.co/papers/2506.02698 (SmPO).
PICKSCORE_COSINES = ScoreScale("PickScore's cosines", low=0.115435, high=0.282016, lowest=-1.0, highest=1.0)
SHARES = ScoreScale("shares of comparisons", lowest=0.0, highest=1.0)


# Scales of score columns that do not say their scale. The SmPO loss divides score differences by `high - low`.
SCORE_SCALES = {"pickscore": PICKSCORE_COSINES}


def score_scale(value: float | str) -> float:
    """Return `smpo_score_scale` as a number: itself, or the range in [`SCORE_SCALES`] of a named scorer."""
    if not isinstance(value, str):
        return value
    if value not in SCORE_SCALES:
        raise UserError(
            f"`smpo_score_scale` must be a number or one of {', '.join(SCORE_SCALES)}. Got {value!r}. For another "
            "scorer, score the images with `pairs score`, and leave `smpo_score_scale` out."
        )
    return 1 / SCORE_SCALES[value].factor("range")
