"""Builds the rows of a sweep over scales, and recommends a scale."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..losses import standard_error
from .verdict import RunFacts, verdict_of

FEWEST_IMAGES = 8  # for each scale. With fewer, their standard error is often too small
KEPT = ("better", "unchanged")
LOST = ("worse", "ruined")

Scores = Mapping[float, Sequence[float]]  # scale -> scores of the images of all prompts, in one order


def sweep_row(scale: float, metrics: Mapping[str, float], run: RunFacts) -> dict[str, Any]:
    """Return one row of a sweep: the metrics of `evaluate` at a scale, with a reference, and the verdict on them.

    Args:
        scale (`float`): 0 is the base, 1 the tuned model.
        metrics (`Mapping[str, float]`): Metrics with the prefix `eval`.
        run ([`~trl_diffusion_sdpo.reporting.verdict.RunFacts`]): Facts of the run, whose reference is the base.
    """
    verdict = verdict_of([{**metrics, "step": 1}], run)
    assert verdict is not None and verdict.measured is not None
    measured = verdict.measured
    row: dict[str, Any] = {
        "scale": scale,
        "word": verdict.word,
        "winners": measured.winners,
        "preference": measured.preference,
        "margin": metrics["eval_rewards/margins"],
        "winner_change": measured.change,
        "winner_change_stderr": measured.stderr,
        "worst_bin_change": None if measured.worst is None else measured.worst[1].value,
        "pairs": metrics.get("eval_errors/pairs"),
    }
    for name, estimate in (("accuracy", measured.accuracy), ("margin_relative", measured.margin)):
        row |= {name: estimate and estimate.value, f"{name}_stderr": estimate and estimate.stderr}
    return row


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table for the terminal."""
    lines = [["scale", "winners' error", "worst noise bin", "accuracy", "margin", "verdict"]]
    for row in rows:
        error, accuracy, margin = (_percent(row, name) for name in ("winner_change", "accuracy", "margin_relative"))
        lines.append([f"{row['scale']:g}", error, _percent(row, "worst_bin_change"), accuracy, margin, row["word"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def recommend(
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Scores] | None = None,
    *,
    scorer: str | None = None,
    guidance_scale: float | None = None,
    is_negative: bool = False,
) -> dict[str, Any]:
    """Recommend a scale of a run's weights, and one of guidance in its prediction.

    Args:
        rows (`Sequence[Mapping]`): Rows of [`sweep_row`].
        scores (`Mapping[str, Mapping]`, *optional*): Scores of images of the forms `"weights"` and `"prediction"`.
        scorer (`str`, *optional*): Name of the scorer.
        guidance_scale (`float`, *optional*): Classifier-free guidance of the images.
        is_negative (`bool`): Whether the run was tuned on swapped labels.

    Returns:
        `dict[str, Any]`: `weights` and `prediction`, the scales, each `None` if none is recommended; `sentence`, the
        reasons; `scorer`, the name of the scorer if its scores decided; `guidance_scale`.
    """
    enough = scores and all(len(values) >= FEWEST_IMAGES for form in scores.values() for values in form.values())
    scores = scores if scores and enough else {}
    kept = [row for row in rows if row["scale"] > 0 and row["winners"] in KEPT and row["preference"] != "reversed"]
    tuned = next((row["winners"] for row in rows if row["scale"] == 1), "not measured")

    # Without scores, nothing says whether images beyond the tuned model are better.
    weights: float | None
    if "weights" in scores:
        allowed = {0.0, *(row["scale"] for row in kept)}
        of_weights = {scale: values for scale, values in scores["weights"].items() if scale in allowed}
        weights = best_scale(of_weights) if of_weights else None
        why = "no scale is left" if weights is None else _mean(scores["weights"], weights)
        why += ", among those whose held-out winners are not worse"
    else:
        best = max((row for row in kept if row["scale"] <= 1), key=lambda row: row["margin"], default=None)
        weights = None if best is None else best["scale"]
        why = "the largest margin up to 1 among those whose held-out winners are not worse"

    prediction: float | None = 1.0
    guided_why = "images of other scales were not scored"
    if is_negative:
        prediction, guided_why = None, "the run is a negative model, which is a reference"
    elif "prediction" in scores:
        # If the tuned model's winners got worse, going further would make them worse still.
        limit = 1.0 if tuned in LOST else float("inf")
        of_guidance = {scale: values for scale, values in scores["prediction"].items() if scale <= limit}
        prediction = best_scale(of_guidance) if of_guidance else None
        guided_why = "no scale is left" if prediction is None else _mean(scores["prediction"], prediction)
        if tuned in LOST:
            guided_why += f", up to 1 because the tuned model's held-out winners are {tuned}"

    weights_name, prediction_name = ("none" if scale is None else f"{scale:g}" for scale in (weights, prediction))
    sentence = (
        f"Recommended scale of the weights: {weights_name} ({why}). "
        f"Recommended scale of preference guidance: {prediction_name} ({guided_why})."
    )
    if scorer is not None:
        sentence += (
            f" Scores are those of `{scorer}`." if scores else f" Fewer than {FEWEST_IMAGES} scores do not count."
        )
    return {
        "weights": weights,
        "prediction": prediction,
        "sentence": sentence,
        "scorer": scorer if scores else None,
        "guidance_scale": guidance_scale,
    }


def best_scale(scores: Scores) -> float:
    """Return the smallest scale whose images score less than those of the highest mean by at most the standard error
    of the difference, over images of equal prompts and noise."""
    best = max(scores, key=lambda scale: statistics.fmean(scores[scale]))
    for scale in sorted(scores):
        drops = [high - low for high, low in zip(scores[best], scores[scale], strict=True)]
        if statistics.fmean(drops) <= standard_error(drops):
            return scale
    raise AssertionError("The best scale does not differ from itself.")


def _mean(scores: Scores, scale: float) -> str:
    """Return the mean score at a scale, beside the scores of the tuned model and the base."""
    others = [(at, name) for at, name in ((1.0, "scale 1"), (0.0, "the base")) if at in scores and at != scale]
    beside = ", ".join(f"{statistics.fmean(scores[at]):.4g} at {name}" for at, name in others)
    return f"mean score {statistics.fmean(scores[scale]):.4g}" + (f", against {beside}" if beside else "")


def _percent(row: Mapping[str, Any], name: str) -> str:
    value, stderr = row[name], row.get(f"{name}_stderr")
    if value is None:
        return "-"
    sign = "" if name == "accuracy" else "+"
    return f"{100 * value:{sign}.1f}%" + ("" if stderr is None else f" ± {100 * stderr:.1f}%")
