"""Writes the verdict on a training into the file `verdict.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..utils.files import VERDICT_FILE, write_atomically
from .sample_images import SamplePair
from .verdict import Estimate, Measurement, RunFacts, Verdict, noise_levels_of

UNKNOWN = Verdict(
    "unknown",
    "Verdict: unknown. The error on preferred images was not measured, or there is no earlier error to compare with.",
    "Pass held-out pairs as `eval_dataset`, and set `eval_strategy: steps` and `eval_on_start: true`.",
)


def write_verdict(
    folder: Path,
    verdict: Verdict | None,
    run: RunFacts,
    images: Sequence[SamplePair],
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write the verdict into `verdict.json` in a run's output folder.

    Args:
        verdict ([`Verdict`], *optional*): The verdict. `None` is written as "unknown".
        images (`Sequence[SamplePair]`): Sample images before and after training.
        scores (`Mapping`, *optional*): Win rates of the images after training, by scorer.
    """
    facts = verdict_facts(verdict or UNKNOWN, run, images) | {"sample_scores": scores or {}}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / VERDICT_FILE, json.dumps(facts, indent=2, allow_nan=False).encode() + b"\n")


def verdict_facts(verdict: Verdict, run: RunFacts, images: Sequence[SamplePair]) -> dict[str, Any]:
    """Return the content of `verdict.json` as a dictionary. Changes are in per cent. A number that is not finite
    becomes `None`."""
    facts: dict[str, Any] = {
        "label": verdict.label,
        "word": verdict.word,
        "headline": verdict.headline,
        "sentence": verdict.finding,
        "advice": verdict.advice or None,
        "pairs": verdict.pairs,
        "step": None,
        "noise_bins": [],
        "images": [asdict(pair) for pair in images],
    }
    measured = verdict.measured
    if measured is None:
        return facts
    accuracy = measured.accuracy or Estimate(math.nan)
    return facts | {
        "step": measured.step,
        "winners": measured.winners,
        "preference": measured.preference,
        "compared_with": measured.since,
        "winner_error": _finite(measured.error),
        "winner_error_before": _finite(measured.before),
        **_in_per_cent("winner_change", Estimate(measured.change, measured.stderr)),
        **_in_per_cent("margin", measured.margin or Estimate(math.nan)),
        "evaluated_pairs": None if measured.pairs is None else round(measured.pairs),
        "reward_accuracy": _finite(accuracy.value),
        "reward_accuracy_stderr": _finite(accuracy.stderr),
        "mean_lambda": _finite(measured.scale),
        "noise_bins": [_noise_bin(index, measured, run) for index in sorted(measured.bins)],
    }


def _noise_bin(index: int, measured: Measurement, run: RunFacts) -> dict[str, Any]:
    return {
        "bin": index,
        "noise_levels": list(noise_levels_of(index, run)),
        **_in_per_cent("winner_change", measured.bins[index]),
        "loser_change_percent": _per_cent(measured.loser_bins.get(index)),
    }


def _in_per_cent(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {f"{name}_percent": _per_cent(estimate.value), f"{name}_stderr_percent": _per_cent(estimate.stderr)}


def _per_cent(value: float | None) -> float | None:
    return None if value is None else _finite(100 * value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
