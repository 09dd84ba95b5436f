"""Compare models by scorers: generate images, score them, compute win rates against the first model, write a report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ...utils.disk import naming_the_disk
from ...utils.errors import UserError
from ...utils.files import MANIFEST_FILE, json_lines, write_atomically
from ...utils.statistics import agreement, holm, win_rate
from ..rewards import Scorer
from ..rewards.scorer import file_name
from ..rewards.vlm_server import VLMServerJudge
from .candidate import Candidate
from .images import ImageSettings, generate_images, image_path, peers_of_this_run
from .prompts import PromptList, distinct_prompts
from .report import write_report
from .results import Comparison, Evaluation
from .scales import recommend_in_cards, sweeps_of
from .scoring import score_images, write_json

RESULTS_FILE = "results.json"


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
    scores, looks = score_images(scorers, folder, models, listed, settings, peers)
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
    write_json(
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


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}
