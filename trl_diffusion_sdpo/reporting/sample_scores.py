"""Scores the sample images of a run with reward models, and compares them with those from before training."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..utils.processes import ALONE, Peers
from ..utils.secrets import without_secrets
from ..utils.statistics import WinRate, holm, win_rate

if TYPE_CHECKING:
    from ..tools.rewards import Scorer

logger = logging.getLogger(__name__)

PREFIX = "samples/"
WIN_RATE = "_win_rate"


class SampleScores:
    """Scores the sample images of a step, and compares them with those from the same noise before training.

    The first process computes the scores, and the others wait. Scorers of this package take device memory only while
    they compute. One that fails before training starts or resumes ends the run; later, the error is logged, and the
    scores of that step are NaN.

    Args:
        names (`Sequence[str]`): Names of the scorers, which the first process loads on the CPU.
        prompts (`Sequence[str]`): Prompts of the sample images.
        device (`torch.device`): Device on which scorers compute.
        processes (`Peers`): All processes of the training. Each must make this object.

    Raises:
        `ValueError`: In the first process, if a scorer cannot be loaded. The others then raise `RuntimeError`.
    """

    def __init__(self, names: Sequence[str], prompts: Sequence[str], device: torch.device, processes: Peers = ALONE):
        self._prompts = list(prompts)
        self._device = device
        self._processes = processes
        self._scorers: dict[str, Scorer] = {}
        self._before: dict[str, np.ndarray] = {}
        self.step: int | None = None  # step of the newest scores
        self.metrics: dict[str, float] = {}
        self.win_rates: dict[str, WinRate | None] = {}
        processes.first(lambda: self._scorers.update(_load(names)))

    def begin(self, before: Sequence[Path]) -> None:
        """Score the images from before training. Call it in all processes when training starts or resumes. If a scorer
        fails, the first raises its error, and the others `RuntimeError`.

        Args:
            before (`Sequence[Path]`): Image files from before training, one for each prompt. Without them, there are no
                win rates.
        """
        if not before and self._processes.index == 0:
            logger.warning("Sample images get no win rates: `output_dir` has none from before training.")
        self._before = self._processes.first(
            lambda: {name: self._score(name, before) for name in self._scorers if before}
        )

    def measure(self, step: int, images: Sequence[Path]) -> None:
        """Score the sample images of a step. Call it in all processes.

        Args:
            step (`int`): Optimizer step at which the images were generated.
            images (`Sequence[Path]`): Image files, one for each prompt.
        """
        results = self._processes.first(lambda: {name: self._compare(name, step, images) for name in self._scorers})
        self.step = step
        self.win_rates = {name: result for name, (_, result) in results.items()}
        self.metrics = {}
        for name, (mean, result) in results.items():
            self.metrics[f"{PREFIX}{name}"] = mean
            if self._before:
                self.metrics[f"{PREFIX}{name}{WIN_RATE}"] = math.nan if result is None else result.rate

    def _compare(self, name: str, step: int, images: Sequence[Path]) -> tuple[float, WinRate | None]:
        """Return the mean score of a step's images, and their win rate against the images from before training."""
        try:
            scores = self._before[name] if step == 0 and self._before else self._score(name, images)
            return float(np.nanmean(scores)), win_rate(scores, self._before[name]) if self._before else None
        except Exception as error:
            logger.warning(
                "The scorer %r failed on the sample images of step %s. Training continues without its scores. %s: %s",
                name,
                step,
                type(error).__name__,
                without_secrets(str(error)),
            )
            return math.nan, None

    def _score(self, name: str, files: Sequence[Path]) -> np.ndarray:
        """Return the scores of image files, one for each prompt, as an array of shape `(prompts, 1)`."""
        images = [_read(file) for file in files]
        scorer = self._scorers[name]
        from ..tools.rewards.scorer import on_device

        with on_device(scorer, self._device):
            return scorer(images, self._prompts).numpy().astype(np.float64)[:, None]

    def facts(self, step: int) -> dict[str, dict[str, float | str | None]]:
        """Return each scorer's win rate at a step with confidence limits, p-value and verdict, for a JSON file."""
        rates = {name: result for name, result in self.win_rates.items() if result is not None}
        if self.step != step or not rates:
            return {}
        adjusted = holm([result.p_value for result in rates.values()])
        return {
            name: {
                "win_rate": result.rate,
                "low": result.low,
                "high": result.high,
                "adjusted_p_value": p_value,
                "verdict": result.verdict(p_value),
            }
            for (name, result), p_value in zip(rates.items(), adjusted, strict=True)
        }

    def sentence(self, step: int) -> str:
        """Return a sentence with the win rates of a step, or an empty string if the step has no win rates."""
        words = [
            f"{name} {fact['win_rate']:.0%} (95 % interval {fact['low']:.0%} to {fact['high']:.0%}: {fact['verdict']})"
            for name, fact in self.facts(step).items()
        ]
        if not words:
            return ""
        compared = f"the {len(self._prompts)} sample images against those from before training"
        return f"Win rate of {compared}: {', '.join(words)}."


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _load(names: Sequence[str]) -> dict[str, Scorer]:
    """Load scorers by name. The trainer imports these tools only here, if a run names one."""
    from ..tools.rewards import load_scorer

    return {name: load_scorer(name) for name in names}
