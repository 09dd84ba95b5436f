"""Score the images of an evaluation: each is decoded once for all scorers, and scores are saved as they come."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ...utils.files import write_atomically
from ...utils.processes import Peers
from ..rewards import Scorer
from ..rewards.scorer import fitting, on_device, saved_scores
from ..rewards.vlm_server import VLMServerJudge
from .images import SCORES_FOLDER, ImageSettings, diversity, image_path, is_black, saturation
from .prompts import PromptList

_SCORED_AT_ONCE = 64  # images that a process scores before it saves their scores


def score_images(
    scorers: Sequence[Scorer],
    folder: Path,
    models: Sequence[str],
    prompts: PromptList,
    settings: ImageSettings,
    peers: Peers,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, float]]]:
    """Return the scores of each scorer and model, `(prompts, seeds)` with NaN for images without one, and each model's
    looks. Scores saved in the folder are not computed again.

    Each image is decoded once for all scorers that fit onto the device together. A process holds some of one model's
    images, and as many of the base model's for a judge.
    """
    base = models[0]
    held = base if any(isinstance(scorer, VLMServerJudge) for scorer in scorers) else None
    shape = (len(prompts.prompts), len(settings.seeds))
    rows = [(index, seed) for index in range(shape[0]) for seed in settings.seeds]
    looks = {name: _Looks(shape[1]) for name in models}
    scores: dict[str, dict[str, np.ndarray]] = {
        scorer.name: {base: np.zeros(shape)} if isinstance(scorer, VLMServerJudge) else {} for scorer in scorers
    }
    for number, group in enumerate(peers.first(lambda: fitting(scorers, settings.device))):
        saved: dict[str, list[_SavedScores]] = {name: [] for name in models}
        for scorer, name in itertools.product([scorers[i] for i in group], models):
            shown = (name, base) if isinstance(scorer, VLMServerJudge) else (name,)
            if shown != (base, base):
                saved[name].append(_SavedScores(scorer, folder, shown, peers))
        with contextlib.ExitStack() as stack:
            for i in group:
                stack.enter_context(on_device(scorers[i], settings.device))
            bar = stack.enter_context(tqdm(total=len(rows) * len(models), desc="Scoring images", unit="image"))
            for chunk in _chunks(rows, peers):
                images = _Images(folder, chunk.share, held)
                for name in models:
                    if number == 0:
                        looks[name].add(chunk.gathered(partial(images.small, name)))
                    for each in saved[name]:
                        each.add(chunk, partial(images.of, each.models), prompts)
                    bar.update(len(chunk.rows))
        for each in itertools.chain(*saved.values()):
            scores[each.scorer.name][each.models[0]] = each.array().reshape(shape)
    return scores, {name: each.summary() for name, each in looks.items()}


def score_rows(
    scorer: Scorer,
    folder: Path,
    models: Sequence[str],
    rows: Sequence[tuple[int, tuple[int, ...]]],
    prompts: PromptList,
    peers: Peers,
) -> np.ndarray:
    """Return the scores of images, or a judge's verdicts on pairs of images. What the same scorer has saved in the
    folder is not computed again. Call it in all processes.

    Args:
        models (`Sequence[str]`): Names of the models whose images are scored: one for a scorer, two for a judge.
        rows (`Sequence[tuple[int, tuple[int, ...]]]`): Index of a prompt and the seed of each model's image, for each
            row.

    Returns:
        `np.ndarray`: One score or verdict per row; NaN for rows without one.
    """
    saved = _SavedScores(scorer, folder, models, peers)

    def read(share: Sequence[tuple[int, tuple[int, ...]]]) -> list[list[Image.Image | None]]:
        return [
            [_read(image_path(folder, name, index, seeds[position])) for index, seeds in share]
            for position, name in enumerate(models)
        ]

    for chunk in tqdm([*_chunks(rows, peers)], desc=f"{scorer.name} of {models[0]}", unit="batch"):
        saved.add(chunk, partial(read, chunk.share), prompts)
    return saved.array()


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows, of which each process has a share. The first value of a row is the index of its prompt."""

    start: int
    rows: Sequence[tuple[int, Any]]
    peers: Peers

    @property
    def share(self) -> Sequence[tuple[int, Any]]:
        return self.rows[self.peers.index :: self.peers.count]

    def gathered(self, work: Callable[[], Sequence[Any]]) -> list[Any]:
        """Return a result for each row, from a function that returns those of this process's share."""
        results: list[Any] = [None] * len(self.rows)
        for index, shared in enumerate(self.peers.gather_results(work)):
            results[index :: self.peers.count] = shared
        return results


def _chunks(rows: Sequence[tuple[int, Any]], peers: Peers) -> Iterator[_Chunk]:
    at_once = _SCORED_AT_ONCE * peers.count
    for start in range(0, len(rows), at_once):
        yield _Chunk(start, rows[start : start + at_once], peers)


class _Images:
    """Images of some prompts and seeds, decoded when they are first needed. A black image is `None`. Held are those of
    the latest model, and of the model `held`."""

    def __init__(self, folder: Path, rows: Sequence[tuple[int, int]], held: str | None):
        self._folder = folder
        self._rows = rows
        self._held = held
        self._decoded: dict[str, list[Image.Image | None]] = {}

    def of(self, models: Sequence[str]) -> list[list[Image.Image | None]]:
        """Return the images of each model."""
        for model in models:
            if model not in self._decoded:
                kept = {name: images for name, images in self._decoded.items() if name in (self._held, *models)}
                self._decoded = kept
                self._decoded[model] = [_read(image_path(self._folder, model, *row)) for row in self._rows]
        return [self._decoded[model] for model in models]

    def small(self, model: str) -> list[np.ndarray | None]:
        """Return copies of a model's images with 64 x 64 pixels."""
        (images,) = self.of([model])
        return [None if image is None else np.asarray(image.resize((64, 64))) for image in images]


class _SavedScores:
    """The scores of one model's images by a scorer, or a judge's verdicts on the images of two models, in the order of
    the rows, and the file that has them."""

    def __init__(self, scorer: Scorer, folder: Path, models: Sequence[str], peers: Peers):
        self.scorer = scorer
        self.models = models
        self._peers = peers
        self._path = peers.first(lambda: saved_scores(folder / SCORES_FOLDER, scorer) / f"{'+'.join(models)}.json")
        self._scores: list[float | None] = peers.first(
            lambda: json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else []
        )

    def add(
        self, chunk: _Chunk, read: Callable[[], Sequence[Sequence[Image.Image | None]]], prompts: PromptList
    ) -> None:
        """Score the rows of a chunk that have no scores yet, and save them: an interrupted evaluation continues from
        the file. `read` returns the images of this process's share, for each model."""
        known = len(self._scores) - chunk.start
        if known >= len(chunk.rows):
            return

        def score() -> list[float | None]:
            """Return a score for each row of this process's share, `None` for rows with a black image."""
            scored: list[float | None] = [None] * len(chunk.share)
            visible: dict[int, list[Image.Image]] = {}
            for position, images in enumerate(zip(*read(), strict=True)):
                # Copies, because other scorers get these images too, and a user's function may change them.
                copies = [image.copy() for image in images if image is not None]
                if len(copies) == len(images) and self._peers.index + position * self._peers.count >= known:
                    visible[position] = copies
            if visible:
                texts = [prompts.prompts[chunk.share[position][0]] for position in visible]
                ours, *others = map(list, zip(*visible.values(), strict=True))
                if isinstance(self.scorer, VLMServerJudge):
                    values = self.scorer.compare(ours, others[0], texts)
                else:
                    values = self.scorer(ours, texts)
                for position, value in zip(visible, values.tolist(), strict=True):
                    scored[position] = value if math.isfinite(value) else None
            return scored

        self._scores += chunk.gathered(score)[known:]
        self._peers.first(partial(write_json, self._path, self._scores))

    def array(self) -> np.ndarray:
        return np.array([math.nan if value is None else value for value in self._scores], dtype=np.float64)


class _Looks:
    """Saturation, diversity and number of black images of one model, from small copies of its images in the order of
    prompts and seeds. The copy of a black image is `None`."""

    def __init__(self, seeds: int):
        self._seeds = seeds
        self._waiting: list[np.ndarray | None] = []  # images of a prompt whose last ones are still to come
        self._measured: list[tuple[float, float, int]] = []  # of each prompt

    def add(self, images: Sequence[np.ndarray | None]) -> None:
        self._waiting += images
        while len(self._waiting) >= self._seeds:
            seen = np.array([image for image in self._waiting[: self._seeds] if image is not None])
            del self._waiting[: self._seeds]
            mean = saturation(seen) if len(seen) else math.nan
            self._measured.append((mean, diversity(seen), self._seeds - len(seen)))

    def summary(self) -> dict[str, float]:
        return {
            "saturation": _mean([row[0] for row in self._measured]),
            "diversity": _mean([row[1] for row in self._measured]),
            "black": sum(row[2] for row in self._measured),
        }


def _mean(values: Sequence[float]) -> float:
    present = [value for value in values if math.isfinite(value)]
    return float(np.mean(present)) if present else math.nan


def write_json(path: Path, content: Any) -> None:
    """Write JSON into a file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def _read(path: Path) -> Image.Image | None:
    """Decode an image. Return `None` if it is black."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    return None if is_black(image) else image
