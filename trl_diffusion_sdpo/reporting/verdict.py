"""Judges a training: whether the error on the preferred images rose, whether the preference was learned, and what to
do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..step.pair_evaluation import FEWEST_PAIRS

STANDARD_ERRORS = 2.0  # a change counts if it is larger than this many standard errors
SMALLEST = (
    0.01  # relative changes of the winners' error below this do not count, even if the standard error is smaller
)
UNMEASURED = 0.05  # uncertainty that is assumed for a change or an accuracy if its standard error is unknown
COARSE = 0.2  # if the uncertainty is larger, the verdict on a change within the uncertainty is "unknown"
RUINED = 1.0  # above this relative change, the error has more than doubled, and the verdict is "ruined"
FEWEST_AT_ALL = 4  # with fewer pairs, the verdict is "unknown" or "ruined"
BIN_WORSE = (
    1.0  # if the error in a noise bin rises by more than this share, the verdict is "worse", whatever the mean is
)
# The rise in a noise bin must also exceed this many standard errors. The limit is higher than for the mean, because the
# largest rise of several bins is judged.
BIN_STANDARD_ERRORS = 3.0
CHANCE = 0.5  # accuracy of a model that has learned nothing
SMALL_LAMBDA = 0.5  # below this mean lambda, the safeguard removes most of the losers' gradient
AVERAGED_LOGS = 10  # number of the last training logs to average if there is no evaluation
LOGS_TO_WARN = 3  # smallest number of training logs for a warning during training

BEFORE_TRAINING = "before training"
# Word of a verdict -> its label, from good to bad. If there are several evaluation sets, the worst word is the verdict.
LABELS = {
    "unknown": "unknown",
    "better": "better",
    "unchanged": "unchanged",
    "not learned": "unchanged",
    "reversed": "worse",
    "worse": "worse",
    "ruined": "worse",
}
_RISES = {"worse": 1, "ruined": 2}  # words that say that the winners' error rose -> how bad this is
_WINNER = re.compile(r"^(?P<prefix>eval.*)_errors/winner$")
_CHANGE = "errors/winner_change_relative"

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that a verdict needs besides the log history."""

    has_reference: bool  # whether the loss has a reference
    reference_moves: bool  # whether the reference follows the policy, so errors cannot be compared with its errors
    reference_was_given: bool  # whether the user passed a reference; if not, it is the policy before training
    uses_loser: bool  # whether the loss depends on the rejected images
    safeguard: str  # the setting `safeguard`
    decays: bool  # whether the learning rate decays
    num_noise_bins: int
    average_suffix: str  # end of the metric prefix in evaluations of the averaged weights, such as "_ema"
    swapped_labels: bool = False  # whether the images that training prefers were published as rejected
    safeguard_mu: float | None = None  # the setting `safeguard_mu`

    @property
    def reference(self) -> str:
        """Words for the error with which `errors/winner_change` compares. Empty if the reference moves."""
        if self.reference_moves:
            return ""
        return "of the reference" if self.reference_was_given else BEFORE_TRAINING


@dataclass(frozen=True)
class Estimate:
    """A measured value, with its standard error over the pairs, or `None` if the standard error is unknown."""

    value: float
    stderr: float | None = None

    @property
    def noise(self) -> float:
        """Uncertainty of the value: a smaller difference may be chance. Infinite if the standard error is not
        finite."""
        if self.stderr is None:
            return UNMEASURED
        return STANDARD_ERRORS * self.stderr if math.isfinite(self.stderr) else math.inf


@dataclass(frozen=True)
class Measurement:
    """The errors on the pairs at one optimizer step, and how they have changed."""

    step: int  # number of optimizer steps before the measurement
    error: float  # mean squared error of the denoiser on the winners
    before: float  # earlier error with which `error` is compared; unused if `error` is not finite
    since: str  # words for the earlier error, such as "before training"
    stderr: float | None = None  # standard error of the relative change
    bins: Mapping[int, Estimate] = field(default_factory=dict)  # relative changes of the winners' error, by noise bin
    loser_bins: Mapping[int, float] = field(
        default_factory=dict
    )  # relative changes of the losers' error, by noise bin
    accuracy: Estimate | None = None  # share of the pairs whose loser's error rose more than the winner's
    # How much more the losers' error rose than the winners' error, as a share of the winners' earlier error.
    margin: Estimate | None = None
    scale: float | None = None  # mean of the safeguard's lambda over the last training logs
    pairs: float | None = None  # number of evaluated pairs
    name: str = ""  # name of the evaluation set, if it has one

    @property
    def change(self) -> float:
        """Relative change of the winners' error; infinite if the error is not finite."""
        return self.error / self.before - 1 if math.isfinite(self.error) else math.inf

    @property
    def worst(self) -> tuple[int, Estimate] | None:
        """The noise bin with the largest rise of the winners' error, and the rise. If standard errors are known, bins
        with a single pair are ignored, because they have no standard error."""
        counted = [item for item in self.bins.items() if self.stderr is None or item[1].stderr is not None]
        return max(counted, key=lambda item: item[1].value, default=None)

    @property
    def winners(self) -> str:
        """Verdict on the winners' error, such as `"worse"`; see [`judge_winners`]."""
        return judge_winners(self.change, self.stderr, None if self.worst is None else self.worst[1], self.pairs)

    @property
    def preference(self) -> str:
        """Verdict on the preference, such as `"learned"`; see [`judge_preference`]."""
        few = self.pairs is not None and self.pairs < FEWEST_AT_ALL
        return "unknown" if few else judge_preference(self.accuracy, self.margin)

    @property
    def word(self) -> str:
        """Verdict on winners and preference together. `"better"` means that the winners' error did not rise and that
        the preference was learned."""
        if self.winners not in ("better", "unchanged") or self.preference == "unknown":
            return self.winners
        return "better" if self.preference == "learned" else self.preference

    @property
    def is_sure(self) -> bool:
        """Whether there are enough pairs to leave out the word "probably"."""
        return self.pairs is None or self.pairs >= FEWEST_PAIRS or self.word in ("ruined", "unknown")

    def __str__(self) -> str:
        if not math.isfinite(self.error):
            return "no number"
        side = "above" if self.change >= 0 else "below"
        error = "" if self.stderr is None else f" (standard error {self.stderr:.1%})"
        return f"{abs(self.change):.1%} {side} that {self.since}{error}"


@dataclass(frozen=True)
class Verdict:
    """A verdict on a training, in words."""

    word: str  # a key of `LABELS`
    finding: str  # sentences with the measured numbers
    advice: str  # sentences that say what to do; empty if nothing needs to be done
    measured: Measurement | None = None
    pairs: str | None = None  # kind of the measured pairs: "evaluation" or "training"

    @property
    def label(self) -> str:
        """Short form of the verdict: `"better"`, `"unchanged"`, `"worse"` or `"unknown"`."""
        return LABELS[self.word]

    @property
    def headline(self) -> str:
        """The verdict's word. On few pairs, the text adds "probably" and the number of pairs."""
        if self.measured is None or self.measured.is_sure:
            return self.word
        return f"probably {self.word}, {self.measured.pairs:.0f} pairs"

    def __str__(self) -> str:
        return f"{self.finding} {self.advice}".strip()


def judge_winners(
    change: float, stderr: float | None = None, worst_bin: Estimate | None = None, pairs: float | None = None
) -> str:
    """Return the verdict on the winners' error.

    The uncertainty of `change` is two standard errors, but at least 1%. Without a standard error, the uncertainty is
    5%.

    Args:
        change (`float`): Relative change of the winners' mean error.
        stderr (`float`, *optional*): Standard error of `change` over the pairs.
        worst_bin ([`Estimate`], *optional*): The largest relative change in a noise bin.
        pairs (`float`, *optional*): The number of pairs.

    Returns:
        `str`: The first of these words whose condition holds. `"ruined"`: the error is not finite, or has more than
        doubled. `"unknown"`: there are fewer than 4 pairs. `"worse"`: the error rose by more than the uncertainty, or
        the error in a noise bin has more than doubled. `"better"`: the error fell by more than the uncertainty.
        `"unchanged"`: the uncertainty is at most 20%. Otherwise `"unknown"`.
    """
    noise = max(SMALLEST, Estimate(change, stderr).noise)
    if not change <= RUINED:
        return "ruined"
    if pairs is not None and pairs < FEWEST_AT_ALL:
        return "unknown"
    limit = BIN_WORSE if worst_bin is None else max(BIN_WORSE, BIN_STANDARD_ERRORS * (worst_bin.stderr or 0.0))
    if change > noise or (worst_bin is not None and not worst_bin.value <= limit):
        return "worse"
    if change < -noise:
        return "better"
    return "unchanged" if noise <= COARSE else "unknown"


def judge_preference(accuracy: Estimate | None, margin: Estimate | None = None) -> str:
    """Return the verdict on the preference.

    A value is clearly above or below chance if it differs from chance by more than its uncertainty. Chance is an
    accuracy of 0.5 and a margin of 0.

    Args:
        accuracy ([`Estimate`], *optional*): Share of the pairs whose loser's error rose more than the winner's.
        margin ([`Estimate`], *optional*): How much more the losers' error rose than the winners' error. A margin
            without a standard error is ignored.

    Returns:
        `str`: `"learned"` if accuracy or margin is clearly above chance, and neither is clearly below; `"reversed"` if
        the accuracy is clearly below chance; `"unknown"` if nothing was measured; otherwise `"not learned"`.
    """
    distances = [] if accuracy is None else [(accuracy.value - CHANCE, accuracy.noise)]
    if margin is not None and margin.stderr is not None:
        distances.append((margin.value, margin.noise))
    if not distances:
        return "unknown"
    above = any(distance > noise for distance, noise in distances)
    below = any(distance < -noise for distance, noise in distances)
    if above and not below:
        return "learned"
    # An accuracy without a standard error is from training logs. It never counts as reversed, because it is 0 in the
    # first log, when policy and reference are still equal.
    if accuracy is not None and accuracy.stderr is not None and accuracy.value < CHANCE - accuracy.noise:
        return "reversed"
    return "not learned"


def verdict_of(history: History, run: RunFacts, step: int | None = None, images: str = "") -> Verdict | None:
    """Return the verdict on a training, from the last evaluation, or from the last training logs if there is no
    evaluation.

    Args:
        history (`Sequence[Mapping]`): The trainer's log history.
        run ([`RunFacts`]): Facts of the run.
        step (`int`, *optional*): Optimizer step of the weights to judge. The default is the last step.
        images (`str`, *optional*): A sentence on the scores of sample images. The sentence is added to the finding.

    Returns:
        `Verdict` or `None`: `None` if the log history has no error that can be compared with an earlier error.
    """
    evaluations = _evaluations(history, run, averaged=False)
    if evaluations:
        judged = max(evaluations.values(), key=lambda steps: _badness(_at(steps, step)))
        averages = [_at(steps, step) for steps in _evaluations(history, run, averaged=True).values()]
        return _worded(_at(judged, step), "evaluation", run, judged, averages, images)
    mean = _last_training(history, run)
    return None if mean is None else _worded(mean, "training", run, images=images)


def is_evaluation(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of a log history is from an evaluation on preference pairs."""
    return any(map(_WINNER.match, entry))


def rise_of(history: History, run: RunFacts) -> tuple[Measurement, bool] | None:
    """Return the newest evaluation if the winners' error rose, and whether its verdict is worse than in the previous
    evaluation. Return `None` if the error did not rise. With fewer than 30 pairs, only `"ruined"` counts as a rise."""
    newest = next(filter(is_evaluation, reversed(history)), {})
    rises = []
    for prefix, steps in _evaluations(history, run, averaged=False).items():
        is_new = f"{prefix}_errors/winner" in newest and steps[-1].step == newest["step"]
        if is_new and _rise(steps[-1]):
            rises.append(steps)
    if not rises:
        return None
    worst = max(rises, key=lambda steps: (_rise(steps[-1]), steps[-1].change))
    previous = _rise(worst[-2]) if len(worst) > 1 else 0
    return worst[-1], _rise(worst[-1]) > previous


def rise_in_training(history: History, run: RunFacts) -> Measurement | None:
    """Return the mean over the last training logs if its verdict is `"ruined"` and was not before the newest log.
    Otherwise return `None`."""
    if "errors/winner_change" not in history[-1]:
        return None
    measured, previous = (_last_training(logs, run, at_least=LOGS_TO_WARN) for logs in (history, history[:-1]))
    if measured is None or measured.winners != "ruined":
        return None
    return measured if previous is None or previous.winners != "ruined" else None


def words_of_rise(measured: Measurement, run: RunFacts) -> str:
    """Return the text of a warning that the winners' error rises. The text names the noise level of the largest rise
    and what to do."""
    what = "The model is being ruined" if measured.winners == "ruined" else "The preferred images are getting worse"
    return f"{what}: at step {measured.step}, {_of_winners(measured, run)} {_advice(measured, run)}"


def noise_levels_of(noise_bin: int, run: RunFacts) -> tuple[float, float]:
    """Return the lowest and the highest noise level of a noise bin, between 0 (no noise) and 1."""
    return noise_bin / run.num_noise_bins, (noise_bin + 1) / run.num_noise_bins


# ---- Reading the log history -----------------------------------------------------------------------------------------


def _evaluations(history: History, run: RunFacts, *, averaged: bool) -> dict[str, list[Measurement]]:
    """Return the measurements of all evaluations in order, by the prefix of their metrics.

    Each error is compared with the evaluation before the first step. If there is no such evaluation, the error is
    compared with the reference's error, or with the first evaluation if the reference moves.

    Args:
        averaged (`bool`): Whether to return the evaluations of the averaged weights, instead of those of the weights.
    """
    measurements: dict[str, list[Measurement]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for entry in history:
        for prefix in (match["prefix"] for match in map(_WINNER.match, entry) if match):
            if prefix.endswith(run.average_suffix) != averaged:
                continue
            measured = _measured(entry, first.setdefault(prefix, entry), prefix, run, _mean_scale(history))
            if measured is not None and _is_comparable(measured):
                measurements.setdefault(prefix, []).append(measured)
    return measurements


def _measured(
    entry: Mapping[str, Any], first: Mapping[str, Any], prefix: str, run: RunFacts, scale: float | None
) -> Measurement | None:
    def estimate(name: str) -> Estimate | None:
        value, stderr = entry.get(f"{prefix}_errors/{name}"), entry.get(f"{prefix}_errors/{name}_stderr")
        return None if value is None or stderr is None else Estimate(value, stderr)

    step, error = entry["step"], entry[f"{prefix}_errors/winner"]
    change, before = entry.get(f"{prefix}_errors/winner_change"), first[f"{prefix}_errors/winner"]
    from_start = first["step"] == 0
    name = prefix.removesuffix(run.average_suffix).removeprefix("eval").removeprefix("_")
    facts: dict[str, Any] = {"name": name, "pairs": entry.get(f"{prefix}_errors/pairs"), "scale": scale}
    # Standard errors and changes in noise bins are logged relative to the reference. They are used only if the mean
    # error is compared with the reference too.
    same = not run.has_reference or run.reference == BEFORE_TRAINING
    if math.isfinite(error) and (same or (not from_start and run.reference)):
        start = f"{prefix}_{_CHANGE}@"
        levels = [int(key.removeprefix(start)) for key in entry if key.startswith(start)]
        stderrs = f"{prefix}_{_CHANGE}_stderr"
        losers = f"{prefix}_errors/loser_change_relative@"
        facts["stderr"] = entry.get(stderrs)
        facts["bins"] = {
            level: Estimate(entry[f"{start}{level}"], entry.get(f"{stderrs}@{level}")) for level in levels
        }
        facts["loser_bins"] = {level: entry[f"{losers}{level}"] for level in levels if f"{losers}{level}" in entry}
        if run.uses_loser:
            facts |= {"accuracy": estimate("accuracy"), "margin": estimate("margin_relative")}
    if from_start:
        return Measurement(step, error, before, BEFORE_TRAINING, **facts)
    if run.reference and change is not None:
        return Measurement(step, error, error - change, run.reference, **facts)
    if step > first["step"]:
        return Measurement(step, error, before, f"at step {first['step']}", **facts)
    return None


def _last_training(history: History, run: RunFacts, at_least: int = 1) -> Measurement | None:
    """Return the mean over the last training logs. Return `None` if there are fewer than `at_least` logs, or if the
    reference moves."""
    logs = [entry for entry in history if "errors/winner_change" in entry][-AVERAGED_LOGS:]
    if not run.reference or len(logs) < at_least:
        return None
    names = ("errors/winner", "errors/winner_change", "rewards/accuracies")
    error, change, accuracy = (sum(log.get(name, math.nan) for log in logs) / len(logs) for name in names)
    estimate = Estimate(accuracy) if run.uses_loser and not math.isnan(accuracy) else None
    facts: dict[str, Any] = {"accuracy": estimate, "scale": _mean_scale(history)}
    measured = Measurement(logs[-1]["step"], error, error - change, run.reference, **facts)
    return measured if _is_comparable(measured) else None


def _mean_scale(history: History) -> float | None:
    scales = [entry["safeguard/scale"] for entry in history if "safeguard/scale" in entry][-AVERAGED_LOGS:]
    return sum(scales) / len(scales) if scales else None


def _is_comparable(measured: Measurement) -> bool:
    """Return whether there is an earlier error to compare with. An error that is not finite needs no earlier
    error."""
    return not math.isfinite(measured.error) or 0 < measured.before < math.inf


def _badness(measured: Measurement) -> tuple[int, bool, float]:
    """Return a sort key for the measurements of several evaluation sets: by the verdict, its certainty and the
    change."""
    return list(LABELS).index(measured.word), measured.is_sure, measured.change


def _rise(measured: Measurement) -> int:
    is_sure = measured.pairs is None or measured.pairs >= FEWEST_PAIRS or measured.winners == "ruined"
    return _RISES.get(measured.winners, 0) if is_sure else 0


def _at(measurements: Sequence[Measurement], step: int | None) -> Measurement:
    """Return the measurement at a step, or the last measurement if the step has none."""
    return next((measured for measured in reversed(measurements) if measured.step == step), measurements[-1])


# ---- Words -----------------------------------------------------------------------------------------------------------


def _worded(
    measured: Measurement,
    pairs: str,
    run: RunFacts,
    history: Sequence[Measurement] = (),
    averages: Iterable[Measurement] = (),
    images: str = "",
) -> Verdict:
    advice = _advice(measured, run)
    lowest = min(history, key=lambda earlier: earlier.change, default=None)
    if measured.winners in _RISES and lowest is not None and lowest.step not in (0, measured.step):
        advice += f" It was lowest at step {lowest.step} ({lowest.change:+.1%})."
    sentences = [f"At step {measured.step}, {_of_winners(measured, run)}"]
    if measured.preference != "unknown":
        sentences.append(_of_preference(measured, pairs))
    sentences += [f"With averaged weights, the error{_of_set(average)} is {average}." for average in averages]
    if pairs == "training":
        sentences.append("Without an evaluation on held-out pairs, nothing is known of other pairs.")
    sentences += [images] if images else []
    verdict = Verdict(measured.word, "", advice, measured, pairs)
    return replace(verdict, finding=f"Verdict: {verdict.headline}. {' '.join(sentences)}")


def _of_winners(measured: Measurement, run: RunFacts) -> str:
    words = f"the error on the preferred images{_of_set(measured)} is {measured}"
    if math.isfinite(measured.error):
        words += f": {measured.error:.4g}, before {measured.before:.4g}"
    if measured.worst is not None:
        noise_bin, change = measured.worst
        low, high = noise_levels_of(noise_bin, run)
        words += (
            f". The worst change is {change.value:+.1%}, at noise levels {low:.3g} to {high:.3g} (bin {noise_bin})"
        )
    swapped = " With `swap_labels`, the preferred images are those that were published as rejected."
    return f"{words}.{swapped if run.swapped_labels else ''}"


def _of_preference(measured: Measurement, pairs: str) -> str:
    learned = {"learned": "is learned", "reversed": "is reversed"}.get(measured.preference, "is not learned")
    numbers = []
    if measured.accuracy is not None:
        numbers.append(f"accuracy {_with_error(measured.accuracy, '.0%')}")
    if measured.margin is not None:
        numbers.append(f"margin {_with_error(measured.margin, '+.2%')} of the error")
    whose = "held-out" if pairs == "evaluation" else "training"
    return f"The preference {learned}: {', '.join(numbers)} on {whose} pairs."


def _with_error(estimate: Estimate, style: str) -> str:
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:{style.lstrip('+')}}"
    return f"{estimate.value:{style}}{error}"


def _of_set(measured: Measurement) -> str:
    return f" of `{measured.name}`" if measured.name else ""


def _advice(measured: Measurement, run: RunFacts) -> str:
    """Return sentences that say what to do, in the order of docs/safeguard.md#when-it-got-worse."""
    word, enough = measured.word, measured.pairs is None or measured.pairs >= FEWEST_PAIRS
    more = "Evaluate on more pairs" if enough else f"Evaluate on {FEWEST_PAIRS} pairs or more"
    if word == "unknown":
        return f"{more}, because the uncertainty of this verdict is too large."
    sentences = []
    if measured.winners in _RISES:
        ways = ["a lower `learning_rate`" if run.decays else "`lr_scheduler_type: cosine`"]
        if run.uses_loser:
            ways += [] if run.safeguard == "none" else ["a larger `safeguard_mu`"]
            ways += [] if run.safeguard == "parameter" else ["`safeguard: parameter`"]
            ways += ["a `winner_budget`"]
        unless = "" if word == "ruined" else ", unless their images look better"
        sentences.append(
            f"Do not use these weights{unless}. Train again with one of these changes at a time: {', '.join(ways)}."
        )
    elif word in ("not learned", "reversed"):
        sentences.append(_advice_to_learn(measured, run))
    return " ".join(sentences if measured.is_sure else [*sentences, f"{more} to be sure."])


def _advice_to_learn(measured: Measurement, run: RunFacts) -> str:
    """Return a sentence that says what to change if the winners' error did not rise but the preference was not
    learned."""
    if measured.scale is not None and measured.scale < SMALL_LAMBDA and run.safeguard != "none":
        now = "" if run.safeguard_mu is None else f" than {run.safeguard_mu:g}"
        return (
            f"The safeguard removed most of the rejected images' gradient: its lambda was {measured.scale:.2f} on "
            f"average. Try a smaller `safeguard_mu`{now}."
        )
    if measured.word == "reversed":
        return "Check that the labels are not swapped. If they are right, try a lower `learning_rate`."
    return "Train for more steps, with more pairs per step, or with a higher `learning_rate`."
