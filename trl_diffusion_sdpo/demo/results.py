"""Results of the demo: scores, curves and generated images."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .image_measures import ImageMeasures
from .methods import Method


@dataclass(frozen=True)
class Score:
    """The oracle's mean score of a set of images."""

    mean: float  # in [0, 1]
    stderr: float  # standard error of that mean over the images

    @classmethod
    def of(cls, scores: np.ndarray) -> "Score":
        """Return the mean of scores of shape `(N,)`. The standard error of a single score is 0."""
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
        return cls(mean=float(scores.mean()), stderr=spread / len(scores) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True)
class Generated:
    """Generated images, `(36 * n, 32, 32, 3)`, uint8: n images of each of the 36 reported prompts, prompt by prompt."""

    guidance_scale: float  # of classifier-free guidance; 1 is none
    images: np.ndarray
    scores: np.ndarray  # (36 * n,)
    measures: ImageMeasures | None  # `None` with one image of a prompt

    @property
    def score(self) -> Score:
        """The oracle's score."""
        return Score.of(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but images and scores, for JSON."""
        measures = None if self.measures is None else asdict(self.measures)
        return {"guidance_scale": self.guidance_scale, "oracle": asdict(self.score), "measures": measures}


@dataclass(frozen=True)
class Guided:
    """A model's images without classifier-free guidance and at its best scale, from equal latents."""

    plain: Generated
    best: Generated
    chosen_from: dict[float, float]  # score on the other prompts by scale; `best` has the highest one's
    seconds: float  # of generating

    def to_dict(self) -> dict[str, Any]:
        """Return everything but images and scores, for JSON."""
        chosen_from = [list(item) for item in self.chosen_from.items()]
        parts = {"plain": self.plain.to_dict(), "best": self.best.to_dict()}
        return {**parts, "chosen_from": chosen_from, "seconds": self.seconds}


@dataclass(frozen=True)
class Curves:
    """A method over its training steps. The first four lists have equal lengths, and so have the last two.

    The changes are errors on the chosen and rejected images of the held-out pairs, minus those before training, under
    the same noise and timesteps.
    """

    steps: list[int]  # optimizer steps of the evaluations, from 0
    winner_change: list[float]
    loser_change: list[float]
    oracle: list[Score]  # over one image of each prompt; after the last step, over all images
    scale_steps: list[int]  # optimizer steps at which lambda was logged
    scale: list[float]  # mean lambda since the previous log; empty without a safeguard

    @classmethod
    def of(cls, history: list[dict[str, Any]]) -> "Curves":
        """Return the curves of a training from the trainer's log history.

        The changes are differences to the first evaluation, because losses without a reference log no changes. Both
        are equal: all methods start from the base model, and all evaluations have the same noise.
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
    """One trained method."""

    method: Method
    seconds: float  # of training and evaluations
    curves: Curves
    samples: np.ndarray  # images after training, prompt by prompt: (72 * n, 32, 32, 3), uint8
    scores: np.ndarray  # of these images, (72 * n,)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but images and scores, for JSON."""
        return {**asdict(self.method), "seconds": self.seconds, "curves": asdict(self.curves)}


@dataclass(frozen=True)
class DemoResult:
    """All results of the demo."""

    folder: Path  # of the plots, the table and the numbers
    settings: dict[str, Any]  # seed, kind of pairs, steps, and the settings of all methods
    train_pairs: int  # number of pairs
    eval_pairs: int
    base: Score  # of the model that every method starts from
    methods: list[MethodResult]  # in the order of training
    guided: dict[str, Guided]  # of the base, of each method by its key, and of the recipe with preference guidance
    seconds: float
    summary: str = ""
    files: tuple[Path, ...] = ()  # written to `folder`

    def to_dict(self) -> dict[str, Any]:
        """Return all measurements, for JSON."""
        return {
            "settings": self.settings,
            "train_pairs": self.train_pairs,
            "eval_pairs": self.eval_pairs,
            "seconds": self.seconds,
            "base": {"oracle": self.base.mean, "oracle_stderr": self.base.stderr},
            "methods": [result.to_dict() for result in self.methods],
            "guided": {key: guided.to_dict() for key, guided in self.guided.items()},
        }
