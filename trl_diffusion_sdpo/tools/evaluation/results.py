"""The results of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...utils.statistics import WinRate
from .prompts import PromptList
from .scales import Sweep


@dataclass(frozen=True)
class Comparison:
    """Comparison of one model with the base model by one scorer.

    `adjusted` is the p-value of `result` after Holm's correction for all comparisons of the evaluation.
    """

    model: str
    scorer: str
    result: WinRate
    adjusted: float

    @property
    def verdict(self) -> str:
        return self.result.verdict(self.adjusted)


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Args:
        prompts (`PromptList`): The prompts.
        seeds (`tuple[int, ...]`): The seeds. Each prompt has one image per model and seed.
        models (`tuple[str, ...]`): Names of the models, the base model first.
        scores (`dict[str, dict[str, np.ndarray]]`): Scorer -> model -> scores `(prompts, seeds)`, NaN for images
            without one.
        comparisons (`tuple[Comparison, ...]`): For each scorer, one of each other model with the base model.
        agreement (`dict[str, dict[str, float]]`): Model -> names of two scorers -> share of prompts on which they agree
            whether this model or the base model is better.
        looks (`dict[str, dict[str, float]]`): Model -> `saturation`, `diversity` and number of `black` images, which a
            safety checker probably hid.
        notes (`tuple[str, ...]`): Warnings for the reader, for example about skipped prompts.
        sweeps (`tuple[Sweep, ...]`): One for each model that was evaluated at several scales.
    """

    prompts: PromptList
    seeds: tuple[int, ...]
    models: tuple[str, ...]
    scores: dict[str, dict[str, np.ndarray]]
    comparisons: tuple[Comparison, ...]
    agreement: dict[str, dict[str, float]]
    looks: dict[str, dict[str, float]]
    notes: tuple[str, ...]
    sweeps: tuple[Sweep, ...]
