"""The images of a sweep over scales: files that a later sweep finds again, their scores, and grids of them."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..losses import standard_error
from ..utils.files import write_atomically
from .recommended_scale import FEWEST_IMAGES

IMAGES_FOLDER, INDEX_FILE = "images", "images.json"
FORMS = ("weights", "prediction")  # scaled in the weights; by guidance in the prediction
PROMPTS = FEWEST_IMAGES  # if none are named
NOT_GUIDED = (0.0, 1.0)  # scales at which both forms are the base and the tuned model
_NOTE = "scale_sweep"  # key of PNG text
_PIXELS = 224  # side of an image in a grid, at most

Scorer = Callable[[list[Image.Image], list[str]], Iterable[Any]]


@dataclass(frozen=True)
class Cell:
    """One image of a sweep."""

    form: str
    scale: float
    index: int  # of the prompt

    @property
    def name(self) -> str:
        return f"{self.form}-{self.scale:.12g}-{self.index:02d}.png"


class ScaleImages:
    """Images of a sweep, one for each form, scale and prompt, of equal noise for each prompt.

    Every file says in its PNG text how it was made, so that a later sweep knows which images it need not generate.

    Args:
        folder (`Path`): Of the sweep.
        settings (`Mapping[str, Any]`): Everything that the images depend on, besides form, scale, prompt and seed.
        prompts (`Sequence[str]`): One or more.
        seed (`int`): The noise of prompt `i` is that of `seed + i`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], prompts: Sequence[str], seed: int):
        self._folder, self.prompts, self._seed = folder, list(prompts), seed
        self._settings = json.loads(json.dumps({**settings, "prompts": self.prompts, "seed": seed}))
        self._scales, self._scores = self._read_index()

    @property
    def folder(self) -> Path:
        """Where the images are."""
        return self._folder / IMAGES_FOLDER

    def add_scales(self, scales: Iterable[float]) -> list[float]:
        """All scales: those that are given, and those of an earlier sweep with the same settings."""
        self._scales = sorted({*self._scales, *scales})
        return self._scales

    def cell(self, form: str, scale: float, index: int) -> Cell:
        """The image of a form at a scale; guidance by 0 and 1 has those of the weights."""
        return Cell("weights" if scale in NOT_GUIDED else form, scale, index)

    def missing(self) -> dict[tuple[str, float], list[int]]:
        """The numbers of the prompts without an image, by form and scale."""
        found: dict[tuple[str, float], list[int]] = {}
        for cell in dict.fromkeys(self._cells()):
            if not self._is_there(cell):
                found.setdefault((cell.form, cell.scale), []).append(cell.index)
        return found

    def save(self, cell: Cell, image: Image.Image) -> None:
        """Write an image, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note = PngInfo()
        note.add_itxt("prompt", self.prompts[cell.index])
        note.add_itxt("seed", str(self._seed + cell.index))
        note.add_itxt(_NOTE, self._note(cell))
        write_atomically(self.folder / cell.name, lambda file: image.save(file, "PNG", pnginfo=note))

    def open(self, cell: Cell) -> Image.Image:
        with Image.open(self.folder / cell.name) as image:
            return image.convert("RGB")

    def score(self, name: str, scorer: Scorer, on_image: Callable[[int], Any]) -> None:
        """Score the images that have no score by this name; `on_image` receives how many there are now.

        Raises:
            `ValueError`: If the scorer gives another number of values than images, or one that is not a finite number.
        """
        scores = self._scores.setdefault(name, {})
        cells = [cell for cell in dict.fromkeys(self._cells()) if cell.name not in scores]
        groups: dict[tuple[str, float], list[Cell]] = {}
        for cell in cells:
            groups.setdefault((cell.form, cell.scale), []).append(cell)
        for group in groups.values():
            prompts = [self.prompts[cell.index] for cell in group]
            values = checked_scores(name, scorer([self.open(cell) for cell in group], prompts), prompts)
            scores |= {cell.name: value for cell, value in zip(group, values, strict=True)}
            self.write_index()
            on_image(len(group))

    def scores(self, name: str | None) -> dict[str, dict[float, list[float]]]:
        """Scores by form and scale, in the order of the prompts, of the scales whose images all have one; empty without
        a scorer."""
        known = self._scores.get(name, {}) if name is not None else {}
        found: dict[str, dict[float, list[float]]] = {}
        for form, scale in itertools.product(FORMS, self._scales):
            names = [cell.name for cell in self.row(form, scale)]
            if known.keys() >= set(names):
                found.setdefault(form, {})[scale] = [known[name] for name in names]
        return found

    @property
    def only_scorer(self) -> str | None:
        """The name of the one scorer whose scores are kept; `None` of none or several."""
        return next(iter(self._scores)) if len(self._scores) == 1 else None

    def row(self, form: str, scale: float) -> list[Cell]:
        """The images of a form at a scale."""
        return [self.cell(form, scale, index) for index in range(len(self.prompts))]

    def write_index(self) -> None:
        """Write what the images were made with, and their scores, atomically."""
        names = [cell.name for cell in dict.fromkeys(self._cells())]
        scores = {name: {file: known[file] for file in names if file in known} for name, known in self._scores.items()}
        content = {"settings": self._settings, "scales": self._scales, "images": names, "scores": scores}
        write_atomically(self._folder / INDEX_FILE, json.dumps(content, indent=2).encode() + b"\n")

    def _cells(self) -> Iterable[Cell]:
        return (cell for form in FORMS for scale in self._scales for cell in self.row(form, scale))

    def _note(self, cell: Cell) -> str:
        made = {name: value for name, value in self._settings.items() if name not in ("prompts", "seed")}
        made |= {"form": cell.form, "scale": cell.scale}
        made |= {"prompt": self.prompts[cell.index], "seed": self._seed + cell.index}
        return json.dumps(made, sort_keys=True)

    def _is_there(self, cell: Cell) -> bool:
        try:
            with Image.open(self.folder / cell.name) as image:
                return image.info.get(_NOTE) == self._note(cell)
        except OSError:
            return False

    def _read_index(self) -> tuple[list[float], dict[str, dict[str, float]]]:
        """Scales and scores of an earlier sweep with the same settings; none of another one."""
        try:
            stored = json.loads((self._folder / INDEX_FILE).read_text(encoding="utf-8"))
            if stored["settings"] == self._settings:
                return [float(scale) for scale in stored["scales"]], dict(stored["scores"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return [], {}


def checked_scores(name: str, values: Iterable[Any], prompts: Sequence[str]) -> list[float]:
    """A scorer's values as floats; `ValueError` where they are not one finite number for each prompt."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The scorer {name} must return a list of numbers, one for each image, got a {type(values).__name__} that "
            f"is none: {error}."
        ) from error
    if len(found) != len(prompts):
        raise ValueError(
            f"The scorer {name} must return one number for each of {len(prompts)} images, got {len(found)}."
        )
    for value, prompt in zip(found, prompts, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"The scorer {name} must return finite numbers, got {value} for the prompt {prompt!r}.")
    return found


def draw_grid(
    images: ScaleImages,
    form: str,
    scales: Sequence[float],
    file: Path,
    *,
    heads: Mapping[float, str],
    scores: Mapping[float, Sequence[float]],
) -> None:
    """Draw the images of a form, a row for each prompt and a column for each scale, with scores below.

    Args:
        heads (`Mapping[float, str]`): Lines below the scale at the top of a column.
        scores (`Mapping[float, Sequence[float]]`): Of the images, by scale; may be empty.
    """
    from matplotlib.figure import Figure  # seconds to import, and an extra

    rows, columns = len(images.prompts), len(scales)
    figure = Figure(figsize=(1.6 + 1.6 * columns, 0.9 + 1.85 * rows), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False)
    for column, scale in enumerate(scales):
        mean = [] if scale not in scores else [_mean(scores[scale])]
        title = "\n".join([_scale_name(scale), *([heads[scale]] if scale in heads else []), *mean])
        panels[0, column].set_title(title, fontsize=8)
        for cell, axes in zip(images.row(form, scale), panels[:, column], strict=True):
            shown = images.open(cell)
            shown.thumbnail((_PIXELS, _PIXELS))
            axes.imshow(shown)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if scale in scores:
                axes.set_xlabel(f"{scores[scale][cell.index]:.4g}", fontsize=8)
    for prompt, axes in zip(images.prompts, panels[:, 0], strict=True):
        text = "\n".join(textwrap.wrap(textwrap.shorten(prompt, 90, placeholder="…"), 18))
        axes.set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center", parse_math=False)
    what = "scaled in the weights" if form == "weights" else "by preference guidance in the prediction"
    figure.suptitle(f"Equal noise in each row, {what}", fontsize=10, x=0.01, ha="left")
    figure.savefig(file, dpi=140)


def _scale_name(scale: float) -> str:
    return {0.0: "base", 1.0: "1 (tuned)"}.get(scale, f"{scale:g}")


def _mean(scores: Sequence[float]) -> str:
    error = f" ± {standard_error(scores):.2g}" if len(scores) > 1 else ""
    return f"score {statistics.fmean(scores):.4g}{error}"
