"""Hold the results of the demo: scores, curves and generated images."""

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .methods import Method


@dataclass(frozen=True)
class Score:
    """The oracle's mean score of a set of images."""

    mean: float  # in [0, 1]
    stderr: float  # standard error of the mean over the images

    @classmethod
    def of(cls, scores: np.ndarray) -> "Score":
        """Return the mean and the standard error of scores `(N,)`. The standard error of a single score is 0."""
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
        return cls(mean=float(scores.mean()), stderr=spread / len(scores) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True)
class Generated:
    """Generated images of the 36 prompts that the demo reports: `images` has the shape `(36 * n, 32, 32, 3)`, uint8,
    with n consecutive images of each prompt."""

    guidance_scale: float  # scale of classifier-free guidance; 1 is no guidance
    images: np.ndarray
    scores: np.ndarray  # (36 * n,)

    @property
    def score(self) -> Score:
        """The oracle's mean score of these images."""
        return Score.of(self.scores)


@dataclass(frozen=True)
class Guided:
    """A model's images without classifier-free guidance and, from the same latents, at the best guidance scale."""

    plain: Generated
    best: Generated
    chosen_from: dict[float, float]  # guidance scale -> mean oracle score on the other 36 prompts
    seconds: float  # time to generate and score the images


@dataclass(frozen=True)
class Curves:
    """Curves of one method: the first four lists from its evaluations, the last two from its training logs.

    A change is the error on the chosen or rejected images of held-out pairs, minus the same error before training.
    Noise and timesteps are the same.
    """

    steps: list[int]  # optimizer steps at which evaluations ran, from 0
    winner_change: list[float]
    loser_change: list[float]
    oracle: list[Score]  # oracle scores of one image per prompt; in the last evaluation, of all images
    scale_steps: list[int]  # optimizer steps at which lambda was logged
    scale: list[float]  # mean of the safeguard's lambda since the previous log; empty without safeguard

    @classmethod
    def of(cls, history: list[dict[str, Any]]) -> "Curves":
        """Return the curves of a method from the trainer's log history.

        The changes are computed here and not read from the logs, because losses without a reference model log no
        changes. The first evaluation is of the base model.
        """
        evaluated = {entry["step"]: entry for entry in history if "eval_errors/winner" in entry}
        scored = {entry["step"]: entry for entry in history if "oracle" in entry}
        logged = {entry["step"]: entry["safeguard/scale"] for entry in history if "safeguard/scale" in entry}
        first = next(iter(evaluated.values()))
        return cls(
            steps=list(evaluated),
            winner_change=[e["eval_errors/winner"] - first["eval_errors/winner"] for e in evaluated.values()],
            loser_change=[e["eval_errors/loser"] - first["eval_errors/loser"] for e in evaluated.values()],
            oracle=[Score(scored[step]["oracle"], scored[step]["oracle_stderr"]) for step in evaluated],
            scale_steps=list(logged),
            scale=list(logged.values()),
        )


@dataclass(frozen=True)
class MethodResult:
    """The results of training with one method."""

    method: Method
    seconds: float  # duration of training and evaluations
    curves: Curves
    samples: np.ndarray  # (72 * n, 32, 32, 3), uint8: n consecutive images per prompt
    scores: np.ndarray  # scores of these images, (72 * n,)


@dataclass(frozen=True)
class DemoResult:
    """All results of the demo."""

    folder: Path  # folder of the plots, the table and the numbers
    settings: dict[str, Any]  # seed, steps, and the settings of all methods
    train_pairs: int  # number of training pairs
    eval_pairs: int  # number of held-out pairs
    base: Score  # score of the base model, from which every method starts
    methods: list[MethodResult]  # in the order in which they were trained
    guided: dict[str, Guided]  # key of the base model or a method -> its images
    seconds: float
    summary: str = ""
    files: tuple[Path, ...] = ()  # files that were written to `folder`


def numbers(value: Any) -> Any:
    """Return the results as dictionaries and lists for JSON, without images and the scores of single images."""
    if isinstance(value, Generated):
        return {"guidance_scale": value.guidance_scale, "oracle": numbers(value.score)}
    if is_dataclass(value):
        entries = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: numbers(entry) for name, entry in entries.items() if not isinstance(entry, np.ndarray)}
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
