"""Standard error of mean scores, and the ranges of the scores of known scorers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Range of each scorer's scores. The SmPO loss divides score differences by this range. The range of PickScore comes
# from the training code of https://huggingface.co/papers/2506.02698, which normalises the cosine to
# (cosine - 0.115435) / (0.282016 - 0.115435).
SCORE_SCALES = {"pickscore": 0.282016 - 0.115435}


def score_scale(value: float | str) -> float:
    """Return the scale of scores that `smpo_score_scale` sets: a number, or the name of a scorer in [`SCORE_SCALES`].

    Raises:
        `ValueError`: If the name is unknown.
    """
    if not isinstance(value, str):
        return value
    if value not in SCORE_SCALES:
        raise ValueError(
            f"`smpo_score_scale` must be a number or one of {', '.join(SCORE_SCALES)}. Got {value!r}. For another "
            "scorer, pass the range of its scores as a number."
        )
    return SCORE_SCALES[value]


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two independent values.

    The standard error is the sample standard deviation (n - 1 degrees of freedom) divided by the square root of n.
    """
    return statistics.stdev(values) / math.sqrt(len(values))
