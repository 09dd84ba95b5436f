"""What a training did to the preferred images, in one word and its numbers: at the end, and as soon as it is ruined."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.ema import EMA_FOLDER

if TYPE_CHECKING:
    from ..trainer.diffusion_sdpo_trainer import DiffusionSDPOTrainer

logger = logging.getLogger(__name__)

# Changes of the winners' mean error, as a share of that before training.
BETTER = -0.01  # at or below
KEPT = 0.05  # at or below: what draws of other pairs, or of other noise, also make
RUINED = 1.0  # above: the error has doubled
LEVEL_WORSE = 1.0  # above, at any one noise level: worse, whatever the mean says
STRETCH = 10  # logs of training that are averaged where there is no evaluation
STRETCH_TO_WARN = 3  # as many at least for a warning on the way

BEFORE_TRAINING = "before training"
_WINNER = re.compile(r"^(?P<prefix>eval.*)_errors/winner$")


@dataclass(frozen=True)
class Measurement:
    """The winners' error at a moment.

    Attributes:
        step (`int`): Optimizer steps done.
        error (`float`): Mean squared error of the denoiser on the winners.
        before (`float`): The same of what it is compared with.
        since (`str`): What that is.
        worst (`tuple[int, float]`, *optional*): The noise level that rose most, and by which share.
    """

    step: int
    error: float
    before: float
    since: str
    worst: tuple[int, float] | None = None

    @property
    def change(self) -> float:
        """As a share of what it is compared with; infinite if the error is no number."""
        return self.error / self.before - 1 if math.isfinite(self.error) else math.inf


@dataclass(frozen=True)
class Verdict:
    """What is to be said.

    Attributes:
        word (`str`): `"better"`, `"kept"`, `"worse"` or `"ruined"`.
        finding (`str`): Sentences with the numbers.
        advice (`str`): What to do; empty if nothing is.
    """

    word: str
    finding: str
    advice: str

    def __str__(self) -> str:
        return f"{self.finding} {self.advice}".strip()


def judge(change: float, worst_level: float | None = None) -> str:
    """The rule.

    Args:
        change (`float`): Of the winners' mean error, as a share of that before training.
        worst_level (`float`, *optional*): The largest such change at one noise level.

    Returns:
        `str`: `"ruined"` above +100%, or if the error is no number; `"worse"` above +5%, or above +100% at one noise
        level; `"better"` at -1% and below; `"kept"` between.
    """
    if not change <= RUINED:
        return "ruined"
    if change > KEPT or (worst_level is not None and not worst_level <= LEVEL_WORSE):
        return "worse"
    return "better" if change <= BETTER else "kept"


def verdict_of(trainer: DiffusionSDPOTrainer) -> Verdict | None:
    """The verdict on a trainer's weights as they stand: from its last evaluation, or from its last logs if it has none.

    Returns:
        `Verdict` or `None`: `None` where nothing was measured that the error could be compared with.
    """
    rises = _Rises(trainer)
    at = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    evaluations = rises.evaluations(trainer.state.log_history)
    own = [history for prefix, history in evaluations.items() if not _is_average(prefix)]
    last = [_at(history, at) for history in own if history]
    if last:
        measured = max(last, key=lambda found: found.change)  # of several sets, the one that suffered most
        history = own[last.index(measured)]
        averages = [_at(history, at) for prefix, history in evaluations.items() if _is_average(prefix)]
        return _worded(measured, "evaluation", trainer, history, averages)
    measured = rises.training(trainer.state.log_history)
    return None if measured is None else _worded(measured, "training", trainer, [], [])


class VerdictCallback(TrainerCallback):
    """Says the verdict at the end of training, and once on the way if the model is ruined.

    Args:
        trainer ([`DiffusionSDPOTrainer`]): Whose logs are read.
    """

    def __init__(self, trainer: DiffusionSDPOTrainer):
        self._trainer, self._warned = trainer, False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._warned = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._warned or not state.is_world_process_zero:
            return
        newest, rises = state.log_history[-1], _Rises(self._trainer)
        if any(_WINNER.match(name) and not _is_average(name) for name in newest):
            found = [history[-1] for history in rises.evaluations(state.log_history).values() if history]
            found = [measured for measured in found if measured.step == newest["step"]]
        elif "errors/winner" in newest and args.eval_strategy == "no":
            measured = rises.training(state.log_history, at_least=STRETCH_TO_WARN)
            found = [] if measured is None else [measured]
        else:
            return
        worst = max(found, key=lambda measured: measured.change, default=None)
        if worst is not None and judge(worst.change) == "ruined":
            self._warned = True
            logger.warning(
                "The model is being ruined: at step %d the error on preferred images is %s (%.4g against %.4g). %s",
                *(worst.step, _compared(worst), worst.error, worst.before, _advice("ruined", self._trainer)),
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        verdict = verdict_of(self._trainer) if state.is_world_process_zero else None
        if verdict is not None:
            logger.log(logging.WARNING if verdict.advice else logging.INFO, "%s", verdict)


class _Rises:
    """Reads measurements from a log history.

    What the error is compared with is, if it was measured, that of the evaluation before the first step; else the
    reference's where it stands still; else that of the first evaluation.
    """

    def __init__(self, trainer: DiffusionSDPOTrainer):
        self._reference = "" if trainer.args.sync_ref_model else BEFORE_TRAINING
        if self._reference and trainer.gave_reference:
            self._reference = "of the reference"

    def evaluations(self, history: Sequence[Mapping[str, Any]]) -> dict[str, list[Measurement]]:
        """By their prefix, such as `eval` or `eval_ema`, in order."""
        found: dict[str, list[Measurement]] = {}
        first: dict[str, tuple[int, float]] = {}
        for entry in history:
            for prefix in (match["prefix"] for match in map(_WINNER.match, entry) if match):
                error = entry[f"{prefix}_errors/winner"]
                start, start_error = first.setdefault(prefix, (entry["step"], error))
                change = entry.get(f"{prefix}_errors/winner_change")
                measured = None
                if start == 0:
                    measured = Measurement(entry["step"], error, start_error, BEFORE_TRAINING, _worst(entry, prefix))
                elif self._reference and change is not None:
                    measured = _relative(entry["step"], error, change, self._reference, _worst(entry, prefix))
                elif entry["step"] > start:
                    measured = Measurement(entry["step"], error, start_error, f"at step {start}")
                if measured is not None and measured.before > 0:
                    found.setdefault(prefix, []).append(measured)
        return found

    def training(self, history: Sequence[Mapping[str, Any]], at_least: int = 1) -> Measurement | None:
        """Over the last logs of training; `None` of fewer than `at_least`, or without a reference that stands still."""
        logs = list(islice((entry for entry in reversed(history) if "errors/winner_change" in entry), STRETCH))
        if not self._reference or len(logs) < at_least:
            return None
        error, change = (
            sum(log[f"errors/{name}"] for log in logs) / len(logs) for name in ("winner", "winner_change")
        )
        measured = _relative(logs[0]["step"], error, change, self._reference, None)
        return measured if measured.before > 0 else None


def _relative(step: int, error: float, change: float, since: str, worst: tuple[int, float] | None) -> Measurement:
    """From the error and by how much it exceeds the other; if they are no numbers, the other does not count."""
    before = error - change
    return Measurement(step, error, before if math.isfinite(before) else 1.0, since, worst)


def _worst(entry: Mapping[str, Any], prefix: str) -> tuple[int, float] | None:
    start = f"{prefix}_errors/winner_change_relative@"
    levels = {int(name.removeprefix(start)): value for name, value in entry.items() if name.startswith(start)}
    return max(levels.items(), key=lambda found: found[1], default=None)


def _at(history: list[Measurement], step: int | None) -> Measurement:
    """The measurement of a step, or the last."""
    return next((measured for measured in reversed(history) if measured.step == step), history[-1])


def _is_average(name: str) -> bool:
    return name.partition("_errors/")[0].endswith(f"_{EMA_FOLDER}")


def _worded(
    measured: Measurement,
    where: str,
    trainer: DiffusionSDPOTrainer,
    history: list[Measurement],
    averages: Iterable[Measurement],
) -> Verdict:
    word = judge(measured.change, None if measured.worst is None else measured.worst[1])
    finding = (
        f"Verdict: {word}. The error on the preferred images of the {where} pairs is {_compared(measured)} "
        f"({measured.error:.4g} against {measured.before:.4g}) at step {measured.step}"
    )
    if measured.worst is not None:
        finding += (
            f"; the noise level that changed most for the worse is {measured.worst[0]}, {measured.worst[1]:+.1%}"
        )
    finding += "."
    for average in averages:
        finding += f" That of the averaged weights is {_compared(average)}."
    if where == "training":
        finding += " Without an `eval_dataset`, nothing is known of other pairs."
    advice = _advice(word, trainer)
    lowest = min(history, key=lambda found: found.change, default=None)
    if advice and lowest is not None and lowest.step not in (0, measured.step):
        advice += f" It was lowest at step {lowest.step} ({lowest.change:+.1%})."
    return Verdict(word, finding, advice)


def _compared(measured: Measurement) -> str:
    if not math.isfinite(measured.error):
        return "no number"
    side = "above" if measured.change >= 0 else "below"
    return f"{abs(measured.change):.1%} {side} that {measured.since}"


def _advice(word: str, trainer: DiffusionSDPOTrainer) -> str:
    if word not in ("worse", "ruined"):
        return ""
    ways = ["a lower or decaying `learning_rate`"]
    if trainer.loss_spec.uses_loser:
        safeguarded = trainer.args.safeguard != "none"
        ways += ["a larger `safeguard_mu`" if safeguarded else "a `safeguard`", "a `winner_budget`"]
    begin = (
        "Do not use these weights; train again" if word == "ruined" else "Look at images before you use them, or train"
    )
    return f"{begin} with {' or '.join(ways)}."
