"""The settings that `guided_front.py` chooses, its tables and plots."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from front_report import Point, deviation, rows_of, spread
from guided_plan import BASE, MORE_MODELS, STEPS, Kind, Plan, Setting, plans

MEASURES = ("score", "diversity", "frechet", "saturation", "predictions")
BASE_KIND, LOOSE_KIND, RECIPE_KIND = Kind(BASE), Kind("loose SDPO"), Kind("recipe")
GUIDED_KIND, LOW_KIND = Kind("recipe", "prediction"), Kind("recipe", "prediction", "low")
CURVE_GUIDANCE = (1.0, 2.0, 3.0, 5.0)
# Scales of the weights at which winners' errors are measured, beside those of the saved weights.
WINNER_SCALES = (1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Measured:
    """A setting on one part: its measurements over seeds."""

    setting: Setting
    seeds: tuple[int, ...]
    values: dict[str, np.ndarray]  # a measurement's name to `(seeds,)`

    def __getattr__(self, name: str) -> np.ndarray:
        if name in MEASURES:
            return self.values[name]
        raise AttributeError(name)


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting that a row was measured with."""
    kind = Kind(**{name: row[name] for name in ("model", "form", "interval", "weights", "steps")})
    return Setting(kind, row["scale"], row["guidance"])


def measured(rows: list[dict[str, Any]], part: str) -> dict[Setting, Measured]:
    """All settings of a part."""
    found: dict[Setting, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("part") == part:
            found.setdefault(setting_of(row), []).append(row)
    return {
        setting: Measured(
            setting,
            tuple(row["seed"] for row in mine),
            {name: np.array([row[name] for row in mine]) for name in MEASURES},
        )
        for setting, mine in ((setting, sorted(mine, key=lambda row: row["seed"])) for setting, mine in found.items())
    }


# ---- The choice, on the selection part -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The settings of a kind, by the mean over seeds."""

    best: Setting  # the highest score
    plain: Setting | None  # the highest without classifier-free guidance
    near: Setting | None  # the highest that is no further from the drawings than loose SDPO at its best


def choices(rows: list[dict[str, Any]]) -> dict[Kind, Choice]:
    """Of every kind with selection rows, over the seeds that all of its settings have. Unplanned settings are left
    out."""
    planned = {setting for plan in plans().values() for setting in plan.settings}
    found = {setting: one for setting, one in measured(rows, "selection").items() if setting in planned}
    kinds = list(dict.fromkeys(setting.kind for setting in found))
    limit = None
    if LOOSE_KIND in kinds:
        limit = _best([one for one in found.values() if one.setting.kind == LOOSE_KIND]).frechet.mean()
    chosen = {}
    for kind in kinds:
        mine = [one for one in found.values() if one.setting.kind == kind]
        plain = [one for one in mine if one.setting.guidance == 1]
        near = [one for one in mine if limit is not None and one.frechet.mean() <= limit]
        chosen[kind] = Choice(*(_best(few).setting if few else None for few in (mine, plain, near)))
    return chosen


def _best(those: list[Measured]) -> Measured:
    scores = [values.mean() for values in on_common_seeds("score", *those) if len(values)]
    if not scores:
        raise SystemExit(f"The settings of {those[0].setting.kind.label} have no seed in common. Measure them all.")
    return those[int(np.argmax(scores))]


def final_settings(plan: Plan, rows: list[dict[str, Any]], with_curves: bool) -> list[Setting]:
    """The settings to measure on the final part: the chosen ones of the plan's kinds, and the points of the curves."""
    planned = {setting.kind for setting in plan.settings}
    chosen = {kind: choice for kind, choice in choices(rows).items() if kind in planned}
    found = [one for choice in chosen.values() for one in (choice.best, choice.plain, choice.near) if one is not None]
    if with_curves:
        found += curve_settings(chosen)
    return list(dict.fromkeys(found))


def curve_settings(chosen: dict[Kind, Choice]) -> list[Setting]:
    """The points of the curves over the scale of classifier-free guidance."""
    lines = [Setting(kind) for kind in (BASE_KIND, LOOSE_KIND, RECIPE_KIND) if kind in chosen]
    lines += [chosen[kind].best for kind in (GUIDED_KIND, LOW_KIND) if kind in chosen]
    return [replace(line, guidance=guidance) for line in lines for guidance in CURVE_GUIDANCE]


def winner_models(plan: Plan) -> list[tuple[str, str, float]]:
    """Models, kinds of weights and scales whose winners' errors are measured."""
    found = [(model, "raw", 1.0) for model in plan.models]
    if plan.is_smallest:
        return found[:1]
    found += [(model, "ema", 1.0) for model in ("SFT", "DPO", "loose SDPO", "recipe") if model in plan.models]
    found += [("recipe", "raw", scale) for scale in WINNER_SCALES if "recipe" in plan.models]
    return found


# ---- Tables, of the final part ---------------------------------------------------------------------------------------


def on_common_seeds(name: str, *those: Measured) -> list[np.ndarray]:
    """A measurement of each on the seeds of all, `(seeds,)`."""
    common = sorted(set.intersection(*(set(one.seeds) for one in those)))
    return [one.values[name][[one.seeds.index(seed) for seed in common]] for one in those]


def ahead(one: Measured, other: Measured | None) -> str:
    """By how much the score is above another's, and on how many seeds."""
    if other is None or one.setting == other.setting:
        return ""
    mine, theirs = on_common_seeds("score", one, other)
    difference = mine - theirs
    if not len(difference):
        return ""
    return f"{difference.mean():+.3f} ({(difference > 0).sum()} of {len(difference)})"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every kind at its best setting, and at the best that is near the drawings where that is another."""
    final, chosen = measured(rows, "final"), choices(rows)
    loose, base = (final.get(chosen[kind].best) if kind in chosen else None for kind in (LOOSE_KIND, BASE_KIND))
    head = ["sampled", "scale", "guidance", "predictions", "seeds", "score", "without guidance (scale)", "diversity"]
    head += ["Frechet", "saturation", "over loose SDPO", "over base"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for kind, choice in chosen.items():
        for name, setting in (("", choice.best), (" (near)", choice.near)):
            if setting not in final or (name and setting == choice.best):
                continue
            one, plain = final[setting], final.get(choice.plain)
            scale = f"{setting.scale:g}" if kind.form not in ("plain", "npo") else ""
            at_one = ""
            if plain is not None and not name:
                at_one = spread(plain.score, "{:.3f}") + (f" ({plain.setting.scale:g})" if scale else "")
            cells = [kind.label + name, scale, f"{setting.guidance:g}", f"{one.predictions.mean():.0f}"]
            cells += [str(len(one.seeds)), spread(one.score, "{:.3f}"), at_one, f"{one.diversity.mean():.3f}"]
            cells += [spread(one.frechet, "{:.3f}"), f"{one.saturation.mean():.2f}"]
            lines.append("| " + " | ".join([*cells, ahead(one, loose), ahead(one, base)]) + " |")
    return "\n".join(lines)


def winner_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: how the winners' errors change, of saved and of scaled weights."""
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["key"].startswith("errors|"):
            found.setdefault((row["model"], row["weights"], row["scale"]), []).append(row)
    points = {name: _point(name, mine) for name, mine in found.items()}
    tuned = points.get(("SFT", "raw", 1.0))
    lines = ["| weights | seeds | winner change | worst noise bin | over SFT | by noise bin |", "|---" * 6 + "|"]
    for (model, weights, scale), point in points.items():
        label = model + (", EMA" if weights == "ema" else "") + (f", times {scale:g}" if scale != 1 else "")
        cells = [label, str(len(point.seeds)), spread(point.winner, "{:+.4f}"), f"{100 * point.worst.mean():+.0f}%"]
        by_bin = ", ".join(f"{100 * value:+.0f}" for value in point.bins.mean(0))
        lines.append("| " + " | ".join([*cells, point.over(tuned), by_bin]) + " |")
    return "\n".join(lines)


def _point(name: tuple[str, str, float], rows: list[dict[str, Any]]) -> Point:
    rows = sorted(rows, key=lambda row: row["seed"])
    bins = np.array([[np.nan if x is None else x for x in row["winner_levels"]] for row in rows])
    winner = np.array([row["winner"] for row in rows])
    return Point(name[0], name[2], tuple(row["seed"] for row in rows), winner, winner, bins)


def goal(rows: list[dict[str, Any]], kind: Kind, setting: Setting) -> str:
    """One line: how near a setting is to the goal."""
    final, chosen = measured(rows, "final"), choices(rows)
    one, loose, base = final[setting], final[chosen[LOOSE_KIND].best], final[chosen[BASE_KIND].best]
    mine, *others = on_common_seeds("score", one, loose, base)
    over_loose, over_base = (mine - theirs for theirs in others)
    near, far = on_common_seeds("frechet", one, loose)
    nearer = near - far
    both = int(((over_loose > 0) & (over_base > 0)).sum())
    holds = [over_loose.mean() >= 0.03, over_base.mean() >= 0.05, both >= 4, nearer.mean() < 0]
    parts = [
        f"{over_loose.mean():+.3f} over loose SDPO (goal +0.03)",
        f"{over_base.mean():+.3f} over the base (goal +0.05)",
        f"above both on {both} of {len(over_loose)} seeds (goal 4)",
        f"Frechet distance {nearer.mean():+.3f} (goal below 0)",
    ]
    name = f"{kind.label}, scale {setting.scale:g}, guidance {setting.guidance:g}"
    return f"{name}: {', '.join(parts)}: {'holds' if all(holds) else 'fails'}"


# ---- Plots -----------------------------------------------------------------------------------------------------------

LINES = {
    BASE_KIND: ("base", "#555555", "o"),
    LOOSE_KIND: ("loose SDPO", "#2471a3", "s"),
    RECIPE_KIND: ("recipe", "#d68910", "^"),
    GUIDED_KIND: ("recipe, guided", "#c0392b", "D"),
    LOW_KIND: ("recipe, guided, low noise only", "#8e44ad", "v"),
}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Score against the scale of classifier-free guidance, and against the distance from the drawings; bands and bars
    are standard deviations over seeds."""
    from matplotlib.figure import Figure

    final, chosen = measured(rows, "final"), choices(rows)
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lines: dict[Kind, list[Measured]] = {}
    for setting in curve_settings(chosen):
        if setting in final:
            lines.setdefault(setting.kind, []).append(final[setting])
    for kind, points in lines.items():
        label, color, marker = LINES[kind]
        if kind.form == "prediction":
            label += f" (scale {points[0].setting.scale:g})"
        x, mean = np.array([p.setting.guidance for p in points]), np.array([p.score.mean() for p in points])
        sd = np.array([deviation(p.score) for p in points])
        left.plot(x, mean, color=color, marker=marker, label=label)
        left.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.15)
        distance = [p.frechet.mean() for p in points]
        bars = {"xerr": [deviation(p.frechet) for p in points], "yerr": sd, "elinewidth": 0.6, "capsize": 2}
        right.errorbar(distance, mean, color=color, marker=marker, **bars)
        right.plot(distance[:1], mean[:1], color=color, marker=marker, markerfacecolor="white", zorder=3)
    others = [kind for kind in chosen if kind not in lines and chosen[kind].best in final and is_marked(kind)]
    markers = itertools.cycle("P*Xv<>hdp8")
    for kind, color in zip(others, itertools.cycle(OTHER_COLORS)):
        one = final[chosen[kind].best]
        style = {"color": color, "linestyle": "", "marker": next(markers), "markersize": 9, "markeredgecolor": "black"}
        right.plot(one.frechet.mean(), one.score.mean(), label=kind.label, markeredgewidth=0.4, **style)
    left.set(xlabel="scale of classifier-free guidance", ylabel="oracle score", xscale="log")
    left.set_xticks(CURVE_GUIDANCE, [f"{at:g}" for at in CURVE_GUIDANCE])
    left.minorticks_off()
    right.set(xlabel="Frechet distance from the drawings (lower is nearer)")
    left.set_title("as guidance grows: mean and deviation over seeds")
    right.set_title("lines: the same, hollow at guidance 1; marks: others at their best")
    for ax in (left, right):
        ax.grid(alpha=0.2)
    handles = [
        *zip(*left.get_legend_handles_labels(), strict=True),
        *zip(*right.get_legend_handles_labels(), strict=True),
    ]
    figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)


def is_marked(kind: Kind) -> bool:
    """Whether the plot has a mark for a kind: not for DPO, for what changes little, or for other trainings."""
    if kind.model in ("DPO", *MORE_MODELS):
        return False
    return kind.steps == STEPS and (kind.weights == "raw" or kind.model == LOOSE_KIND.model)


OTHER_COLORS = ("#1e8449", "#ff66aa", "#17a589", "#7f8c8d", "#f1c40f", "#e67e22", "#5dade2", "#f5b7b1", "#239b56")


def plot_grid(columns: list[tuple[str, np.ndarray, np.ndarray]], prompts: list[str], file: Path) -> None:
    """Images of equal noise: a row for each prompt, a column for each `(title, images, scores)`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.35 * len(columns) + 1.4, 1.5 * len(prompts) + 0.7), layout="constrained")
    axes = figure.subplots(len(prompts), len(columns), squeeze=False)
    for column, (title, images, scores) in enumerate(columns):
        axes[0][column].set_title(title, fontsize=10)
        for row, image in enumerate(images):
            ax = axes[row][column]
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(f"{scores[row]:.2f}", fontsize=8)
            if column == 0:
                ax.set_ylabel(prompts[row].replace(" on ", "\non "), fontsize=8, rotation=0, ha="right", va="center")
    figure.savefig(file, dpi=110)


def report(file: Path, folder: Path) -> None:
    """Tables, what holds of the goal, and a plot."""
    rows = list(rows_of(file).values())
    chosen = choices(rows)
    if not chosen:
        raise SystemExit(f"There are no rows of the selection part in {file}. Measure some first.")
    print(f"{table(rows)}\n\n{winner_table(rows)}\n")
    final = measured(rows, "final")
    for kind, choice in chosen.items():
        for setting in dict.fromkeys((choice.best, choice.near)):
            compared = {choice.best for choice in (chosen.get(LOOSE_KIND), chosen.get(BASE_KIND)) if choice}
            if setting in final and len(compared & final.keys()) == 2 and setting not in compared:
                print(goal(rows, kind, setting))
    folder.mkdir(parents=True, exist_ok=True)
    plot(rows, folder / "guidance_front.png")
