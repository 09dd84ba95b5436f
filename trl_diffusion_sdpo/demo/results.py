"""Results of the demo: the curves and generated images of each method, in memory and in files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .image_measures import ImageMeasures
from .pipeline import reported_captions
from .world import IMAGE_SIZE, captions

RESULT_FILE = "result.json"  # written last: marks a finished method
SAMPLES_FILE = "samples.png"
GENERATED_FILE = "generated.json"  # written last: marks finished images of a model


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
class Generated:
    """Images of the reported prompts, prompt by prompt: `(36 * n, 32, 32, 3)`, uint8."""

    guidance_scale: float  # of classifier-free guidance; 1 is none
    images: np.ndarray
    scores: np.ndarray  # (36 * n,)
    measures: ImageMeasures | None  # none with one image of a prompt

    @property
    def score(self) -> Score:
        """The oracle's score."""
        return Score.of(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Everything but images and scores, for JSON."""
        measures = None if self.measures is None else asdict(self.measures)
        return {"guidance_scale": self.guidance_scale, "oracle": asdict(self.score), "measures": measures}


@dataclass(frozen=True)
class Guided:
    """A model's images without classifier-free guidance and at its best scale, from equal latents."""

    plain: Generated
    best: Generated
    chosen_from: dict[float, float]  # scores on the other prompts by scale; `best` has the highest one's
    seconds: float  # of generating

    def to_dict(self) -> dict[str, Any]:
        """Everything but images and scores, for JSON."""
        parts = {"plain": self.plain.to_dict(), "best": self.best.to_dict()}
        return {**parts, "chosen_from": [list(item) for item in self.chosen_from.items()], "seconds": self.seconds}

    def write(self, folder: Path) -> None:
        """Write the images as two sheets, then everything else as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = self.to_dict()
        for name, part in (("plain", self.plain), ("best", self.best)):
            write_sheet(part.images, folder / f"{name}.png", sum(reported_captions()))
            facts[name] |= {"scores": part.scores.tolist()}
        _write_json(facts, folder / GENERATED_FILE)

    @classmethod
    def read(cls, folder: Path) -> "Guided":
        """Read the files of `write`."""
        facts = json.loads((folder / GENERATED_FILE).read_text(encoding="utf-8"))
        parts = {}
        for name in ("plain", "best"):
            part = facts[name]
            measures = part["measures"] and ImageMeasures(**part["measures"])
            images = read_sheet(folder / f"{name}.png")
            parts[name] = Generated(part["guidance_scale"], images, np.array(part["scores"]), measures)
        return cls(**parts, chosen_from=dict(facts["chosen_from"]), seconds=facts["seconds"])


@dataclass(frozen=True)
class Curves:
    """A method over its training steps. The first four lists have equal lengths, and so have the last two.

    The changes are errors on the chosen and rejected images of the held-out pairs, minus those before training, under
    the same noise and timesteps.
    """

    steps: list[int]  # optimizer steps of the evaluations, from 0
    winner_change: list[float]
    loser_change: list[float]
    oracle: list[Score]  # of images from equal latents: of one for each prompt, and in the end of all
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

    def to_dict(self) -> dict[str, Any]:
        """Everything but images and scores, for JSON."""
        facts = {name: getattr(self, name) for name in ("key", "label", "gentle", "settings", "seconds")}
        return {**facts, "curves": asdict(self.curves)}

    def write(self, folder: Path) -> None:
        """Write the images as one sheet with a row for each prompt, then everything else as JSON."""
        write_sheet(self.samples, folder / SAMPLES_FILE, len(captions()))
        _write_json({**self.to_dict(), "scores": self.scores.tolist()}, folder / RESULT_FILE)

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
    guided: dict[str, Guided]  # of the base, of each method by its key, and of the recipe with preference guidance
    seconds: float  # of this call, without methods trained before
    summary: str = ""  # the results in a few lines
    files: tuple[Path, ...] = ()  # written to `folder`


def write_sheet(samples: np.ndarray, path: Path, prompts: int) -> None:
    """Write images `(prompts * n, 32, 32, 3)` as one PNG, a row for each prompt."""
    grid = samples.reshape(prompts, -1, *samples.shape[1:]).swapaxes(1, 2)  # (72, n, H, W, 3) -> (72, H, n, W, 3)
    Image.fromarray(grid.reshape(prompts * IMAGE_SIZE, -1, 3)).save(path)


def read_sheet(path: Path) -> np.ndarray:
    """Read a file of `write_sheet`."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    grid = pixels.reshape(len(pixels) // IMAGE_SIZE, IMAGE_SIZE, -1, IMAGE_SIZE, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3))


def _write_json(facts: dict[str, Any], file: Path) -> None:
    """Write a file that is whole or missing."""
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)
