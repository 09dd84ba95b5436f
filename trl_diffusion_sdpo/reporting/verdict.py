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
FEWEST = 30  # pairs; with fewer, the standard error is too small too often
BIN_WORSE = 1.0  # above, in any noise bin: worse, whatever the mean
BIN_STANDARD_ERRORS = 3.0  # of a bin's change: there are several bins
AVERAGED_LOGS = 10  # of training, without an evaluation
LOGS_TO_WARN = 3  # at least, during training

BEFORE_TRAINING = "before training"
LABELS = {"better": "better", "unchanged": "unchanged", "worse": "worse", "ruined": "worse", "unknown": "unknown"}
_RISES = {"worse": 1, "ruined": 2}  # by how bad they are
_SEVERITY = ("unknown", "better", "unchanged", "worse", "ruined")  # of several sets, the last of these counts
_WINNER = re.compile(r"^(?P<prefix>eval.*)_errors/winner$")

History = Sequence[Mapping[str, Any]]
_SWAPPED = "With `swap_labels`, the preferred images are those that were published as rejected."


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
    swapped_labels: bool = False  # whether the preferred images are those that were published as rejected

    @property
    def reference(self) -> str:
        """What `errors/winner_change` is relative to; empty if the reference moves."""
        if self.reference_moves:
            return ""
        return "of the reference" if self.reference_was_given else BEFORE_TRAINING

    @property
    def labels(self) -> str:
        """A sentence on swapped labels, after a space; empty if they are as published."""
        return f" {_SWAPPED}" if self.swapped_labels else ""


@dataclass(frozen=True)
class Change:
    """A relative change of an error, and its standard error over the pairs if that is known."""

    value: float
    stderr: float | None = None

    @property
    def noise(self) -> float:
        """The change that is not told from none."""
        if self.stderr is None:
            return UNMEASURED
        return max(SMALLEST, STANDARD_ERRORS * self.stderr) if math.isfinite(self.stderr) else math.inf

    @property
    def is_worse_in_a_bin(self) -> bool:
        return not self.value <= max(BIN_WORSE, BIN_STANDARD_ERRORS * (self.stderr or 0.0))


@dataclass(frozen=True)
class Measurement:
    """The winners' error at one step."""

    step: int  # optimizer steps done
    error: float  # mean squared error of the denoiser on the winners
    before: float  # the error it is compared with; irrelevant if `error` is not finite
    since: str  # description of that error, such as "before training"
    stderr: float | None = None  # of the relative change
    bins: Mapping[int, Change] = field(default_factory=dict)  # by noise bin
    accuracy: float | None = None  # share of pairs whose implicit reward is right
    pairs: float | None = None  # number of pairs
    name: str = ""  # of the evaluation set, if it has one

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
        return judge(self.change, self.stderr, max(counted, key=lambda found: found.value, default=None), self.pairs)

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


def judge(
    change: float, stderr: float | None = None, worst_bin: Change | None = None, pairs: float | None = None
) -> str:
    """The verdict's word.

    Args:
        change (`float`): Relative change of the winners' mean error.
        stderr (`float`, *optional*): Its standard error over the pairs.
        worst_bin ([`Change`], *optional*): The largest change in a noise bin.
        pairs (`float`, *optional*): The number of pairs.

    Returns:
        `str`: `"ruined"` above +100%, or if the error is not finite; otherwise `"unknown"` with fewer than 30 pairs;
        `"worse"` above the noise, or if a noise bin has doubled; `"better"` below it; otherwise `"unchanged"`, or
        `"unknown"` if the noise is above 20%. The noise is two standard errors, at least 1%, or 5% where none is known.
    """
    noise = Change(change, stderr).noise
    if not change <= RUINED:
        return "ruined"
    if pairs is not None and pairs < FEWEST:
        return "unknown"
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
        measured = max(last, key=_badness)
        averages = [_at(found, step) for prefix, found in evaluations.items() if _is_average(prefix, run)]
        return _worded(measured, "evaluation", run, of_policy[last.index(measured)], averages)
    mean = _last_training(history, run)
    return None if mean is None else _worded(mean, "training", run, [], [])


def is_evaluation(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a log history is an evaluation of pairs."""
    return any(map(_WINNER.match, entry))


def rise_of(history: History, run: RunFacts) -> tuple[Measurement, bool] | None:
    """What the newest evaluation in a log history says, if that is worse than before training beyond the noise; and
    whether it is worse than what the evaluation before it said."""
    newest = next(filter(is_evaluation, reversed(history)), {})
    prefixes = (match["prefix"] for match in map(_WINNER.match, newest) if match)
    found = _evaluations(history, run)
    measured = [found[prefix] for prefix in prefixes if prefix in found and not _is_average(prefix, run)]
    worst = max(measured, key=lambda evaluations: _badness(evaluations[-1]), default=None)
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
        f"{what}: at step {measured.step} the error on them{_of_set(measured)} is {measured}{_against(measured)}"
        f"{_of_bins(measured, run)}.{run.labels} {_advice(measured, run)}"
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
            if measured is not None and _is_comparable(measured):
                found.setdefault(prefix, []).append(measured)
    return found


def _measured(entry: Mapping[str, Any], first: Mapping[str, Any], prefix: str, run: RunFacts) -> Measurement | None:
    error, change = (entry.get(f"{prefix}_errors/{name}") for name in ("winner", "winner_change"))
    from_start = first["step"] == 0
    same = not run.has_reference or run.reference == BEFORE_TRAINING  # what the logged changes are relative to
    facts: dict[str, Any] = {"accuracy": entry.get(f"{prefix}_rewards/accuracies"), "name": _set_name(prefix, run)}
    facts["pairs"] = entry.get(f"{prefix}_errors/pairs")
    if math.isfinite(error) and (same or (not from_start and run.reference)):
        facts |= {"stderr": entry.get(f"{prefix}_{_RELATIVE_STDERR}"), "bins": _bins(entry, prefix)}
    if from_start:
        return Measurement(entry["step"], error, first[f"{prefix}_errors/winner"], BEFORE_TRAINING, **facts)
    if run.reference and change is not None:
        return Measurement(entry["step"], error, error - change, run.reference, **facts)
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
    measured = Measurement(logs[0]["step"], error, error - change, run.reference, accuracy=known)
    return measured if _is_comparable(measured) else None


def _is_comparable(measured: Measurement) -> bool:
    """Whether there is an earlier error, or need be none."""
    return not math.isfinite(measured.error) or 0 < measured.before < math.inf


def _badness(measured: Measurement) -> tuple[int, float]:
    """Orders the measurements of several sets: by the word, then by the change."""
    return _SEVERITY.index(measured.word), measured.change


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


def _set_name(prefix: str, run: RunFacts) -> str:
    """The name of an evaluation set, without `eval_` and the end of averages."""
    return prefix.removesuffix(run.average_suffix).removeprefix("eval").removeprefix("_")


def _worded(
    measured: Measurement, pairs: str, run: RunFacts, history: Sequence[Measurement], averages: Iterable[Measurement]
) -> Verdict:
    word = measured.word
    finding = (
        f"Verdict: {word}. The error on the preferred images of the {pairs} pairs{_of_set(measured)} is {measured}"
        f"{_against(measured)}, at step {measured.step}{_of_bins(measured, run)}.{run.labels}"
    )
    for average in averages:
        finding += f" That of the averaged weights{_of_set(average)} is {average}."
    if pairs == "training":
        finding += " Without an evaluation on held-out pairs, nothing is known of other pairs."
    advice = _advice(measured, run)
    lowest = min(history, key=lambda found: found.change, default=None)
    if word in _RISES and lowest is not None and lowest.step not in (0, measured.step):
        advice += f" It was lowest at step {lowest.step} ({lowest.change:+.1%})."
    return Verdict(word, finding, advice, measured, pairs)


def _of_set(measured: Measurement) -> str:
    return f" of `{measured.name}`" if measured.name else ""


def _against(measured: Measurement) -> str:
    return f", {measured.error:.4g} against {measured.before:.4g}" if math.isfinite(measured.error) else ""


def _of_bins(measured: Measurement, run: RunFacts) -> str:
    if measured.worst is None:
        return ""
    noise_bin, change = measured.worst
    low, high = noise_levels_of(noise_bin, run)
    return f"; worst at noise levels {low:.3g} to {high:.3g} (bin {noise_bin}): {change.value:+.1%}"


def _advice(measured: Measurement, run: RunFacts) -> str:
    """In the order of docs/safeguard.md#when-it-got-worse."""
    word = measured.word
    if word == "unknown" and measured.pairs is not None and measured.pairs < FEWEST:
        return f"Evaluate on {FEWEST} pairs at least; there were {measured.pairs:.0f}."
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
