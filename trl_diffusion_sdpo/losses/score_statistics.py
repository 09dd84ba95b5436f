"""Standard error of mean scores, and the scales of scores that a setting can name."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..utils.score_scale import PICKSCORE_COSINES

# Scales of score columns that do not say their scale. The SmPO loss divides score differences by `high - low`.
SCORE_SCALES = {"pickscore": PICKSCORE_COSINES}


def score_scale(value: float | str) -> float:
    """Return `smpo_score_scale` as a number: the number itself, or the range in [`SCORE_SCALES`] of a named scorer."""
    if not isinstance(value, str):
        return value
    if value not in SCORE_SCALES:
        raise ValueError(
            f"`smpo_score_scale` must be a number or one of {', '.join(SCORE_SCALES)}. Got {value!r}. For another "
            "scorer, score the images with `pairs score`, and leave `smpo_score_scale` out."
        )
    return 1 / SCORE_SCALES[value].factor("range")


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two independent values, with n - 1 degrees of freedom."""
    return statistics.stdev(values) / math.sqrt(len(values))
