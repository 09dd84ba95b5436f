"""Standard error of mean scores, and the ranges of the scores of known scorers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Range of each scorer's scores (largest minus smallest). The SmPO loss divides score differences by this range. The
# range of PickScore is from the training code of https://huggingface.co/papers/2506.02698.
SCORE_SCALES = {"pickscore": 0.282016 - 0.115435}


def score_scale(value: float | str) -> float:
    """Return `smpo_score_scale` as a number: the number itself, or the range in [`SCORE_SCALES`] of a named scorer."""
    if not isinstance(value, str):
        return value
    if value not in SCORE_SCALES:
        raise ValueError(
            f"`smpo_score_scale` must be a number or one of {', '.join(SCORE_SCALES)}. Got {value!r}. For another "
            "scorer, pass the range of its scores as a number."
        )
    return SCORE_SCALES[value]


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two independent values, with n - 1 degrees of freedom."""
    return statistics.stdev(values) / math.sqrt(len(values))
