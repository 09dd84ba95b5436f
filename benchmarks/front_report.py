"""Tables and plots of the rows of `front.py`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from front_plan import EMA_DECAY, FOURFOLD, FRONT, HOW, NUM_NOISE_BINS, OF_ANOTHER_LOSS, TWICE, plans

# The strength of each rule in the plot by noise bin.
SHOWN = {
    "SFT": 0.0,
    "output": 0.6,
    "output, range": 0.45,
    "output, decay": 0.8,
    "parameter, decay": 0.8,
    "parameter, decay, longer": 0.9,
}
COLORS = {
    "SFT": "#555555",
    "output": "#2471a3",
    "output, range": "#1e8449",
    "parameter": "#c0392b",
    "budget": "#8e44ad",
    "budget, range": "#d68910",
}


@dataclass(frozen=True)
class Point:
    """Runs of one rule and strength over seeds, measured on one part with one kind of weights."""

    rule: str
    strength: float
    seeds: tuple[int, ...]
    oracle: np.ndarray
    winner: np.ndarray
    bins: np.ndarray  # (seeds, noise bins), relative

    @property
    def worst(self) -> np.ndarray:
        """Largest relative change over the noise bins, for each seed."""
        return np.nanmax(self.bins, axis=1)

    def over(self, other: "Point | None") -> str:
        """The winners' change minus that of another rule, in percentage points of the base model's error, in the noise
        bin where it is largest; means over the seeds of both."""
        common = set(self.seeds) & set(other.seeds) if other else set()
        if not common:
            return ""
        mine, theirs = (point.bins[[seed in common for seed in point.seeds]].mean(0) for point in (self, other))
        return f"{100 * np.nanmax(mine - theirs):+.0f}"


def points(rows: list[dict[str, Any]], part: str, weights: str, pairs: str, push: str) -> list[Point]:
    """All rules and strengths under one setting, in the order of the rules."""
    selected = [row for row in rows if (row["pairs"], row["push"]) == (pairs, push)]
    found = []
    for rule, strength in dict.fromkeys((row["rule"], row["strength"]) for row in selected):
        runs = [row for row in selected if (row["rule"], row["strength"]) == (rule, strength)]
        mine, seeds = [row["measured"][part][weights] for row in runs], tuple(row["seed"] for row in runs)
        bins = np.array([[np.nan if x is None else x for x in one["winner_levels"]] for one in mine])
        oracle, winner = (np.array([one[name] for one in mine]) for name in ("oracle", "winner"))
        found.append(Point(rule, strength, seeds, oracle, winner, bins))
    return sorted(found, key=lambda point: (point.rule, point.strength))


def tables(rows: list[dict[str, Any]], part: str, pairs: str, push: str) -> str:
    """Markdown: reward, winner change, the largest relative change over the noise bins, and its largest excess over
    supervised tuning: over plain supervised tuning, and over that with the same steps and schedule. For raw and
    averaged weights."""
    head = (
        "| rule | strength | seeds | oracle | winner change | worst noise bin | over SFT | over SFT, same schedule "
        "| oracle, EMA | winner change, EMA | worst noise bin, EMA |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    planned_rules, tried = [head], [head]
    found = {weights: points(rows, part, weights, pairs, push) for weights in ("raw", "ema")}
    tuned = {point.rule: point for point in found["raw"] if point.rule.split(", ")[0] == "SFT"}
    for raw, ema in zip(*found.values(), strict=True):
        schedule = [name for name in raw.rule.split(", ") if name in ("decay", "long", "longer")]
        same_schedule = ", ".join(["SFT", *schedule])
        cells = [raw.rule, f"{raw.strength:g}" if raw.strength else "", str(len(raw.seeds)), *measures(raw)]
        cells += [raw.over(tuned.get("SFT")), raw.over(tuned.get(same_schedule)), *measures(ema)]
        table = planned_rules if raw.rule in {*FRONT, *TWICE, *FOURFOLD, *OF_ANOTHER_LOSS} else tried
        table.append("| " + " | ".join(cells) + " |")
    title = f"{pairs.replace('_', '-')} pairs, {push}, {part} part"
    shown = ((title, planned_rules), (f"{title}, rules not in the package", tried))
    return "\n\n".join(f"{name}\n\n" + "\n".join(lines) for name, lines in shown if len(lines) > 1)


def measures(point: Point) -> list[str]:
    worst = f"{100 * point.worst.mean():+.0f}%"
    return [spread(point.oracle, "{:.3f}"), spread(point.winner, "{:+.4f}"), worst]


def deviation(values: np.ndarray) -> float:
    """Standard deviation over seeds; 0 for one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def spread(values: np.ndarray, form: str) -> str:
    """Mean, and for several seeds the standard deviation."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(values.mean())} ± {form.format(values.std(ddof=1)).lstrip('+')}"


def style_of(rule: str) -> dict[str, str]:
    """Colour by the rule, line style by the schedule, marker by the number of steps."""
    first, *more = rule.split(", ")
    lasting = [name for name in more if name in ("long", "longer")]
    kind = ", ".join([first, *(name for name in more if name not in ("decay", *lasting))])
    style = ":" if lasting else "--" if "decay" in more else "-"
    marker = {"long": "s", "longer": "^"}[lasting[0]] if lasting else "o"
    return {"color": COLORS[kind], "linestyle": style, "marker": marker}


def plot_front(rows: list[dict[str, Any]], part: str, file: Path) -> None:
    """Reward against the winners' change: the mean, and the worst noise bin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9.6), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for row, weights in enumerate(("raw", "ema")):
        # Without plain DPO, which would take nine tenths of every axis, and rules of one seed: the table has them.
        shown = [point for point in points(rows, part, weights, "off_policy", "stress") if is_plotted(point.rule)]
        for column, change in enumerate(("winner", "worst")):
            ax = axes[row][column]
            for rule in dict.fromkeys(point.rule for point in shown):
                mine = [point for point in shown if point.rule == rule]
                x, y = ([getattr(p, name).mean() for p in mine] for name in (change, "oracle"))
                spreads = [[deviation(getattr(p, name)) for p in mine] for name in (change, "oracle")]
                style = style_of(rule) | {"capsize": 2, "alpha": 0.8, "label": rule}
                ax.errorbar(x, y, xerr=spreads[0], yerr=spreads[1], **style)
                for point, at in zip(mine, zip(x, y, strict=True), strict=True):
                    if point.strength:
                        ax.annotate(f"{point.strength:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=7)
            ax.set_xscale("symlog", linthresh=0.003 if change == "winner" else 0.1)
            ax.set_xlabel("winner change, mean" if change == "winner" else "winner change, worst noise bin, relative")
            ax.set_title("raw weights" if weights == "raw" else f"averaged weights (EMA {EMA_DECAY})")
            ax.axvline(0, color="black", linewidth=0.6)
            ax.grid(alpha=0.2)
        axes[row][0].set_ylabel("oracle score")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)


def is_plotted(rule: str) -> bool:
    return rule != "DPO" and rule in {*FRONT, *TWICE, *FOURFOLD}


def plot_noise_bins(rows: list[dict[str, Any]], part: str, strengths: dict[str, float], file: Path) -> None:
    """Relative winner change by noise bin, one strength of each rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for ax, weights in zip(figure.subplots(1, 2, sharey=True), ("raw", "ema"), strict=True):
        shown = points(rows, part, weights, "off_policy", "stress")
        middles = (np.arange(NUM_NOISE_BINS) + 0.5) / NUM_NOISE_BINS
        for point in shown:
            if strengths.get(point.rule) != point.strength:
                continue
            label = f"{point.rule} {point.strength:g}" if point.strength else point.rule
            mean, sd = 100 * point.bins.mean(0), 100 * np.apply_along_axis(deviation, 0, point.bins)
            ax.plot(middles, mean, label=label, **style_of(point.rule))
            ax.fill_between(middles, mean - sd, mean + sd, color=style_of(point.rule)["color"], alpha=0.12)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(xlabel="noise level", title="raw weights" if weights == "raw" else "averaged weights")
        ax.set_yscale("symlog", linthresh=10)
        ax.grid(alpha=0.2)
    figure.axes[0].set_ylabel("winner change, % of the base model's error")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)


def rows_of(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file, by key; an incomplete line is left out, and its run made again."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["key"]] = row
    return rows


def report(file: Path, part: str, folder: Path) -> None:
    """Tables of every setting, and two plots."""
    rows = list(rows_of(file).values())
    if not rows:
        raise SystemExit(f"There are no runs in {file}. Make some with the command `run`.")
    other = [row["key"] for row in rows if row.get("how") != HOW]
    if other:
        raise SystemExit(
            f"All rows must be measured alike; {len(other)} in {file} were not: {other[0]}. Make them anew."
        )
    runs = {run.key: run for planned_runs in plans().values() for run in planned_runs}
    unplanned = [row["key"] for row in rows if not (row["key"] in runs and runs[row["key"]].is_made(row))]
    if unplanned:
        print(f"Left out, as no plan makes them: {', '.join(unplanned)}.")
        rows = [row for row in rows if row["key"] not in unplanned]
    folder.mkdir(parents=True, exist_ok=True)
    for pairs, push in dict.fromkeys((row["pairs"], row["push"]) for row in rows):
        print(f"\n{tables(rows, part, pairs, push)}", flush=True)
    plot_front(rows, part, folder / "front.png")
    plot_noise_bins(rows, part, SHOWN, folder / "front_levels.png")
