"""Finds evaluations in a trainer's log history."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

History = Sequence[Mapping[str, Any]]  # `TrainerState.log_history`


def evaluation_prefixes(names: Iterable[str], metric: str = "errors/winner") -> list[str]:
    """Return the prefixes of evaluations, such as `eval` or `eval_ema`, under which a metric was logged.

    Args:
        names (`Iterable[str]`): Names of metrics, such as those in an entry of the log history.
        metric (`str`): Name of the metric. By default, one that every evaluation of preference pairs logs.
    """
    end = f"_{metric}"
    return [name.removesuffix(end) for name in names if name.startswith("eval") and name.endswith(end)]


def is_evaluation(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of a log history is from an evaluation of preference pairs."""
    return bool(evaluation_prefixes(entry))
