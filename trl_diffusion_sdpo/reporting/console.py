"""Console output of training: one line with the main metrics for each log, and the same metrics on the progress bar."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from .history import evaluation_prefixes

# Name of a metric -> its short name on the console
WORDS = {
    "loss": "loss",
    "errors/winner": "winner",
    "errors/loser": "loser",
    "rewards/accuracies": "accuracy",
    "safeguard/scale": "lambda",
    "learning_rate": "lr",
}
# Metrics that are not printed: the trainer's others, the speed of an evaluation, and what the progress bar shows.
_HIDDEN = re.compile(
    r"(.*_)?(errors|rewards|safeguard|budget)/.*|eval_(samples/.*|.*(runtime|per_second))"
    r"|grad_norm|epoch|total_flos|num_input_tokens_seen"
)


class ShortLogCallback(ProgressCallback):
    """Prints one line with the main metrics for each log, and shows the training metrics on the progress bar.

    It replaces transformers' `ProgressCallback`, which prints every metric. The trainer's state and the trackers still
    get all.
    """

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        for title, metrics in shown_metrics(logs):
            words = [f"step {state.global_step}", *title, *(f"{word} {value}" for word, value in metrics.items())]
            self.training_bar.write("  ".join(words))
            if "loss" in logs:
                self.training_bar.set_postfix(metrics)


def say(line: str) -> None:
    """Print a line to the standard output without breaking a progress bar."""
    tqdm.write(line)


def shown_metrics(logs: Mapping[str, Any]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield a title (a list of words) and the metrics to print: once for a training log, which has no title, and once
    for each evaluation in an evaluation log.

    The metrics are texts, under the short names in `WORDS`. An error is followed by its change in per cent of the
    reference's error. Metrics that match `_HIDDEN` are left out. All other metrics, such as those of `compute_metrics`,
    are printed under their own names.
    """
    starts = [f"{prefix}_" for prefix in evaluation_prefixes(logs)] or [""]
    own_names = {f"{start}{name}" for start in starts for name in WORDS}
    others = {
        name: _short(value) for name, value in logs.items() if name not in own_names and not _HIDDEN.fullmatch(name)
    }
    for start in starts:
        names = {f"{start}{name}": word for name, word in WORDS.items()}
        shown = {word: _short(logs[name]) + _change(logs, name) for name, word in names.items() if name in logs}
        evaluation_set = start.removeprefix("eval_").removesuffix("_")
        yield [f"evaluation {evaluation_set}".strip()] if start else [], shown | others
        others = {}


def _change(logs: Mapping[str, Any], name: str) -> str:
    change = logs.get(f"{name}_change")
    before = None if change is None else logs[name] - change
    return f" ({change / before:+.2%})" if before else ""


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
