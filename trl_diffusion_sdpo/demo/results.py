"""Results of the demo: the curves and generated images of each method, in memory and in files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .world import IMAGE_SIZE, captions

RESULT_FILE = "result.json"  # written last: marks a finished method
SAMPLES_FILE = "samples.png"


@dataclass(frozen=True)
class Score:
    """The oracle's score of a set of images."""

    mean: float  # in [0, 1]
    stderr: float  # standard error of that mean over the images

    @classmethod
    def of(cls, scores: np.ndarray) -> "Score":
        """From scores of shape `(N,)`; the standard error of a single one is given as 0."""
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
        return cls(mean=float(scores.mean()), stderr=spread / len(scores) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True)
class Curves:
    """A method over its training steps. The first four lists have equal lengths, and so have the last two.

    The changes are errors on the chosen and rejected images of the held-out pairs, minus those before training, under
    the same noise and timesteps.
    """

    steps: list[int]  # optimizer steps of the evaluations, from 0
    winner_change: list[float]
    loser_change: list[float]
    oracle: list[Score]  # of images from equal latents
    scale_steps: list[int]  # optimizer steps at which the scale was logged
    scale: list[float]  # mean lambda of the safeguard since the previous log; empty without a safeguard


@dataclass(frozen=True)
class MethodResult:
    """One trained `Method`."""

    key: str
    label: str
    gentle: bool
    settings: dict[str, Any]
    seconds: float  # of training and evaluations
    curves: Curves
    samples: np.ndarray  # images after training, prompt by prompt: (72 * n, 32, 32, 3), uint8
    scores: np.ndarray  # of these images, (72 * n,)

    @property
    def oracle(self) -> Score:
        """The score after training."""
        return self.curves.oracle[-1]

    @property
    def best(self) -> tuple[int, Score]:
        """The evaluated step with the highest score, and that score."""
        curves = self.curves
        return max(zip(curves.steps, curves.oracle, strict=True), key=lambda point: point[1].mean)

    def to_dict(self) -> dict[str, Any]:
        """Everything but images and scores, for JSON."""
        facts = {name: getattr(self, name) for name in ("key", "label", "gentle", "settings", "seconds")}
        return {**facts, "curves": asdict(self.curves)}

    def write(self, folder: Path) -> None:
        """Write the images as one sheet with a row for each prompt, then everything else as JSON."""
        write_sheet(self.samples, folder / SAMPLES_FILE)
        facts = {**self.to_dict(), "scores": self.scores.tolist()}
        unfinished = folder / f"{RESULT_FILE}.tmp"
        unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(folder / RESULT_FILE)

    @classmethod
    def read(cls, folder: Path) -> "MethodResult":
        """Read the files of `write`."""
        facts = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        curves, scores = facts.pop("curves"), np.array(facts.pop("scores"))
        curves["oracle"] = [Score(**score) for score in curves["oracle"]]
        return cls(**facts, curves=Curves(**curves), scores=scores, samples=read_sheet(folder / SAMPLES_FILE))


@dataclass(frozen=True)
class DemoResult:
    """All results of the demo."""

    folder: Path  # of the plots, the table and the numbers
    settings: dict[str, Any]  # seed, kind of pairs, steps, and the settings of all methods
    train_pairs: int  # number of pairs
    eval_pairs: int
    base: Score  # of the model that every method starts from
    base_samples: np.ndarray
    base_scores: np.ndarray
    methods: list[MethodResult]  # in the order of training
    seconds: float  # of this call, without methods trained before
    summary: str = ""  # the results in a few lines
    files: tuple[Path, ...] = ()  # written to `folder`


def write_sheet(samples: np.ndarray, path: Path) -> None:
    """Write images `(72 * n, 32, 32, 3)` as one PNG, a row for each of the 72 prompts."""
    rows = len(captions())
    grid = samples.reshape(rows, -1, *samples.shape[1:]).swapaxes(1, 2)  # (72, n, H, W, 3) -> (72, H, n, W, 3)
    Image.fromarray(grid.reshape(rows * IMAGE_SIZE, -1, 3)).save(path)


def read_sheet(path: Path) -> np.ndarray:
    """Read a file of `write_sheet`."""
    rows = len(captions())
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    grid = pixels.reshape(rows, IMAGE_SIZE, -1, IMAGE_SIZE, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3))
