"""Scores of images: their statistics, and the scales of scorers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Ranges of a scorer's scores by name, to divide differences by. PickScore's is that of the raw cosine, as the training
# code of https://huggingface.co/papers/2506.02698 normalises it: (cosine - 0.115435) / (0.282016 - 0.115435).
SCORE_SCALES = {"pickscore": 0.282016 - 0.115435}


def score_scale(value: float | str) -> float:
    """A scale of scores given as a number, or by its name in [`SCORE_SCALES`]; `ValueError` for other names."""
    if not isinstance(value, str):
        return value
    if value not in SCORE_SCALES:
        raise ValueError(
            f"`smpo_score_scale` must be a number or one of {', '.join(SCORE_SCALES)}; got {value!r}. For another "
            "scorer give the range of its scores."
        )
    return SCORE_SCALES[value]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more independent values: their standard deviation, with one degree of
    freedom less than values, divided by the square root of their number."""
    return statistics.stdev(values) / math.sqrt(len(values))
