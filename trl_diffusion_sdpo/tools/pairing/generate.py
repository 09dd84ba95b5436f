"""Make pairs from a model's own images: generate several of each prompt, score them, and pair good ones with bad
ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...data.image_folders import SIDES
from ...utils.errors import UserError
from ...utils.score_scale import SCALE_COLUMN, ScoreScale
from ..evaluation import Candidate, evaluate_models
from ..evaluation.images import ImageSettings, generate_images, image_path, peers_of_this_run
from ..evaluation.prompts import PromptList, distinct_prompts
from ..evaluation.scoring import score_rows
from ..rewards import Scorer
from ..rewards.scorer import on_device
from ..rewards.vlm_server import VLMServerJudge
from .manifest import ListedImage, write_manifest
from .picks import PICKS_FILE
from .publish import NEGATIVES_ADVICE, write_dataset

Combination = Literal["weighted", "majority", "pareto"]


@dataclass(frozen=True)
class Pairing:
    """How scored images of one prompt become pairs.

    Args:
        combination (`str`, *optional*, defaults to `"weighted"`): How several scorers' scores become one reward.
            `"weighted"`: the weighted sum of their z-scores within the prompt, divided by its standard deviation over
            all images (GDPO). `"majority"`: the share of the prompt's other images that the image beats, minus the
            share that beat it, in `[-1, 1]`; an image beats another if most scorers prefer it. `"pareto"`: like
            `"weighted"`, but without pairs in which a scorer prefers the rejected image.
        weights (`Mapping[str, float]`, *optional*): Name of a scorer -> its weight, 1 if missing.
        margin (`float`, *optional*): Make a pair of every two images of a prompt whose rewards differ by at least this
            much. If unset, each prompt gives one pair: its best and its worst image.

    Raises:
        `ValueError`: If a value is out of range.
    """

    combination: Combination = "weighted"
    weights: Mapping[str, float] = field(default_factory=dict)
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.combination not in get_args(Combination):
            raise UserError(
                f"`combination` must be one of {', '.join(get_args(Combination))}, got {self.combination!r}."
            )
        if self.margin is not None and not self.margin > 0:
            raise UserError(
                f"`margin` must be above 0, got {self.margin}. Leave `margin` unset to pair only the best and the "
                "worst image of each prompt."
            )
        if not all(isinstance(weight, int | float) and weight >= 0 for weight in self.weights.values()):
            raise UserError(f"The weights of scorers must be numbers of at least 0, got {dict(self.weights)}.")


def generate_pairs(
    model: Candidate,
    prompts: Sequence[str] | PromptList,
    scorers: Sequence[Scorer],
    output_dir: str | Path,
    settings: ImageSettings,
    pairing: Pairing | None = None,
) -> int:
    """Generate images of each prompt, score them, and write `pairs.jsonl`, which training reads.

    Images and scores are saved in the folder: call it again with the same arguments to continue after an interruption,
    or with another `pairing` to reuse them. Processes that accelerate launches share the work.

    Each row of the file has `prompt`, `chosen`, `rejected`, `chosen_score`, `rejected_score`, `score_scales` (what the
    scores mean, which losses read), `agreement` (share of scorers that prefer the chosen image; a tie counts half),
    `chosen_seed` and `rejected_seed`, and `chosen_noise_seed` and `rejected_noise_seed`. Training with
    `noise_source="generated"` draws the images' initial noise again from the noise seeds.

    Args:
        model (`Candidate`): The model.
        prompts (`Sequence[str]` or `PromptList`): The prompts.
        scorers (`Sequence[Scorer]`): The scorers. Without any, only images are written, for `pairs pick`. A judge such
            as `vlm_judge` compares the images of neighbouring seeds: first and second, third and fourth, and so on. A
            chosen image must then have won its comparison, and a rejected one lost it.
        output_dir (`str` or `Path`): Folder for images, scores, pairs and a card.
        settings (`ImageSettings`): Seeds and arguments of the pipeline. Each prompt gets one image per seed.
        pairing (`Pairing`, *optional*): How images become pairs.

    Returns:
        `int`: Number of pairs.

    Raises:
        `ValueError`: If there are fewer than two seeds, several judges, or a judge without a scorer; if a weight names
            a scorer that is not used; if the folder has images generated with other settings, or pairs that a person
            picked; or if no two images of a prompt can be paired.
    """
    pairing = pairing or Pairing()
    folder = Path(output_dir)
    if len(settings.seeds) < 2:
        raise UserError(f"A pair needs two images of one prompt, so pass at least 2 seeds, got {settings.seeds}.")
    singles, judge = scorers_and_judge(scorers, pairing)
    refuse_picks(folder)

    # Generate and score the images.
    evaluation = evaluate_models([model], prompts, singles, folder, settings)
    if not singles:
        return 0
    scores = np.stack([evaluation.scores[scorer.name][model.name] for scorer in singles])  # (K, prompts, seeds)
    rewards = combine(scores, _weights(singles, pairing), pairing.combination)
    judged = _judge_neighbours(judge, folder, model.name, evaluation.prompts, settings) if judge is not None else None

    # Pair the images of each prompt.
    scale = asdict(scale_of_rewards(rewards, pairing.combination, [scorer.name for scorer in singles]))
    rows = []
    for index, prompt in enumerate(evaluation.prompts.prompts):
        allowed = None if judged is None else judged[index]
        for chosen, rejected in _pairs(scores[:, index], rewards[index], allowed, pairing):
            difference = scores[:, index, chosen] - scores[:, index, rejected]
            row: dict[str, Any] = {"prompt": prompt}
            for side, image in zip(SIDES, (chosen, rejected), strict=True):
                seed = settings.seeds[image]
                row[side] = image_path(folder, model.name, index, seed).relative_to(folder).as_posix()
                row[f"{side}_score"] = float(rewards[index, image])
                row[f"{side}_seed"] = seed
                row[f"{side}_noise_seed"] = settings.noise_seed(prompt, seed)
            row[SCALE_COLUMN] = [scale]
            row["agreement"] = float(np.mean((np.sign(difference) + 1) / 2))
            rows.append(row)
    if not rows:
        raise UserError(
            f"None of the {len(evaluation.prompts.prompts)} prompts has two images that can be paired. The rewards of "
            "a prompt's images are equal or differ by less than `margin`, or `combination` or the judge excludes the "
            "pair. Lower `margin`, or use more seeds or other scorers."
        )
    facts = {
        "Images of each prompt": len(settings.seeds),
        "Scorers": ", ".join(scorer.name for scorer in scorers),
        "Reward": pairing.combination,
    }
    purpose = "Pairs of a model's own images, chosen by scorers."
    peers_of_this_run().first(lambda: write_dataset(folder, rows, purpose, model, facts))
    return len(rows)


def pairs_of_negatives(
    model: Candidate,
    prompts: Sequence[str] | PromptList,
    output_dir: str | Path,
    settings: ImageSettings,
    negative_kwargs: Mapping[str, Any],
) -> int:
    """Write `pairs.jsonl` for training: each chosen image of a model is paired with one that the model generates from
    the same noise with worse settings. Needs no scorer.

    By default, the command line's worse settings have no guidance. Call it again with the same arguments to
    continue after an interruption.

    Args:
        model (`Candidate`): The model.
        prompts (`Sequence[str]` or `PromptList`): The prompts.
        output_dir (`str` or `Path`): Folder for images, pairs and a card.
        settings (`ImageSettings`): Seeds and arguments of the pipeline. Each prompt gets one pair per seed.
        negative_kwargs (`Mapping[str, Any]`): Arguments of the pipeline for the worse images, in place of those in
            `settings`.

    Returns:
        `int`: Number of pairs.

    Raises:
        `ValueError`: If the worse images would get the same arguments as the chosen ones, or the folder has images
            generated with other settings, or pairs that a person picked.

    Source: https://huggingface.co/papers/2505.11777 (Self-NPO), which uses a model's own images as negatives. Starting
    both images of a pair from the same noise is our choice.
    """
    if {**(settings.call_kwargs or {}), **negative_kwargs} == (settings.call_kwargs or {}):
        raise UserError(
            f"`negative_kwargs` must differ from the arguments of the chosen images, got {dict(negative_kwargs)} for "
            "both. Pass worse settings, such as a `guidance_scale` of 1."
        )
    folder = Path(output_dir)
    refuse_picks(folder)
    listed = prompts if isinstance(prompts, PromptList) else distinct_prompts(prompts)
    worse = replace(model, name="rejected", call_kwargs={**(model.call_kwargs or {}), **negative_kwargs})
    peers = peers_of_this_run()
    for candidate in (replace(model, name="chosen"), worse):
        generate_images(candidate, listed.prompts, settings, folder, peers)
    rows = []
    images = []
    for index, prompt in enumerate(listed.prompts):
        for seed in settings.seeds:
            noise_seed = settings.noise_seed(prompt, seed)
            row: dict[str, Any] = {"prompt": prompt}
            for side in SIDES:
                row[side] = image_path(folder, side, index, seed).relative_to(folder).as_posix()
                row[f"{side}_noise_seed"] = noise_seed
                images.append(ListedImage(row[side], prompt, {"model": side, "seed": seed, "noise_seed": noise_seed}))
            rows.append(row)
    listing = {
        "Chosen": f"images with {json.dumps(settings.call_kwargs or {})}",
        "Rejected": f"images of the same noise with these arguments and {json.dumps(dict(negative_kwargs))}",
    }
    peers.first(lambda: write_manifest(folder, images))
    purpose = "A model's images against those that it generates from the same noise with worse settings."
    peers.first(lambda: write_dataset(folder, rows, purpose, model, listing, NEGATIVES_ADVICE))
    return len(rows)


def scorers_and_judge(scorers: Sequence[Scorer], pairing: Pairing) -> tuple[list[Scorer], VLMServerJudge | None]:
    """Return the scorers of single images and the judge of pairs, if any.

    Raises:
        `ValueError`: If there are several judges or a judge without a scorer, a weight names a scorer that is not used,
            or there are no scorers for a `pairing` other than the default.
    """
    judges = [scorer for scorer in scorers if isinstance(scorer, VLMServerJudge)]
    singles = [scorer for scorer in scorers if not isinstance(scorer, VLMServerJudge)]
    names = [scorer.name for scorer in singles]
    if len(judges) > 1 or (judges and not singles):
        raise UserError(
            "At most one judge can be used, and only together with a scorer of single images. Got the judges "
            f"{[judge.name for judge in judges]} and the scorers {names}. Add a scorer such as `vlm_server`, or leave "
            "the judges out."
        )
    if unknown := sorted(set(pairing.weights) - set(names)):
        raise UserError(
            f"`weights` must contain names of scorers that are used, which are {names}, got {unknown}. Correct the "
            "names."
        )
    if not singles and pairing != Pairing():
        raise UserError(
            f"`combination` and `margin` need scorers, got {pairing.combination} and {pairing.margin} without any. "
            "Name scorers, or leave both out."
        )
    return singles, judges[0] if judges else None


def score_given_pairs(
    scorers: Sequence[Scorer],
    pairing: Pairing,
    folder: Path,
    rows: Sequence[tuple[int, int]],
    prompts: PromptList,
    device: str,
) -> tuple[np.ndarray, list[bool], dict[str, Any]]:
    """Score the images of `chosen` and `rejected` in a folder, and say which pairs the scorers confirm. Call it in all
    processes.

    Args:
        rows (`Sequence[tuple[int, int]]`): Index of the prompt and seed of each pair.
        device (`str`): Device for scorers on the CPU.

    Returns:
        The rewards `(pairs, 2)` of chosen and rejected image, whether each pair is confirmed (the chosen image has the
        higher reward, by at least `margin`, and has won before the judge), and the scale of the rewards. The z-scores
        are over all images, because those of two are always -1 and 1.
    """
    singles, judge = scorers_and_judge(scorers, pairing)
    peers = peers_of_this_run()
    places = [(index, (seed, seed)) for index, seed in rows]
    by_scorer = []
    for scorer in singles:
        with on_device(scorer, device):
            by_scorer.append([score_rows(scorer, folder, [side], places, prompts, peers) for side in SIDES])
    scores = np.swapaxes(by_scorer, 1, 2)  # (scorers, pairs, 2)
    grouped = scores if pairing.combination == "majority" else scores.reshape(len(singles), 1, -1)
    rewards = combine(grouped, _weights(singles, pairing), pairing.combination).reshape(-1, 2)
    judged = np.full(rewards.shape, (1.0, -1.0))
    if judge is not None:
        judged *= score_rows(judge, folder, SIDES, places, prompts, peers)[:, None]
    confirmed = [(0, 1) in _pairs(scores[:, row], rewards[row], judged[row], pairing) for row in range(len(rows))]
    scale = scale_of_rewards(rewards, pairing.combination, [scorer.name for scorer in singles])
    return rewards, confirmed, asdict(scale)


def _weights(scorers: Sequence[Scorer], pairing: Pairing) -> np.ndarray:
    return np.array([pairing.weights.get(scorer.name, 1.0) for scorer in scorers])


def refuse_picks(folder: Path) -> None:
    """Raise `ValueError` if a person picked the pairs of a folder."""
    picks = folder / PICKS_FILE
    if picks.is_file() and picks.stat().st_size:
        raise UserError(
            f"The pairs of {folder} were picked by a person and are never overwritten. Use another output folder."
        )


def combine(scores: np.ndarray, weights: np.ndarray, combination: Combination) -> np.ndarray:
    """Return one reward for each image, or NaN if it has no score from some scorer.

    Args:
        scores (`np.ndarray` of shape `(scorers, prompts, images)`): The scores.
        weights (`np.ndarray` of shape `(scorers,)`): Weights of the scorers. With `"majority"`, each with a weight
            above 0 has one vote.

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


def scale_of_rewards(rewards: np.ndarray, combination: Combination, names: Sequence[str]) -> ScoreScale:
    """Return the scale of the rewards of [`combine`], with their range over all images.

    Differences of weighted z-scores count as log-odds, so for `calibrated_scores` one standard deviation is a clear
    preference.
    """
    if combination == "majority":
        name = f"majority votes of {', '.join(names)}"
        return ScoreScale(name, low=-1.0, high=1.0, lowest=-1.0, highest=1.0)
    name = f"z-scores of {', '.join(names)}"
    if not np.isfinite(rewards).any():
        return ScoreScale(name)
    return ScoreScale(name, low=float(np.nanmin(rewards)), high=float(np.nanmax(rewards)), log_odds=1.0)


def _judge_neighbours(
    judge: VLMServerJudge, folder: Path, name: str, prompts: PromptList, settings: ImageSettings
) -> np.ndarray:
    """Let a judge compare the images of neighbouring seeds, and return its verdicts, `(prompts, seeds)`.

    A verdict is 1 if the judge prefers the image to its neighbour, -1 if it prefers the neighbour, 0 for a tie, and NaN
    without an answer. With an odd number of seeds, the last has no neighbour, so its verdicts are NaN.
    """
    count = len(settings.seeds) // 2
    neighbours = [settings.seeds[2 * pair : 2 * pair + 2] for pair in range(count)]
    rows = [(index, pair) for index in range(len(prompts.prompts)) for pair in neighbours]
    # Verdicts are saved as "model+model.json", which `record_settings` deletes if the images were deleted.
    compared = score_rows(judge, folder, [name, name], rows, prompts, peers_of_this_run()).reshape(-1, count)
    judged = np.full((len(prompts.prompts), len(settings.seeds)), np.nan)
    judged[:, 0 : 2 * count : 2] = compared
    judged[:, 1 : 2 * count : 2] = -compared
    return judged


def _pairs(
    scores: np.ndarray, rewards: np.ndarray, judged: np.ndarray | None, pairing: Pairing
) -> list[tuple[int, int]]:
    """Return the pairs (chosen, rejected) of one prompt's images, those with the largest difference in reward first.

    Given the verdicts of `_judge_neighbours`, only images with 1 can be chosen, and only those with -1 rejected.
    """
    images = np.flatnonzero(np.isfinite(rewards))
    allowed = [
        (rewards[better] - rewards[worse], better, worse)
        for better in images
        for worse in images
        if rewards[better] > rewards[worse]
        and (judged is None or judged[better] > 0 > judged[worse])
        and (pairing.combination != "pareto" or (scores[:, better] >= scores[:, worse]).all())
    ]
    ordered = [(int(better), int(worse)) for _, better, worse in sorted(allowed, key=lambda pair: -pair[0])]
    if pairing.margin is None:
        return ordered[:1]
    return [(better, worse) for better, worse in ordered if rewards[better] - rewards[worse] >= pairing.margin]
