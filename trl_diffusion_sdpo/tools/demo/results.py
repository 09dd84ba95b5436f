"""The results of the demo. `results.json` has all of them but the images."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.statistics import LEVEL, mean_interval, standard_error
from .methods import COMPARED


@dataclass(frozen=True)
class Score:
    """Oracle's mean score of a set of images."""

    mean: float  # in [0, 1]
    stderr: float  # standard error of the mean over prompts
    guidance_scale: float = 1.0  # scale of classifier-free guidance; 1 is no guidance

    @classmethod
    def of(cls, scores: np.ndarray, guidance_scale: float = 1.0) -> "Score":
        """Return the mean of scores `(prompts, images)` of at least two prompts. Images of a prompt are not
        independent, so the standard error is that of the prompts' means."""
        means = scores.mean(axis=1)
        return cls(float(means.mean()), standard_error(means.tolist()), guidance_scale)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True)
class Difference:
    """Mean difference of two models' scores, paired over prompts, each model at its best guidance scale."""

    first: str  # key of a model
    second: str
    mean: float  # of the scores of `first` minus those of `second`
    low: float  # ends of the confidence interval
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Curves:
    """Curves of one method: the first lists from its evaluations, the last two from its training logs.

    The change of an error is in per cent of the error on the same held-out pairs before training, under the same noise
    and timesteps.
    """

    steps: list[int]  # optimizer steps at which evaluations ran, from 0
    winner_change: list[float]  # per cent
    winner_stderr: list[float]  # standard errors of `winner_change` over the pairs
    loser_change: list[float]  # per cent
    score: list[Score]  # all at the same guidance scale
    worst_bin: float  # largest of the noise bins' last changes of the winners' error, per cent
    scale_steps: list[int]  # optimizer steps at which lambda was logged
    scale: list[float]  # mean of the safeguard's lambda since the previous log; empty without losers

    @classmethod
    def of(cls, history: list[dict[str, Any]]) -> "Curves":
        """Return a method's curves from the trainer's log history, whose first evaluation is of the base model."""
        evaluated = {entry["step"]: entry for entry in history if "eval_errors/winner" in entry}
        scored = {entry["step"]: entry for entry in history if "oracle" in entry}
        logged = {entry["step"]: entry["safeguard/scale"] for entry in history if "safeguard/scale" in entry}
        entries = list(evaluated.values())
        relative = "eval_errors/winner_change_relative"
        return cls(
            steps=list(evaluated),
            winner_change=[100 * entry[relative] for entry in entries],
            winner_stderr=[100 * entry[f"{relative}_stderr"] for entry in entries],
            loser_change=[100 * (e["eval_errors/loser"] / entries[0]["eval_errors/loser"] - 1) for e in entries],
            score=[_logged_score(scored[step]) for step in evaluated],
            worst_bin=max(100 * value for name, value in entries[-1].items() if name.startswith(f"{relative}@")),
            scale_steps=list(logged),
            scale=list(logged.values()),
        )


@dataclass(frozen=True)
class ModelResult:
    """Results of one model."""

    key: str
    label: str
    best: Score  # at the model's best guidance scale
    plain: Score  # without classifier-free guidance
    chosen_from: dict[str, float]  # guidance scale -> mean score on the other 36 prompts, which chose the best
    settings: dict[str, Any]  # of the training, or of the guidance
    prompt_scores: list[float]  # mean scores of the 36 prompts, at the best scale
    curves: Curves | None = None  # `None` for models that were not trained


@dataclass(frozen=True)
class DemoResult:
    """All results of the demo but the images."""

    settings: dict[str, Any]  # seed, steps, and the settings that all methods share
    versions: dict[str, str]  # of the libraries
    threads: int  # number of CPU threads
    train_pairs: int  # number of training pairs
    eval_pairs: int  # number of held-out pairs
    models: dict[str, ModelResult]  # key -> result: the base model, then all methods, and the guided recipe last
    seconds: float

    def differences(self) -> list[Difference]:
        """Return the differences of the compared models. All intervals together hold with 95 %, by Bonferroni."""
        found = []
        for first, second in COMPARED:
            scores = (np.array(self.models[key].prompt_scores) for key in (first, second))
            values = np.subtract(*scores)
            interval = mean_interval(values, LEVEL / len(COMPARED))
            found.append(Difference(first, second, float(values.mean()), *interval))
        return found

    def write(self, path: Path) -> None:
        """Write the results as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "DemoResult":
        """Read results that [`write`] wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["models"] = {key: _model(**model) for key, model in values["models"].items()}
        return cls(**values)


def _logged_score(entry: dict[str, float]) -> Score:
    return Score(entry["oracle"], entry["oracle_stderr"], entry["oracle_guidance_scale"])


def _model(best: dict[str, Any], plain: dict[str, Any], curves: dict[str, Any] | None, **others: Any) -> ModelResult:
    if curves is not None:
        curves["score"] = [Score(**score) for score in curves["score"]]
    read = None if curves is None else Curves(**curves)
    return ModelResult(best=Score(**best), plain=Score(**plain), curves=read, **others)
