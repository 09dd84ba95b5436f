"""The verdict on a training: how the denoiser's error on preferred images has changed, with numbers and advice."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

# Relative changes of the winners' mean error. The rule and its reasons: docs/evaluation.md#the-verdict.
STANDARD_ERRORS = 2.0  # of the change over the pairs: within these, another set of pairs could have shown none
SMALLEST = 0.01  # change that counts, however many pairs show it
UNMEASURED = 0.05  # in place of both, where no standard error is known
COARSE = 0.2  # uncertainty above which a change within it is unknown
RUINED = 1.0  # above: the error has doubled
BIN_WORSE = 1.0  # above, in any noise bin: worse, whatever the mean
BIN_STANDARD_ERRORS = 3.0  # of a bin's change: there are several bins
AVERAGED_LOGS = 10  # of training, without an evaluation
LOGS_TO_WARN = 3  # at least, during training

BEFORE_TRAINING = "before training"
LABELS = {"better": "better", "unchanged": "unchanged", "worse": "worse", "ruined": "worse", "unknown": "unknown"}
_RISES = {"worse": 1, "ruined": 2}  # by how bad they are
_WINNER = re.compile(r"^(?P<prefix>eval.*)_errors/winner$")

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunFacts:
    """What a verdict needs to know of a run beside its log history."""

    has_reference: bool  # whether the loss has a reference
    reference_moves: bool  # errors relative to a reference that follows the policy do not count
    reference_was_given: bool  # if not, it is the policy before training
    uses_loser: bool  # whether the loss has a loser's branch
    safeguard: str  # the setting
    decays: bool  # whether the learning rate decays
    num_noise_bins: int
    average_suffix: str  # of the metrics' prefixes of averaged weights, such as "_ema"

    @property
    def reference(self) -> str:
        """What `errors/winner_change` is relative to; empty if the reference moves."""
        if self.reference_moves:
            return ""
        return "of the reference" if self.reference_was_given else BEFORE_TRAINING


@dataclass(frozen=True)
class Change:
    """A relative change of an error, and its standard error over the pairs if that is known."""

    value: float
    stderr: float | None = None

    @property
    def noise(self) -> float:
        """The change that is not told from none."""
        return UNMEASURED if self.stderr is None else max(SMALLEST, STANDARD_ERRORS * self.stderr)

    @property
    def is_worse_in_a_bin(self) -> bool:
        return not self.value <= max(BIN_WORSE, BIN_STANDARD_ERRORS * (self.stderr or 0.0))


@dataclass(frozen=True)
class Measurement:
    """The winners' error at one step."""

    step: int  # optimizer steps done
    error: float  # mean squared error of the denoiser on the winners
    before: float  # the error it is compared with
    since: str  # description of that error, such as "before training"
    stderr: float | None = None  # of the relative change
    bins: Mapping[int, Change] = field(default_factory=dict)  # by noise bin
    accuracy: float | None = None  # share of pairs whose implicit reward is right

    @property
    def change(self) -> float:
        """Relative change; infinite if the error is not finite."""
        return self.error / self.before - 1 if math.isfinite(self.error) else math.inf

    @property
    def worst(self) -> tuple[int, Change] | None:
        """The noise bin with the largest increase."""
        return max(self.bins.items(), key=lambda found: found[1].value, default=None)

    @property
    def word(self) -> str:
        """The verdict's word. Where standard errors are known, bins of one pair have none, and do not count."""
        counted = [found for found in self.bins.values() if self.stderr is None or found.stderr is not None]
        return judge(self.change, self.stderr, max(counted, key=lambda found: found.value, default=None))

    def __str__(self) -> str:
        if not math.isfinite(self.error):
            return "no number"
        side = "above" if self.change >= 0 else "below"
        known = "" if self.stderr is None else f" (standard error {self.stderr:.1%})"
        return f"{abs(self.change):.1%} {side} that {self.since}{known}"


@dataclass(frozen=True)
class Verdict:
    """A verdict in words."""

    word: str  # a key of `LABELS`
    finding: str  # sentences with the numbers
    advice: str  # what to do; empty if nothing
    measured: Measurement | None = None
    pairs: str | None = None  # "evaluation" or "training"

    @property
    def label(self) -> str:
        """`"better"`, `"unchanged"`, `"worse"` or `"unknown"`."""
        return LABELS[self.word]

    def __str__(self) -> str:
        return f"{self.finding} {self.advice}".strip()


def judge(change: float, stderr: float | None = None, worst_bin: Change | None = None) -> str:
    """The verdict's word.

    Args:
        change (`float`): Relative change of the winners' mean error.
        stderr (`float`, *optional*): Its standard error over the pairs.
        worst_bin ([`Change`], *optional*): The largest change in a noise bin.

    Returns:
        `str`: `"ruined"` above +100%, or if the error is not finite; `"worse"` above the noise, or if a noise bin has
        doubled; `"better"` below it; otherwise `"unchanged"`, or `"unknown"` if the noise is above 20%. The noise is
        two standard errors, at least 1%, or 5% where none is known.
    """
    noise = Change(change, stderr).noise
    if not change <= RUINED:
        return "ruined"
    if change > noise or (worst_bin is not None and worst_bin.is_worse_in_a_bin):
        return "worse"
    if change < -noise:
        return "better"
    return "unchanged" if noise <= COARSE else "unknown"


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


def rise_of(history: History, run: RunFacts) -> tuple[Measurement, bool] | None:
    """What the newest evaluation in a log history says, if that is worse than before training beyond the noise; and
    whether it is worse than what the evaluation before it said."""
    newest = next((entry for entry in reversed(history) if any(map(_WINNER.match, entry))), {})
    prefixes = (match["prefix"] for match in map(_WINNER.match, newest) if match)
    found = _evaluations(history, run)
    measured = [found[prefix] for prefix in prefixes if prefix in found and not _is_average(prefix, run)]
    worst = max(measured, key=lambda evaluations: evaluations[-1].change, default=None)
    if worst is None or worst[-1].step != newest["step"] or worst[-1].word not in _RISES:
        return None
    previous = 0 if len(worst) == 1 else _RISES.get(worst[-2].word, 0)
    return worst[-1], _RISES[worst[-1].word] > previous


def rise_in_training(history: History, run: RunFacts) -> Measurement | None:
    """The mean over the last logs of training, if it says `"ruined"` for the first time with the newest entry."""
    if "errors/winner_change" not in history[-1]:
        return None
    measured, previous = (_last_training(logs, run, at_least=LOGS_TO_WARN) for logs in (history, history[:-1]))
    told = previous is not None and previous.word == "ruined"
    return measured if measured is not None and measured.word == "ruined" and not told else None


def words_of_rise(measured: Measurement, run: RunFacts) -> str:
    """A warning of a rise, with the noise level where it is largest and what to do."""
    what = "The model is being ruined" if measured.word == "ruined" else "The preferred images are getting worse"
    return (
        f"{what}: at step {measured.step} the error on them is {measured}, {measured.error:.4g} against "
        f"{measured.before:.4g}{_of_bins(measured, run)}. {_advice(measured.word, run)}"
    )


def noise_levels_of(noise_bin: int, run: RunFacts) -> tuple[float, float]:
    """The lowest and the highest noise level of a bin."""
    return noise_bin / run.num_noise_bins, (noise_bin + 1) / run.num_noise_bins


def _evaluations(history: History, run: RunFacts) -> dict[str, list[Measurement]]:
    """Measurements in order, by the prefix of their metrics, such as `eval` or `eval_ema`.

    An error is compared with the evaluation before the first step, else with the reference unless it moves, else with
    the first evaluation.
    """
    found: dict[str, list[Measurement]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for entry in history:
        for prefix in (match["prefix"] for match in map(_WINNER.match, entry) if match):
            measured = _measured(entry, first.setdefault(prefix, entry), prefix, run)
            if measured is not None and measured.before > 0:
                found.setdefault(prefix, []).append(measured)
    return found


def _measured(entry: Mapping[str, Any], first: Mapping[str, Any], prefix: str, run: RunFacts) -> Measurement | None:
    error, change = (entry.get(f"{prefix}_errors/{name}") for name in ("winner", "winner_change"))
    from_start = first["step"] == 0
    same = not run.has_reference or run.reference == BEFORE_TRAINING  # what the logged changes are relative to
    facts: dict[str, Any] = {"accuracy": entry.get(f"{prefix}_rewards/accuracies")}
    if same or (not from_start and run.reference):
        facts |= {"stderr": entry.get(f"{prefix}_{_RELATIVE_STDERR}"), "bins": _bins(entry, prefix)}
    if from_start:
        return Measurement(entry["step"], error, first[f"{prefix}_errors/winner"], BEFORE_TRAINING, **facts)
    if run.reference and change is not None:
        return _relative(entry["step"], error, change, run.reference, **facts)
    if entry["step"] > first["step"]:
        return Measurement(entry["step"], error, first[f"{prefix}_errors/winner"], f"at step {first['step']}", **facts)
    return None


def _last_training(history: History, run: RunFacts, at_least: int = 1) -> Measurement | None:
    """Mean over the last logs of training; `None` with fewer than `at_least`, or if the reference moves."""
    logs = list(islice((entry for entry in reversed(history) if "errors/winner_change" in entry), AVERAGED_LOGS))
    if not run.reference or len(logs) < at_least:
        return None
    names = ("errors/winner", "errors/winner_change", "rewards/accuracies")
    error, change, accuracy = (sum(log.get(name, math.nan) for log in logs) / len(logs) for name in names)
    known = None if math.isnan(accuracy) else accuracy
    measured = _relative(logs[0]["step"], error, change, run.reference, accuracy=known)
    return measured if measured.before > 0 else None


def _relative(step: int, error: float, change: float, since: str, **facts: Any) -> Measurement:
    """From the error and its difference to the earlier one, whose value is irrelevant where that is not finite."""
    before = error - change
    return Measurement(step, error, before if math.isfinite(before) else 1.0, since, **facts)


_RELATIVE = "errors/winner_change_relative"
_RELATIVE_STDERR = f"{_RELATIVE}_stderr"


def _bins(entry: Mapping[str, Any], prefix: str) -> dict[int, Change]:
    start = f"{prefix}_{_RELATIVE}@"
    bins = {int(name.removeprefix(start)): value for name, value in entry.items() if name.startswith(start)}
    return {index: Change(value, entry.get(f"{prefix}_{_RELATIVE_STDERR}@{index}")) for index, value in bins.items()}


def _at(measurements: Sequence[Measurement], step: int | None) -> Measurement:
    """The measurement at a step, or the last."""
    return next((measured for measured in reversed(measurements) if measured.step == step), measurements[-1])


def _is_average(prefix: str, run: RunFacts) -> bool:
    return prefix.endswith(run.average_suffix)


def _worded(
    measured: Measurement, pairs: str, run: RunFacts, history: Sequence[Measurement], averages: Iterable[Measurement]
) -> Verdict:
    word = measured.word
    finding = (
        f"Verdict: {word}. The error on the preferred images of the {pairs} pairs is {measured}, {measured.error:.4g} "
        f"against {measured.before:.4g}, at step {measured.step}{_of_bins(measured, run)}."
    )
    for average in averages:
        finding += f" That of the averaged weights is {average}."
    if pairs == "training":
        finding += " Without an evaluation on held-out pairs, nothing is known of other pairs."
    advice = _advice(word, run)
    lowest = min(history, key=lambda found: found.change, default=None)
    if word in _RISES and lowest is not None and lowest.step not in (0, measured.step):
        advice += f" It was lowest at step {lowest.step} ({lowest.change:+.1%})."
    return Verdict(word, finding, advice, measured, pairs)


def _of_bins(measured: Measurement, run: RunFacts) -> str:
    if measured.worst is None:
        return ""
    noise_bin, change = measured.worst
    low, high = noise_levels_of(noise_bin, run)
    return f"; worst at noise levels {low:.3g} to {high:.3g} (bin {noise_bin}): {change.value:+.1%}"


def _advice(word: str, run: RunFacts) -> str:
    """In the order of docs/safeguard.md#when-it-got-worse."""
    if word == "unknown":
        return "Evaluate on more pairs: the change lies within a large uncertainty."
    if word not in _RISES:
        return ""
    ways = ["a lower `learning_rate`" if run.decays else "`lr_scheduler_type: cosine`"]
    if run.uses_loser:
        ways += [] if run.safeguard == "none" else ["a larger `safeguard_mu`"]
        ways += [] if run.safeguard == "parameter" else ["`safeguard: parameter`"]
        ways += ["a `winner_budget`"]
    unless = "" if word == "ruined" else " unless their images are better"
    return f"Do not use these weights{unless}; try, one change at a time: {', '.join(ways)}."
