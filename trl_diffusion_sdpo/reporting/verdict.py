"""Judges a training by its evaluations of held-out pairs: whether the error on the preferred images rose, and whether
the preference was learned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..losses import NOISE_BINS
from ..step.pair_evaluation import FEWEST_PAIRS
from ..utils.files import VERDICT_FILE, write_atomically
from .history import History, evaluation_prefixes
from .sample_images import SamplePair

STANDARD_ERRORS = 2.0  # a change is significant if it exceeds this many standard errors
SMALLEST = 0.01  # smaller relative changes of the winners' error are ignored
UNMEASURED = 0.05  # uncertainty of a change whose standard error is unknown
COARSE = 0.2  # with a larger uncertainty, an insignificant change is "unknown", not "unchanged"
RUINED = 1.0  # above this relative change, the error has more than doubled, and the verdict is "ruined"
FEWEST_AT_ALL = 4  # with fewer pairs, the verdict is "unknown" or "ruined"
BIN_WORSE = 1.0  # if the error in a noise bin rises by more than 100%, the verdict is "worse"
# For "worse", the rise in a noise bin must also exceed this many standard errors: more than for the mean over all bins,
# because the bin with the largest rise is judged.
BIN_STANDARD_ERRORS = 3.0
CHANCE = 0.5  # accuracy of a model that has learned nothing
AVERAGED_LOGS = 10  # number of the last training logs over which the error on training pairs is averaged

BEFORE_TRAINING = "before training"
NO_COMPARISON = "No error on held-out pairs could be compared with an earlier one."
RISES = ("worse", "ruined")  # verdicts that say that the winners' error rose
_AGAIN = (
    "train again with a stricter safeguard or a lower `learning_rate` (see `When it got worse` in docs/safeguard.md)."
)
# Verdict -> advice. Of several evaluation sets, the verdict that comes last here is reported.
ADVICE = {
    "unknown": f"Hold out at least {FEWEST_PAIRS} pairs: pass an `eval_dataset`, and set `eval_strategy: steps` "
    "and `eval_on_start: true`. Until then, judge by the sample images (`sample_prompts`).",
    "better": "",
    "unchanged": "",
    "not learned": "Train for more steps, with more pairs per step or a higher `learning_rate`. If the safeguard's "
    "lambda is below 0.5, try a smaller `safeguard_mu`.",
    "reversed": "Check that the labels are not swapped. If they are right, try a lower `learning_rate`.",
    "worse": f"Unless the images look better, {_AGAIN}",
    "ruined": f"Do not use these weights: {_AGAIN}",
}
_CHANGE = "errors/winner_change_relative"


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that a verdict needs besides the log history."""

    reference_moves: bool  # whether the reference (and so its errors) changes during training
    reference_was_given: bool  # whether the user passed a reference; if not, it is the policy before training
    uses_loser: bool  # whether the loss depends on the rejected images
    average_suffix: str  # end of the metric prefix in evaluations of the averaged weights, such as "_ema"

    @property
    def reference(self) -> str:
        """Words for the error that `errors/winner_change` is relative to. Empty if the reference changes in
        training."""
        if self.reference_moves:
            return ""
        return "of the reference" if self.reference_was_given else BEFORE_TRAINING


@dataclass(frozen=True)
class Measurement:
    """The errors on the pairs at one optimizer step, and how they have changed."""

    step: int  # number of optimizer steps before the measurement
    winner_error: float  # mean squared error of the denoiser on the winners
    winner_error_before: float  # earlier error, to compare with `winner_error`
    compared_with: str  # words for the earlier error, such as "before training"
    winner_change_stderr: float | None = None  # standard error of the relative change
    worst_noise_bin: int | None = None  # noise bin with the largest rise of the winners' error
    worst_noise_bin_change: float | None = None  # relative change in this bin
    worst_noise_bin_stderr: float | None = None
    reward_accuracy: float | None = None  # share of pairs whose loser's error rose more than the winner's error
    reward_accuracy_stderr: float | None = None
    evaluated_pairs: float | None = None  # number of evaluated pairs
    evaluation_set: str = ""  # name of the evaluation set, if it has one

    @property
    def change(self) -> float:
        """Relative change of the winners' error, or infinity if the error is not finite."""
        return self.winner_error / self.winner_error_before - 1 if math.isfinite(self.winner_error) else math.inf

    @property
    def winners(self) -> str:
        """Verdict of [`judge_winners`], such as `"worse"`."""
        return judge_winners(
            self.change,
            self.winner_change_stderr,
            self.worst_noise_bin_change,
            self.worst_noise_bin_stderr,
            self.evaluated_pairs,
        )

    @property
    def preference(self) -> str:
        """Verdict of [`judge_preference`], such as `"learned"`. Fewer than 30 pairs cannot show that the preference was
        not learned: `"unknown"`."""
        if self.evaluated_pairs is not None and self.evaluated_pairs < FEWEST_AT_ALL:
            return "unknown"
        word = judge_preference(self.reward_accuracy, self.reward_accuracy_stderr)
        return "unknown" if word == "not learned" and self._is_unsure else word

    @property
    def word(self) -> str:
        """Verdict on winners and preference together. `"better"` means that the winners' error did not rise and that
        the preference was learned."""
        if self.winners not in ("better", "unchanged"):
            return self.winners
        if self.preference == "unknown":
            return self.winners if self.reward_accuracy is None else "unknown"
        return "better" if self.preference == "learned" else self.preference

    @property
    def advice(self) -> str:
        """Advice on the verdict. After an evaluation of fewer than 30 pairs, it is to hold out more of them first."""
        return ADVICE["unknown" if self._is_unsure and self.word != "ruined" else self.word]

    @property
    def rises(self) -> bool:
        """Whether the winners' error rose. On fewer than 30 pairs, only `"ruined"` counts as a rise."""
        return self.winners == "ruined" or (self.winners in RISES and not self._is_unsure)

    def __str__(self) -> str:
        whose = f" of `{self.evaluation_set}`" if self.evaluation_set else ""
        start = f"At step {self.step}, the error on the preferred images{whose} is"
        if math.isfinite(self.winner_error):
            side = "above" if self.change >= 0 else "below"
            stderr = _with_error(self.winner_change_stderr)
            text = f"{start} {abs(self.change):.1%} {side} that {self.compared_with}{stderr}"
        else:
            text = f"{start} no number"
        if self.reward_accuracy is not None:
            text += f", and the accuracy is {self.reward_accuracy:.0%}{_with_error(self.reward_accuracy_stderr)}"
        few = ""
        if self._is_unsure and self.word != "ruined":
            few = f", but {self.evaluated_pairs:.0f} pairs are too few to be sure"
        return f"{text}, on held-out pairs{few}."

    @property
    def _is_unsure(self) -> bool:
        return self.evaluated_pairs is not None and self.evaluated_pairs < FEWEST_PAIRS


@dataclass(frozen=True)
class Verdict:
    """A verdict on a training."""

    measured: Measurement | None  # `None` if no evaluation can be compared with an earlier error
    images: str = ""  # a sentence on the win rates of sample images
    training: str = ""  # without a measurement: a sentence on training logs that show a ruined model

    @property
    def word(self) -> str:
        """The verdict in one word, a key of `ADVICE`."""
        return "unknown" if self.measured is None else self.measured.word

    @property
    def sentence(self) -> str:
        """The verdict with its numbers."""
        parts = [f"Verdict: {self.word}.", str(self.measured or NO_COMPARISON), self.training, self.images]
        return " ".join(part for part in parts if part)

    @property
    def advice(self) -> str:
        """Advice on what to do next."""
        if self.measured is not None:
            return self.measured.advice
        return ADVICE["ruined" if self.training else "unknown"]

    def __str__(self) -> str:
        return f"{self.sentence} {self.advice}".strip()


def judge_winners(
    change: float,
    stderr: float | None = None,
    worst_change: float | None = None,
    worst_stderr: float | None = None,
    pairs: float | None = None,
) -> str:
    """Return the verdict on the winners' error.

    The uncertainty of `change` is two standard errors, but at least 1%. Without a standard error, it is 5%, and the
    verdict is never `"better"`.

    Args:
        change (`float`): Relative change of the winners' mean error.
        stderr (`float`, *optional*): Standard error of `change` over the pairs.
        worst_change, worst_stderr (`float`, *optional*): The largest relative change in a noise bin, and its standard
            error.
        pairs (`float`, *optional*): The number of pairs.

    Returns:
        `str`: The first of the following words whose condition is true. `"ruined"`: the error is not finite, or has
        more than doubled. `"unknown"`: there are fewer than 4 pairs. `"worse"`: the error rose by more than the
        uncertainty, or the error in a noise bin has more than doubled, by more than 3 standard errors. `"better"`: the
        error fell by more than the uncertainty. `"unchanged"`: the error did not rise by more than the uncertainty,
        which is at most 20%. Otherwise `"unknown"`.
    """
    noise = max(SMALLEST, _noise(stderr))
    if not change <= RUINED:
        return "ruined"
    if pairs is not None and pairs < FEWEST_AT_ALL:
        return "unknown"
    limit = max(BIN_WORSE, BIN_STANDARD_ERRORS * (worst_stderr or 0.0))
    if change > noise or (worst_change is not None and not worst_change <= limit):
        return "worse"
    if change < -noise and stderr is not None:
        return "better"
    return "unchanged" if noise <= COARSE else "unknown"


def judge_preference(accuracy: float | None, stderr: float | None = None) -> str:
    """Return the verdict on the preference.

    Args:
        accuracy (`float`, *optional*): Share of pairs whose loser's error rose more than the winner's error.
        stderr (`float`, *optional*): Standard error of the accuracy.

    Returns:
        `str`: `"unknown"` without an accuracy and its standard error. `"learned"` or `"reversed"` if the accuracy is
        above or below one half by more than two standard errors. Otherwise `"not learned"`.
    """
    if accuracy is None or stderr is None:
        return "unknown"
    if abs(accuracy - CHANCE) <= _noise(stderr):
        return "not learned"
    return "learned" if accuracy > CHANCE else "reversed"


def verdict_of(history: History, run: RunFacts, step: int | None = None, images: str = "") -> Verdict:
    """Return the verdict on a training, from its last evaluation of held-out pairs. Without one, it is `"unknown"`.

    Args:
        history (`Sequence[Mapping]`): The trainer's log history.
        run ([`RunFacts`]): Facts of the run.
        step (`int`, *optional*): Optimizer step of the weights to judge, by default the last step.
        images (`str`, *optional*): A sentence on the win rates of sample images, to add to the verdict.
    """
    measured = worst_of(history, run, step)
    return Verdict(measured, images, training="" if measured is not None else ruined_in_training(history, run))


def worst_of(history: History, run: RunFacts, step: int | None = None) -> Measurement | None:
    """Return the measurement with the worst verdict among the evaluation sets. Of each set, the evaluation at `step`
    counts or, if there is none, the last."""
    last: dict[str, Measurement] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for entry in history:
        for prefix in evaluation_prefixes(entry):
            measured = _measured(entry, first.setdefault(prefix, entry), prefix, run)
            is_later = prefix not in last or last[prefix].step != step
            if measured is not None and is_later and not prefix.endswith(run.average_suffix):
                last[prefix] = measured
    return max(last.values(), key=lambda measured: (list(ADVICE).index(measured.word), measured.change), default=None)


def rise_at(history: History, run: RunFacts, step: int) -> Measurement | None:
    """Return the measurement with the worst verdict if it is of this step and shows that the winners' error rose."""
    measured = worst_of(history, run)
    return measured if measured is not None and measured.step == step and measured.rises else None


def ruined_in_training(history: History, run: RunFacts, fewest_logs: int = 1) -> str:
    """Return a sentence if the winners' error, averaged over the last training logs, has more than doubled or is not a
    number. Return `""` otherwise, with fewer than `fewest_logs` logs, or if the reference changes in training."""
    logs = [entry for entry in history if "errors/winner_change" in entry][-AVERAGED_LOGS:]
    if not run.reference or len(logs) < fewest_logs:
        return ""
    error = fmean(log["errors/winner"] for log in logs)
    before = error - fmean(log["errors/winner_change"] for log in logs)
    if error <= (1 + RUINED) * before or before == 0:
        return ""
    return (
        f"On training pairs, the error on the preferred images is {error:.3g}, and that {run.reference} {before:.3g}."
    )


def words_of_rise(measured: Measurement, run: RunFacts) -> str:
    """Return the text of a warning that the winners' error rises."""
    what = "The model is being ruined" if measured.winners == "ruined" else "The preferred images are getting worse"
    where = ""
    if measured.worst_noise_bin is not None:
        low = measured.worst_noise_bin / NOISE_BINS
        high = (measured.worst_noise_bin + 1) / NOISE_BINS
        where = (
            f" The worst change is {measured.worst_noise_bin_change:+.1%}, at noise levels {low:.3g} to {high:.3g}."
        )
    return f"{what}. {measured}{where} {ADVICE[measured.winners]}"


def write_verdict(
    folder: Path, verdict: Verdict, images: Sequence[SamplePair], scores: Mapping[str, Any] | None = None
) -> None:
    """Write the verdict with its numbers into `verdict.json` in a run's output folder. Numbers that are not
    finite are written as `null`.

    Args:
        images (`Sequence[SamplePair]`): Sample images before and after training.
        scores (`Mapping`, *optional*): Name of a scorer -> win rate of the images after training.
    """
    facts: dict[str, Any] = {"word": verdict.word, "sentence": verdict.sentence}
    measured = verdict.measured
    if measured is not None:
        facts |= {**asdict(measured), "winners": measured.winners, "preference": measured.preference}
        stderr = measured.winner_change_stderr
        facts["winner_change_percent"] = 100 * measured.change
        facts["winner_change_stderr_percent"] = None if stderr is None else 100 * stderr
    for name, fact in facts.items():
        if isinstance(fact, float) and not math.isfinite(fact):
            facts[name] = None
    facts["advice"] = verdict.advice
    facts["images"] = [asdict(pair) for pair in images]
    facts["sample_scores"] = scores or {}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / VERDICT_FILE, json.dumps(facts, indent=2, allow_nan=False).encode() + b"\n")


# ---- Reading the log history -----------------------------------------------------------------------------------------


def _measured(entry: Mapping[str, Any], first: Mapping[str, Any], prefix: str, run: RunFacts) -> Measurement | None:
    """Compare an evaluation with the one before the first step or, if there was none, with the reference's error.
    Return `None` if neither is known."""
    error = entry[f"{prefix}_errors/winner"]
    change = entry.get(f"{prefix}_errors/winner_change")
    if first["step"] == 0:
        before, since = first[f"{prefix}_errors/winner"], BEFORE_TRAINING
    elif run.reference and change is not None:
        before, since = error - change, run.reference
    else:
        return None
    name = prefix.removeprefix("eval").removeprefix("_")
    facts: dict[str, Any] = {"evaluation_set": name, "evaluated_pairs": entry.get(f"{prefix}_errors/pairs")}
    # Standard errors, noise bins and accuracies are logged relative to the reference. Skip them unless the mean error
    # is relative to it too.
    if since == run.reference and math.isfinite(error):
        facts["winner_change_stderr"] = entry.get(f"{prefix}_{_CHANGE}_stderr")
        facts |= _worst_bin(entry, prefix)
        if run.uses_loser:
            facts["reward_accuracy"] = entry.get(f"{prefix}_errors/accuracy")
            facts["reward_accuracy_stderr"] = entry.get(f"{prefix}_errors/accuracy_stderr")
    if math.isfinite(error) and not 0 < before < math.inf:
        return None
    return Measurement(entry["step"], error, before, since, **facts)


def _worst_bin(entry: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the noise bin with the largest rise of the winners' error. If standard errors were logged, bins without
    one are ignored: they have only one pair."""
    start = f"{prefix}_{_CHANGE}@"
    stderrs = f"{prefix}_{_CHANGE}_stderr"
    bins = [int(key.removeprefix(start)) for key in entry if key.startswith(start)]
    bins = [noise_bin for noise_bin in bins if stderrs not in entry or f"{stderrs}@{noise_bin}" in entry]
    if not bins:
        return {}
    worst = max(bins, key=lambda noise_bin: entry[f"{start}{noise_bin}"])
    stderr = entry.get(f"{stderrs}@{worst}")
    change = entry[f"{start}{worst}"]
    return {"worst_noise_bin": worst, "worst_noise_bin_change": change, "worst_noise_bin_stderr": stderr}


def _noise(stderr: float | None) -> float:
    """Return the uncertainty of a value: smaller differences may be due to chance."""
    if stderr is None:
        return UNMEASURED
    return STANDARD_ERRORS * stderr if math.isfinite(stderr) else math.inf


def _with_error(stderr: float | None) -> str:
    return "" if stderr is None or not math.isfinite(stderr) else f" (standard error {stderr:.1%})"
