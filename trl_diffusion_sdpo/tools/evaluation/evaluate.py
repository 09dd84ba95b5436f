"""Compare models by scorers: generate images, score them, compute win rates against the first model, write a report."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ...utils.disk import naming_the_disk
from ...utils.errors import UserError
from ...utils.files import MANIFEST_FILE, json_lines, write_atomically
from ...utils.processes import Peers
from ...utils.statistics import agreement, holm, win_rate
from ..rewards import Scorer
from ..rewards.scorer import file_name, fitting, on_device, saved_scores
from ..rewards.vlm_server import VLMServerJudge
from .candidate import Candidate
from .images import (
    SCORES_FOLDER,
    ImageSettings,
    diversity,
    generate_images,
    image_path,
    is_black,
    peers_of_this_run,
    saturation,
)
from .prompts import PromptList, distinct_prompts
from .report import write_report
from .results import Comparison, Evaluation
from .scales import recommend_in_cards, sweeps_of

RESULTS_FILE = "results.json"
_SCORED_AT_ONCE = 64  # images that a process scores before it saves their scores


def evaluate_models(
    candidates: Sequence[Candidate],
    prompts: Sequence[str] | PromptList,
    scorers: Sequence[Scorer],
    output_dir: str | Path,
    settings: ImageSettings | None = None,
) -> Evaluation:
    """Generate images with all models, score them, and compare each model with the first.

    Images and scores are saved in `output_dir`: call it again with the same arguments to continue after an
    interruption. Processes that accelerate launches share the work.

    Args:
        candidates (`Sequence[Candidate]`): The models, the base model first.
        prompts (`Sequence[str]` or `PromptList`): The prompts. [`~evaluation.prompts.read_prompts`] reads them from a
            file.
        scorers (`Sequence[Scorer]`): Scorers, for example from [`load_scorer`]. Those on the CPU move to the device of
            `settings` while they score, as many at once as take half of its free memory. Without scorers, the report
            only shows images.
        output_dir (`str` or `Path`): Folder for images, scores, `results.json` and `report.html`.
        settings (`ImageSettings`, *optional*): Seeds, initial noise and arguments of the pipelines.

    Returns:
        `Evaluation`: The result, in every process.

    Raises:
        `ValueError`: If there are no models, two models or scorers share a name, the folder has images of other
            settings, or `output_dir` cannot be a folder.

    Example:

    ```python
    from trl_diffusion_sdpo import Candidate, evaluate_models, load_scorer

    evaluation = evaluate_models(
        [Candidate("base", "stable-diffusion-v1-5/stable-diffusion-v1-5"), Candidate("tuned", "path/to/run")],
        ["a red circle", "two cats on a sofa"],
        [load_scorer("pickscore"), load_scorer("hpsv2.1")],
        "evaluation",
    )
    print(evaluation.comparisons[0].verdict)
    ```
    """
    settings = settings or ImageSettings()
    if isinstance(prompts, str):
        raise UserError(
            f"`prompts` must be a list, got {prompts!r}. If this is a file, pass `read_prompts({prompts!r})`."
        )
    listed = prompts if isinstance(prompts, PromptList) else distinct_prompts(prompts)
    if not candidates:
        raise UserError("An evaluation needs one or more models, got none. Pass `candidates`.")
    _check_names("models", [candidate.name for candidate in candidates])
    _check_names("scorers", [file_name(scorer.name) for scorer in scorers])
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"`output_dir` must be a folder that can be written, got {folder}: {error.strerror}. Use another folder."
        ) from error
    with naming_the_disk(folder):
        return _evaluate(candidates, listed, scorers, folder, settings)


def _evaluate(
    candidates: Sequence[Candidate],
    listed: PromptList,
    scorers: Sequence[Scorer],
    folder: Path,
    settings: ImageSettings,
) -> Evaluation:
    peers = peers_of_this_run()
    for candidate in candidates:
        generate_images(candidate, listed.prompts, settings, folder, peers, base=candidates[0])

    # Score the images.
    models = [candidate.name for candidate in candidates]
    base, *others = models
    scores, looks = _score_images(scorers, folder, models, listed, settings, peers)
    for scorer_name, by_model in scores.items():
        for name in models:
            if not np.isfinite(by_model[name] - by_model[base]).any():
                raise UserError(
                    f"{scorer_name} cannot compare {name} with {base}: no prompt and seed has scores for the images of "
                    "both. Black images have no score. Turn off the safety checker, or look at the images."
                )

    # Compare the models.
    rates = [(name, by, win_rate(scores[by][name], scores[by][base])) for name in others for by in scores]
    adjusted = holm([rate.p_value for _, _, rate in rates])
    agreements = {
        name: {
            f"{one} and {other}": agreement(
                scores[one][name] - scores[one][base], scores[other][name] - scores[other][base]
            )
            for one, other in itertools.combinations(scores, 2)
        }
        for name in others
    }
    judges = [scorer.name for scorer in scorers if isinstance(scorer, VLMServerJudge)]
    evaluation = Evaluation(
        prompts=listed,
        seeds=settings.seeds,
        models=tuple(models),
        scores=scores,
        comparisons=tuple(Comparison(*rate, p_value) for rate, p_value in zip(rates, adjusted, strict=True)),
        agreement=agreements,
        looks=looks,
        notes=tuple(_notes(listed, scores, looks, judges)),
        sweeps=tuple(sweeps_of(candidates, scores)),
    )
    peers.first(lambda: _write(folder, evaluation, settings))
    peers.first(lambda: recommend_in_cards(evaluation.sweeps, candidates, settings.call_kwargs))
    return evaluation


def _check_names(kind: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"All {kind} of an evaluation must have different names, got {list(names)}. Rename some.")


def _score_images(
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
        self._peers.first(partial(_write_json, self._path, self._scores))

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


def _notes(
    prompts: PromptList,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    looks: dict[str, dict[str, float]],
    judges: Sequence[str],
) -> list[str]:
    base = next(iter(looks))
    notes = [
        f"{judge} compares each image with that of {base}, in both orders. Its score is 1 if it prefers the image, -1 "
        f"if it prefers that of {base}, and 0 for a tie."
        for judge in judges
    ]
    if prompts.empty or prompts.duplicates:
        notes.append(f"{prompts.empty} empty and {prompts.duplicates} repeated prompts were skipped.")
    for model, values in looks.items():
        if values["black"]:
            notes.append(
                f"{int(values['black'])} images of {model} are black, probably hidden by a safety checker. "
                "They have no scores."
            )
    for scorer, by_model in scores.items():
        for model, scored in by_model.items():
            if scorer in judges and model == base:
                continue
            present = scored[np.isfinite(scored)]
            missing = scored.size - present.size - int(looks[model]["black"])
            if missing:
                notes.append(f"{scorer} gave no score to {missing} images of {model}, which are left out.")
            if present.size > 1 and np.ptp(present) == 0:
                notes.append(f"{scorer} gave all images of {model} the same score, so its results are useless.")
    return notes


def _write(folder: Path, evaluation: Evaluation, settings: ImageSettings) -> None:
    manifest = [
        {
            "model": model,
            "prompt": prompt,
            "seed": seed,
            "noise_seed": settings.noise_seed(prompt, seed),
            "image": image_path(folder, model, index, seed).relative_to(folder).as_posix(),
        }
        for model in evaluation.models
        for index, prompt in enumerate(evaluation.prompts.prompts)
        for seed in evaluation.seeds
    ]
    write_atomically(folder / MANIFEST_FILE, json_lines(manifest))
    _write_json(
        folder / RESULTS_FILE,
        {
            "models": evaluation.models,
            "prompts": len(evaluation.prompts.prompts),
            "seeds": evaluation.seeds,
            "comparisons": [
                {
                    "model": one.model,
                    "scorer": one.scorer,
                    "verdict": one.verdict,
                    "adjusted_p_value": one.adjusted,
                    **asdict(one.result),
                }
                for one in evaluation.comparisons
            ],
            "means": {
                scorer: _without_nan({model: float(np.nanmean(values)) for model, values in by_model.items()})
                for scorer, by_model in evaluation.scores.items()
            },
            "agreement": {model: _without_nan(pairs) for model, pairs in evaluation.agreement.items()},
            "looks": {model: _without_nan(values) for model, values in evaluation.looks.items()},
            "notes": evaluation.notes,
            "sweeps": [asdict(sweep) for sweep in evaluation.sweeps],
        },
    )
    write_report(folder, evaluation)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _read(path: Path) -> Image.Image | None:
    """Decode an image. Return `None` if it is black."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    return None if is_black(image) else image
