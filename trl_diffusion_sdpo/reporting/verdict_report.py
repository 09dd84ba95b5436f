"""A verdict as files: `verdict.json`, and the picture `verdict.png`."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..utils.files import VERDICT_FILE, VERDICT_PLOT, write_atomically
from ..utils.import_utils import is_plots_available
from .verdict import Change, RunFacts, Verdict, noise_levels_of

SHOWN_PROMPTS = 6
LABELLED_BARS = 10
UNKNOWN = Verdict(
    "unknown",
    "Verdict: unknown. No error on preferred images was measured that can be compared.",
    "Give held-out pairs as `eval_dataset` and set `eval_strategy: steps` and `eval_on_start: true`.",
)
COLOURS = {"better": "#0072B2", "unchanged": "#555555", "worse": "#D55E00", "unknown": "#555555"}


@dataclass(frozen=True)
class SamplePair:
    """Two images of one prompt from equal noise; paths are relative to the output folder."""

    prompt: str
    seed: int
    before: str
    after: str


def write_verdict(folder: Path, verdict: Verdict | None, run: RunFacts, images: Sequence[SamplePair]) -> Path | None:
    """Write `verdict.json`, and with matplotlib `verdict.png`, into a run's folder; returns the picture."""
    facts = verdict_facts(verdict or UNKNOWN, run, images)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / VERDICT_FILE, json.dumps(facts, indent=2, allow_nan=False).encode() + b"\n")
    return draw_verdict(folder, facts) if is_plots_available() else None


def verdict_facts(verdict: Verdict, run: RunFacts, images: Sequence[SamplePair]) -> dict[str, Any]:
    """The content of `verdict.json`: numbers that are not finite are `None`, changes are in per cent."""
    measured = verdict.measured
    facts: dict[str, Any] = {
        "label": verdict.label,
        "word": verdict.word,
        "sentence": verdict.finding,
        "advice": verdict.advice or None,
        "pairs": verdict.pairs,
        "step": None,
        "noise_bins": [],
        "images": [asdict(pair) for pair in images],
    }
    if measured is None:
        return facts
    of_all = Change(measured.change, measured.stderr)
    return facts | {
        "step": measured.step,
        "compared_with": measured.since,
        "winner_error": _finite(measured.error),
        "winner_error_before": _finite(measured.before),
        **_percent(of_all),
        "noise_percent": _finite(100 * of_all.noise) if math.isfinite(measured.error) else None,
        "evaluated_pairs": None if measured.pairs is None else round(measured.pairs),
        "reward_accuracy": _finite(measured.accuracy),
        "noise_bins": [
            {"bin": index, "noise_levels": list(noise_levels_of(index, run)), **_percent(change)}
            for index, change in sorted(measured.bins.items())
        ],
    }


def draw_verdict(folder: Path, facts: dict[str, Any]) -> Path:
    """Draw the content of `verdict.json`: the winners' change by noise level, the accuracy, images before and after."""
    from matplotlib.figure import Figure

    images = facts["images"][:SHOWN_PROMPTS]
    figure = Figure(figsize=(10, 4.6 + (3.6 if images else 0)), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=[4.4, 3.6]) if images else [figure]
    title = textwrap.fill(" ".join(filter(None, (facts["sentence"], facts["advice"]))), 105)
    rows[0].suptitle(title, x=0.01, ha="left", fontsize=10, color=COLOURS[facts["label"]], parse_math=False)
    bars, accuracy = rows[0].subplots(1, 2, width_ratios=[5, 1])
    _draw_changes(bars, facts)
    _draw_accuracy(accuracy, facts.get("reward_accuracy"))
    if images:
        _draw_images(rows[1], folder, images)
    figure.savefig(folder / VERDICT_PLOT, dpi=110)
    return folder / VERDICT_PLOT


def _draw_changes(axes: Any, facts: dict[str, Any]) -> None:
    shown = [("all", facts)] if "winner_change_percent" in facts else []
    shown += [("{:.3g} to\n{:.3g}".format(*found["noise_levels"]), found) for found in facts["noise_bins"]]
    values = [math.nan if (value := found["winner_change_percent"]) is None else value for _, found in shown]
    errors = [2 * (found["winner_change_stderr_percent"] or 0.0) for _, found in shown]
    colours = [COLOURS["worse"] if value > 0 else COLOURS["better"] for value in values]
    places = [place + (0.5 if place else 0) for place in range(len(shown))]  # the mean apart from the levels
    axes.use_sticky_edges = False  # leaves room below the bars
    axes.bar(places, values, 0.75, color=colours)
    known = [place for place, error in enumerate(errors) if error]
    axes.errorbar(
        [places[i] for i in known], [values[i] for i in known], [errors[i] for i in known], fmt="none", ecolor="black"
    )
    noise = facts["noise_percent"] if shown else None
    if noise is not None:  # of the mean alone
        label = f"not told from none (±{noise:.2g}%)"
        axes.bar([0], [2 * noise], 1.1, bottom=-noise, color="#bbbbbb", alpha=0.5, lw=0, zorder=0, label=label)
        axes.figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    if not any(math.isfinite(value) for value in values):
        missing = "no number" if shown else "nothing was measured"
        axes.text(0.5, 0.6, missing, transform=axes.transAxes, ha="center")
    axes.axhline(0, color="black", lw=0.8)
    step = math.ceil(len(shown) / LABELLED_BARS)
    named = [0, *range(1, len(shown), step)] if shown else []
    axes.set_xticks([places[i] for i in named], [shown[i][0] for i in named], fontsize=9)
    axes.set_title("Error on the preferred images: change, lines of ± 2 standard errors", fontsize=10, loc="left")
    axes.set(xlabel="noise level, from clean to noise", ylabel="% of the error before")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_accuracy(axes: Any, accuracy: float | None) -> None:
    axes.set_title("Reward accuracy", fontsize=10)
    axes.set_ylim(0, 100)
    axes.set_xticks([])
    axes.axhline(50, color="black", lw=0.8, ls=":")
    if accuracy is None:
        axes.text(0.5, 0.6, "not measured", transform=axes.transAxes, ha="center", fontsize=9)
    else:
        axes.bar([0], [100 * accuracy], 0.5, color="#0072B2")
        axes.text(0, min(100 * accuracy + 2, 94), f"{accuracy:.0%}", ha="center", fontsize=11)
    axes.set_xlim(-0.6, 0.6)
    axes.set_ylabel("% of pairs")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_images(figure: Any, folder: Path, images: Sequence[dict[str, Any]]) -> None:
    grid = figure.subplots(2, SHOWN_PROMPTS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for column, pair in enumerate(images):
        for axes, when in zip(grid[:, column], ("before", "after"), strict=True):
            with Image.open(folder / pair[when]) as image:
                axes.imshow(image.convert("RGB"))
        prompt = textwrap.shorten(pair["prompt"], 60, placeholder="…")
        grid[0, column].set_title("\n".join(textwrap.wrap(f"“{prompt}”", 22)), fontsize=8, parse_math=False)
    for axes, when in zip(grid[:, 0], ("before", "after"), strict=True):
        axes.text(-0.08, 0.5, when, transform=axes.transAxes, rotation=90, va="center", ha="right", fontsize=9)


def _percent(change: Change) -> dict[str, float | None]:
    stderr = None if change.stderr is None else 100 * change.stderr
    return {"winner_change_percent": _finite(100 * change.value), "winner_change_stderr_percent": _finite(stderr)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
