"""Statistics of the scores of images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more independent values: their standard deviation, with one degree of
    freedom less than values, divided by the square root of their number."""
    return statistics.stdev(values) / math.sqrt(len(values))
