"""The verdict on a training: how the denoiser's error on preferred images has changed, with numbers and advice."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

# Changes of the winners' mean error, relative to that before training.
BETTER = -0.01  # at or below
KEPT = 0.05  # at or below: the variation between random pairs, and between random noise
RUINED = 1.0  # above: the error has doubled
BIN_WORSE = 1.0  # above, in any noise bin: worse, whatever the mean
AVERAGED_LOGS = 10  # of training, without an evaluation
LOGS_TO_WARN = 3  # at least, during training

BEFORE_TRAINING = "before training"
_WINNER = re.compile(r"^(?P<prefix>eval.*)_errors/winner$")

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunFacts:
    """What a verdict needs to know of a run beside its log history."""

    reference_moves: bool  # errors relative to a reference that follows the policy do not count
    reference_was_given: bool  # if not, it is the policy before training
    uses_loser: bool  # whether the loss has a loser's branch
    safeguarded: bool  # whether a safeguard acts on that branch
    average_suffix: str  # of the metrics' prefixes of averaged weights, such as "_ema"

    @property
    def reference(self) -> str:
        """What `errors/winner_change` is relative to; empty if the reference moves."""
        if self.reference_moves:
            return ""
        return "of the reference" if self.reference_was_given else BEFORE_TRAINING


@dataclass(frozen=True)
class Measurement:
    """The winners' error at one step."""

    step: int  # optimizer steps done
    error: float  # mean squared error of the denoiser on the winners
    before: float  # the error it is compared with
    since: str  # description of that error, such as "before training"
    worst: tuple[int, float] | None = None  # the noise bin with the largest relative increase, and the increase

    @property
    def change(self) -> float:
        """Relative change; infinite if the error is not finite."""
        return self.error / self.before - 1 if math.isfinite(self.error) else math.inf

    def __str__(self) -> str:
        if not math.isfinite(self.error):
            return "no number"
        side = "above" if self.change >= 0 else "below"
        return f"{abs(self.change):.1%} {side} that {self.since}"


@dataclass(frozen=True)
class Verdict:
    """A verdict in words."""

    word: str  # "better", "kept", "worse" or "ruined"
    finding: str  # sentences with the numbers
    advice: str  # what to do; empty if nothing

    def __str__(self) -> str:
        return f"{self.finding} {self.advice}".strip()


def judge(change: float, worst_bin: float | None = None) -> str:
    """The verdict's word for the relative change of the winners' mean error and the largest one in a noise bin.

    `"ruined"` above +100%, or if the error is not finite; `"worse"` above +5%, or above +100% in one noise bin;
    `"better"` at -1% and below; `"kept"` otherwise.
    """
    if not change <= RUINED:
        return "ruined"
    if change > KEPT or (worst_bin is not None and not worst_bin <= BIN_WORSE):
        return "worse"
    return "better" if change <= BETTER else "kept"


def verdict_of(history: History, run: RunFacts, step: int | None = None) -> Verdict | None:
    """The verdict by the last evaluation, or by the last logs of training if there is none.

    Args:
        history (`Sequence[Mapping]`): The trainer's log history.
        run ([`RunFacts`]): Facts of the run.
        step (`int`, *optional*): Whose weights are judged, if not the last ones.

    Returns:
        `Verdict` or `None`: `None` if no error was logged that can be compared.
    """
    evaluations = _evaluations(history, run)
    of_policy = [found for prefix, found in evaluations.items() if not _is_average(prefix, run)]
    if of_policy:
        last = [_at(found, step) for found in of_policy]
        measured = max(last, key=lambda found: found.change)  # of several sets, the one with the largest increase
        averages = [_at(found, step) for prefix, found in evaluations.items() if _is_average(prefix, run)]
        return _worded(measured, "evaluation", run, of_policy[last.index(measured)], averages)
    mean = _last_training(history, run)
    return None if mean is None else _worded(mean, "training", run, [], [])


def warning_of(history: History, run: RunFacts, *, evaluates: bool) -> str | None:
    """A warning if the newest entry of a log history, which is not empty, shows a ruined model. Of a run that
    `evaluates`, only evaluations count."""
    newest = history[-1]
    found: list[Measurement] = []
    if any(_WINNER.match(name) and not _is_average(name.partition("_errors/")[0], run) for name in newest):
        last = (measured[-1] for measured in _evaluations(history, run).values())
        found = [measured for measured in last if measured.step == newest["step"]]
    elif "errors/winner" in newest and not evaluates:
        measured = _last_training(history, run, at_least=LOGS_TO_WARN)
        found = [] if measured is None else [measured]
    worst = max(found, key=lambda measured: measured.change, default=None)
    if worst is None or judge(worst.change) != "ruined":
        return None
    return (
        f"The model is being ruined: at step {worst.step} the error on preferred images is {worst} "
        f"({worst.error:.4g} against {worst.before:.4g}). {_advice('ruined', run)}"
    )


def _evaluations(history: History, run: RunFacts) -> dict[str, list[Measurement]]:
    """Measurements in order, by the prefix of their metrics, such as `eval` or `eval_ema`.

    An error is compared with the evaluation before the first step, else with the reference unless it moves, else with
    the first evaluation.
    """
    found: dict[str, list[Measurement]] = {}
    first: dict[str, tuple[int, float]] = {}
    for entry in history:
        for prefix in (match["prefix"] for match in map(_WINNER.match, entry) if match):
            step, error = entry["step"], entry[f"{prefix}_errors/winner"]
            start, start_error = first.setdefault(prefix, (step, error))
            change = entry.get(f"{prefix}_errors/winner_change")
            measured = None
            if start == 0:
                measured = Measurement(step, error, start_error, BEFORE_TRAINING, _worst_bin(entry, prefix))
            elif run.reference and change is not None:
                measured = _relative(step, error, change, run.reference, _worst_bin(entry, prefix))
            elif step > start:
                measured = Measurement(step, error, start_error, f"at step {start}")
            if measured is not None and measured.before > 0:
                found.setdefault(prefix, []).append(measured)
    return found


def _last_training(history: History, run: RunFacts, at_least: int = 1) -> Measurement | None:
    """Mean over the last logs of training; `None` with fewer than `at_least`, or if the reference moves."""
    logs = list(islice((entry for entry in reversed(history) if "errors/winner_change" in entry), AVERAGED_LOGS))
    if not run.reference or len(logs) < at_least:
        return None
    error, change = (sum(log[f"errors/{name}"] for log in logs) / len(logs) for name in ("winner", "winner_change"))
    measured = _relative(logs[0]["step"], error, change, run.reference, None)
    return measured if measured.before > 0 else None


def _relative(step: int, error: float, change: float, since: str, worst: tuple[int, float] | None) -> Measurement:
    """From the error and its difference to the earlier one, whose value is irrelevant where that is not finite."""
    before = error - change
    return Measurement(step, error, before if math.isfinite(before) else 1.0, since, worst)


def _worst_bin(entry: Mapping[str, Any], prefix: str) -> tuple[int, float] | None:
    start = f"{prefix}_errors/winner_change_relative@"
    changes = {int(name.removeprefix(start)): value for name, value in entry.items() if name.startswith(start)}
    return max(changes.items(), key=lambda found: found[1], default=None)


def _at(measurements: Sequence[Measurement], step: int | None) -> Measurement:
    """The measurement at a step, or the last."""
    return next((measured for measured in reversed(measurements) if measured.step == step), measurements[-1])


def _is_average(prefix: str, run: RunFacts) -> bool:
    return prefix.endswith(run.average_suffix)


def _worded(
    measured: Measurement, pairs: str, run: RunFacts, history: Sequence[Measurement], averages: Iterable[Measurement]
) -> Verdict:
    word = judge(measured.change, None if measured.worst is None else measured.worst[1])
    finding = (
        f"Verdict: {word}. The error on the preferred images of the {pairs} pairs is {measured} "
        f"({measured.error:.4g} against {measured.before:.4g}) at step {measured.step}"
    )
    if measured.worst is not None:
        finding += f"; the noise bin with the largest increase is {measured.worst[0]}, {measured.worst[1]:+.1%}"
    finding += "."
    for average in averages:
        finding += f" That of the averaged weights is {average}."
    if pairs == "training":
        finding += " Without an `eval_dataset`, nothing is known of other pairs."
    advice = _advice(word, run)
    lowest = min(history, key=lambda found: found.change, default=None)
    if advice and lowest is not None and lowest.step not in (0, measured.step):
        advice += f" It was lowest at step {lowest.step} ({lowest.change:+.1%})."
    return Verdict(word, finding, advice)


def _advice(word: str, run: RunFacts) -> str:
    if word not in ("worse", "ruined"):
        return ""
    ways = ["a lower or decaying `learning_rate`"]
    if run.uses_loser:
        ways += ["a larger `safeguard_mu`" if run.safeguarded else "a `safeguard`", "a `winner_budget`"]
    ruined = word == "ruined"
    begin = "Do not use these weights; train again" if ruined else "Look at images before you use them, or train"
    return f"{begin} with {' or '.join(ways)}."
