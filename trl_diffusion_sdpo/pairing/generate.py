"""Pairs from a model's own images: generate several images of each prompt, score them, and pair good with bad ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..evaluation import Candidate, evaluate_models
from ..evaluation.images import ImageSettings, image_path
from ..evaluation.prompts import PromptList
from ..rewards import Scorer
from ..rewards.vlm_server import VLMServerJudge
from ..utils.files import write_atomically
from .manifest import json_lines
from .picks import PAIRS_FILE, PICKS_FILE

Combination = Literal["weighted", "majority", "pareto"]
CARD_FILE = "README.md"


@dataclass(frozen=True)
class Pairing:
    """How scored images of one prompt become pairs.

    Args:
        combination (`str`, *optional*, defaults to `"weighted"`): How several scorers become one reward. `"weighted"`:
            each scorer's z-scores within the prompt, weighted and summed, then divided by the standard deviation over
            all images (GDPO). `"majority"`: the share of the prompt's other images that more scorers find worse than
            better, minus the share of which it is the other way round, in `[-1, 1]`. `"pareto"`: as `"weighted"`, but
            only pairs on which no scorer prefers the rejected image.
        weights (`Mapping[str, float]`, *optional*): Weight of each scorer by name; 1 for those not in it.
        margin (`float`, *optional*): Pair all images of a prompt whose rewards differ by at least this. If unset, each
            prompt gives one pair: the best and the worst image.

    Raises:
        `ValueError`: If a value is out of range.
    """

    combination: Combination = "weighted"
    weights: Mapping[str, float] = field(default_factory=dict)
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.combination not in get_args(Combination):
            raise ValueError(
                f"`combination` must be one of {', '.join(get_args(Combination))}, got {self.combination!r}."
            )
        if self.margin is not None and not self.margin > 0:
            raise ValueError(f"`margin` must be above 0, got {self.margin}. Leave it unset for best against worst.")
        if any(not weight >= 0 for weight in self.weights.values()):
            raise ValueError(f"The weights of scorers must be at least 0, got {dict(self.weights)}.")


def generate_pairs(
    model: Candidate,
    prompts: Sequence[str] | PromptList,
    scorers: Sequence[Scorer],
    output_dir: str | Path,
    settings: ImageSettings,
    pairing: Pairing | None = None,
) -> int:
    """Generate images of each prompt, score them, and write `pairs.jsonl`, which training reads.

    Images and scores are kept, so an interrupted call continues, and a call with another `pairing` generates nothing
    anew. If accelerate launches several processes, they share the work. Each row has `prompt`, `chosen`, `rejected`,
    `chosen_score`, `rejected_score`, `agreement` (the share of scorers that prefer the chosen image, ties half),
    `chosen_seed` and `rejected_seed`. `settings.generator(prompt, seed)` draws the initial noise of an image again.

    Args:
        model (`Candidate`): The model.
        prompts (`Sequence[str]` or `PromptList`): The prompts.
        scorers (`Sequence[Scorer]`): The scorers. Without any, there are images and no pairs: `pairs pick` reads the
            folder.
        output_dir (`str` or `Path`): Folder for images, scores, pairs and a card.
        settings (`ImageSettings`): Seeds, one image of each prompt for each, and arguments of the pipeline.
        pairing (`Pairing`, *optional*): How images become pairs.

    Returns:
        `int`: Number of pairs.

    Raises:
        `ValueError`: If there are fewer than two seeds, a weight is that of no scorer, the folder has images of other
            settings or pairs that a person picked, or the scorers tell no two images of a prompt apart.
    """
    pairing = pairing or Pairing()
    folder = Path(output_dir)
    if len(settings.seeds) < 2:
        raise ValueError(f"A pair needs two images of one prompt, so there must be 2 seeds, got {settings.seeds}.")
    for scorer in scorers:
        if isinstance(scorer, VLMServerJudge):
            raise ValueError(f"Pairs need scorers that score one image, got {scorer.name}. Use `vlm_server`.")
    unknown = sorted(set(pairing.weights) - {scorer.name for scorer in scorers})
    if unknown:
        raise ValueError(f"`weights` must be those of the scorers {[s.name for s in scorers]}, got {unknown}.")
    picks = folder / PICKS_FILE
    if picks.is_file() and picks.stat().st_size:
        raise ValueError(f"{folder} has pairs that a person picked, which must not be replaced. Use another folder.")
    evaluation = evaluate_models([model], prompts, scorers, folder, settings)
    if not scorers:
        return 0
    scores = np.stack([evaluation.scores[scorer.name][model.name] for scorer in scorers])
    weights = np.array([pairing.weights.get(scorer.name, 1.0) for scorer in scorers])
    rewards = combine(scores, weights, pairing.combination)
    rows = []
    for index, prompt in enumerate(evaluation.prompts.prompts):
        for chosen, rejected in _pairs(scores[:, index], rewards[index], pairing):
            difference = scores[:, index, chosen] - scores[:, index, rejected]
            name = {
                image: image_path(folder, model.name, index, settings.seeds[image]).relative_to(folder).as_posix()
                for image in (chosen, rejected)
            }
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": name[chosen],
                    "rejected": name[rejected],
                    "chosen_score": float(rewards[index, chosen]),
                    "rejected_score": float(rewards[index, rejected]),
                    "agreement": float(np.mean((np.sign(difference) + 1) / 2)),
                    "chosen_seed": settings.seeds[chosen],
                    "rejected_seed": settings.seeds[rejected],
                }
            )
    if not rows:
        raise ValueError(
            f"There are no pairs: as `pairing` asks, the scorers tell no two images of one of the "
            f"{len(evaluation.prompts.prompts)} prompts apart. Lower the margin, or use more seeds or other scorers."
        )
    from accelerate import PartialState

    if PartialState().is_main_process:
        write_atomically(folder / PAIRS_FILE, json_lines(rows))
        facts = {
            "Model": model.model if isinstance(model.model, str) else type(model.model).__name__,
            "Images of each prompt": len(settings.seeds),
            "Scorers": ", ".join(scorer.name for scorer in scorers),
            "Reward": pairing.combination,
        }
        write_card(folder, "Pairs of a model's own images, chosen by scorers.", facts, len(rows))
    return len(rows)


def combine(scores: np.ndarray, weights: np.ndarray, combination: Combination) -> np.ndarray:
    """Return one reward for each image; NaN if a scorer gives it no score.

    Args:
        scores (`np.ndarray` of shape `(scorers, prompts, images)`): The scores.
        weights (`np.ndarray` of shape `(scorers,)`): Weights of the scorers. `"majority"` counts only those above 0.

    Returns:
        `np.ndarray` of shape `(prompts, images)`: The rewards.
    """
    scores = np.where(np.isfinite(scores).all(axis=0), scores, np.nan)
    if combination == "majority":
        signs = np.sign(scores[..., :, None] - scores[..., None, :])  # (scorers, prompts, images, images)
        wins = np.sign(np.sum(np.sign(weights)[:, None, None, None] * signs, axis=0))
        others = np.sum(np.isfinite(wins), axis=-1) - 1
        rewards = np.nansum(wins, axis=-1) / np.maximum(others, 1)
        return np.where(np.isfinite(scores[0]), rewards, np.nan)
    present = np.isfinite(scores)
    count = np.maximum(present.sum(axis=-1, keepdims=True), 1)
    centred = scores - np.nansum(scores, axis=-1, keepdims=True) / count
    deviation = np.sqrt(np.nansum(centred**2, axis=-1, keepdims=True) / count)
    normal = np.divide(centred, deviation, out=np.where(present, 0.0, np.nan), where=deviation > 0)
    rewards = np.sum(weights[:, None, None] * normal, axis=0)
    spread = np.sqrt(np.nanmean(rewards**2)) if np.isfinite(rewards).any() else 0.0
    return rewards / spread if spread > 0 else rewards


def _pairs(scores: np.ndarray, rewards: np.ndarray, pairing: Pairing) -> list[tuple[int, int]]:
    """Return the pairs (chosen, rejected) of one prompt's images, the largest difference first."""
    images = np.flatnonzero(np.isfinite(rewards))
    allowed = [
        (rewards[better] - rewards[worse], better, worse)
        for better in images
        for worse in images
        if rewards[better] > rewards[worse]
        and (pairing.combination != "pareto" or (scores[:, better] >= scores[:, worse]).all())
    ]
    ordered = [(int(better), int(worse)) for _, better, worse in sorted(allowed, key=lambda pair: -pair[0])]
    if pairing.margin is None:
        return ordered[:1]
    return [(better, worse) for better, worse in ordered if rewards[better] - rewards[worse] >= pairing.margin]


def write_card(folder: Path, purpose: str, facts: Mapping[str, object], pairs: int, advice: str = "") -> None:
    """Write the card of a folder's pairs, unless there is one: the Hub shows it, and `load_dataset` reads the files
    that it names."""
    path = folder / CARD_FILE
    if path.exists():
        return
    listed = "\n".join(f"- {name}: {value}" for name, value in {**facts, "Pairs": pairs}.items())
    front = f"---\nconfigs:\n- config_name: default\n  data_files: {PAIRS_FILE}\ntags:\n- preference\n---\n"
    command = f"trl-diffusion-sdpo train --dataset_name {folder.name} --model_name_or_path MODEL --use_peft"
    parts = [f"# {folder.name}", purpose, listed, advice, f"Train with `{command}`."]
    text = front + "".join(f"\n{part}\n" for part in parts if part)
    write_atomically(path, text.encode())
