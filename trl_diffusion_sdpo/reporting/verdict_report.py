"""Writes a verdict as `verdict.json` and as the picture `verdict.png`."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.files import VERDICT_FILE, VERDICT_PLOT, write_atomically
from .sample_images import SamplePair
from .verdict import STANDARD_ERRORS, Estimate, Measurement, RunFacts, Verdict, noise_levels_of

SHOWN_PROMPTS = 6
UNKNOWN = Verdict(
    "unknown",
    "Verdict: unknown. No error on preferred images was measured that can be compared.",
    "Give held-out pairs as `eval_dataset` and set `eval_strategy: steps` and `eval_on_start: true`.",
)
COLOURS = {"better": "#1b7837", "unchanged": "#555555", "worse": "#b2182b", "unknown": "#555555"}
WINNERS, LOSERS, GREY = "#2166ac", "#e08214", "#666666"


def write_verdict(
    folder: Path,
    verdict: Verdict | None,
    run: RunFacts,
    images: Sequence[SamplePair],
    scores: Mapping[str, Any] | None = None,
) -> Path:
    """Write `verdict.json` and `verdict.png` into a run's folder. Return the picture's path.

    Args:
        images (`Sequence[SamplePair]`): Sample images before and after training.
        scores (`Mapping`, *optional*): Win rates of these images, by scorer.
    """
    facts = verdict_facts(verdict or UNKNOWN, run, images) | {"sample_scores": scores or {}}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / VERDICT_FILE, json.dumps(facts, indent=2, allow_nan=False).encode() + b"\n")
    return draw_verdict(folder, facts)


def verdict_facts(verdict: Verdict, run: RunFacts, images: Sequence[SamplePair]) -> dict[str, Any]:
    """Return the content of `verdict.json`. Numbers that are not finite are `None`, and changes are in per cent."""
    measured = verdict.measured
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
    return facts if measured is None else facts | _numbers(measured, run)


def _numbers(measured: Measurement, run: RunFacts) -> dict[str, Any]:
    bins = []
    for index, change in sorted(measured.bins.items()):
        levels = {"bin": index, "noise_levels": list(noise_levels_of(index, run))}
        losers = {"loser_change_percent": _percent(measured.loser_bins.get(index))}
        bins.append(levels | _both("winner_change", change) | losers)
    accuracy = measured.accuracy or Estimate(math.nan)
    return {
        "step": measured.step,
        "winners": measured.winners,
        "preference": measured.preference,
        "compared_with": measured.since,
        "winner_error": _finite(measured.error),
        "winner_error_before": _finite(measured.before),
        **_both("winner_change", Estimate(measured.change, measured.stderr)),
        **_both("margin", measured.margin or Estimate(math.nan)),
        "evaluated_pairs": None if measured.pairs is None else round(measured.pairs),
        "reward_accuracy": _finite(accuracy.value),
        "reward_accuracy_stderr": _finite(accuracy.stderr),
        "mean_lambda": _finite(measured.scale),
        "noise_bins": bins,
    }


def draw_verdict(folder: Path, facts: dict[str, Any]) -> Path:
    """Draw the content of `verdict.json`: the word, the errors' change by noise level, accuracy and images."""
    from matplotlib.figure import Figure

    images = facts["images"][:SHOWN_PROMPTS]
    sentence = facts["sentence"].removeprefix(f"Verdict: {facts['headline']}. ")
    text = [line for paragraph in (sentence, facts["advice"] or "") for line in textwrap.wrap(paragraph, 120)]
    side = min(1.9, 9.3 / max(1, len(images)))  # of an image, in inches
    heights = [0.6 + 0.2 * len(text), 3.1, *([2 * side + 0.6] if images else [])]
    figure = Figure(figsize=(10, sum(heights)), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.05)
    rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    look: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
    colour = COLOURS[facts["label"]]
    rows[0].text(0.015, 0.93, facts["headline"].capitalize(), size=20, weight="bold", color=colour, **look)
    rows[0].text(0.015, 1 - 0.6 / heights[0], "\n".join(text), size=9.5, color="#333333", linespacing=1.35, **look)
    changes, accuracy = rows[1].subplots(1, 2, width_ratios=[4, 1])
    _draw_changes(changes, facts)
    _draw_accuracy(accuracy, facts)
    if images:
        _draw_images(rows[2], folder, images)
    figure.savefig(folder / VERDICT_PLOT, dpi=120)
    return folder / VERDICT_PLOT


def _draw_changes(axes: Any, facts: dict[str, Any]) -> None:
    """Draw the change of winners and losers over the noise level. The winners' mean is a dashed line."""
    whose = "training pairs" if facts["pairs"] == "training" else "held-out pairs"
    axes.set_title(f"Change of the error on {whose}, in %", fontsize=10, loc="left")
    axes.axhline(0, color="black", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.2)
    axes.set(xlabel="noise level, from clean to noise", xlim=(0, 1))
    bins = [noise_bin for noise_bin in facts["noise_bins"] if noise_bin["winner_change_percent"] is not None]
    mean = facts.get("winner_change_percent")
    if not bins and mean is None:
        message = "not a number" if "winner_change_percent" in facts else "nothing was measured"
        axes.text(0.5, 0.6, message, transform=axes.transAxes, ha="center", color=GREY)
        return
    if mean is not None:
        axes.axhline(mean, color=WINNERS, lw=1, ls="--", label=f"preferred, mean: {mean:+.2g} %")
    if bins:
        levels = [sum(noise_bin["noise_levels"]) / 2 for noise_bin in bins]
        winners = np.array([noise_bin["winner_change_percent"] for noise_bin in bins])
        losers = np.array([noise_bin["loser_change_percent"] for noise_bin in bins], dtype=float)  # None is nan
        stderrs = [noise_bin["winner_change_stderr_percent"] or 0.0 for noise_bin in bins]
        noise = STANDARD_ERRORS * np.array(stderrs)
        axes.plot(levels, winners, "o-", color=WINNERS, lw=2, ms=5, label="preferred, ± 2 standard errors")
        if not np.isnan(losers).all():
            axes.plot(levels, losers, "o-", color=LOSERS, lw=2, ms=5, label="rejected")
        limits = axes.get_ylim()  # by the values: one large uncertainty must not flatten the lines
        axes.fill_between(levels, winners - noise, winners + noise, color=WINNERS, alpha=0.15, lw=0)
        axes.set_ylim(limits)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _draw_accuracy(axes: Any, facts: dict[str, Any]) -> None:
    """Draw the share of pairs in the right order. Chance is a dotted line."""
    axes.set_title("Pairs in the right order", fontsize=10)
    axes.set(xlim=(-1, 1), ylim=(0, 100), xticks=[], yticks=[0, 50, 100], yticklabels=["0 %", "50 %", "100 %"])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.axhline(50, color="black", lw=0.8, ls=":")
    accuracy, stderr = facts.get("reward_accuracy"), facts.get("reward_accuracy_stderr")
    if accuracy is None:
        axes.text(0, 60, "not measured", ha="center", fontsize=9, color=GREY)
        return
    colour = {"learned": COLOURS["better"], "reversed": COLOURS["worse"]}.get(facts["preference"], GREY)
    axes.bar([0], [100 * accuracy], 0.7, color=colour, alpha=0.25)
    error = None if stderr is None else [100 * STANDARD_ERRORS * stderr]
    axes.errorbar([0], [100 * accuracy], error, fmt="o", color=colour, ms=7, capsize=4, lw=1.5)
    axes.text(0, 6, f"{accuracy:.0%}", ha="center", fontsize=15, weight="bold", color=colour)
    if facts.get("margin_percent") is not None:
        axes.set_xlabel(f"margin {facts['margin_percent']:+.2g} %", fontsize=9)


def _draw_images(figure: Any, folder: Path, images: Sequence[dict[str, Any]]) -> None:
    """Draw each prompt's images before training, above those after it."""
    grid = figure.subplots(2, max(3, len(images)), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for column, pair in enumerate(images):
        for axes, when in zip(grid[:, column], ("before", "after"), strict=True):
            with Image.open(folder / pair[when]) as image:
                axes.imshow(image.convert("RGB"))
        prompt = textwrap.shorten(pair["prompt"], 60, placeholder="…")
        grid[0, column].set_title("\n".join(textwrap.wrap(prompt, 24)), fontsize=8, parse_math=False)
    for axes, when in zip(grid[:, 0], ("before", "after"), strict=True):
        axes.text(-0.06, 0.5, when, transform=axes.transAxes, rotation=90, va="center", ha="right", fontsize=9)


def _both(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {f"{name}_percent": _percent(estimate.value), f"{name}_stderr_percent": _percent(estimate.stderr)}


def _percent(value: float | None) -> float | None:
    return None if value is None else _finite(100 * value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
