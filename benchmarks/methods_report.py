"""The tables of docs/method_comparison.md, what they say by a rule of their own, and the page's plot, from the rows of
`methods.py`.

Each is between two comments of the page; text outside them is left as it is.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from front_report import rows_of
from methods_plan import ALL_NAMES, BASE, MAIN, METHODS, NO_SAFEGUARD, OWN_NOISE, SAFEGUARD, SAFEGUARDS, SFT, Run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "methods.jsonl"
PAGE = ROOT / "docs" / "method_comparison.md"
PICTURE = ROOT / "docs" / "images" / "method_comparison.png"
MEASURES = {
    "plain": lambda row: row["plain"]["score"],
    "score": lambda row: row["best"]["score"],
    "scale": lambda row: row["best"]["scale"],
    "frechet": lambda row: row["best"]["frechet"],
    "diversity": lambda row: row["best"]["diversity"],
    "winner": lambda row: row["errors"]["winner"],
}
OWN_WINNER = "winner at own noise"  # a measure of rows that train at noise by inversion
ERRORS_OF_A_DIFFERENCE = 2  # standard errors within which two rows are level
AHEAD, LEVEL, BEHIND = "ahead", "level", "behind"
SHOWN = {NO_SAFEGUARD: "", SAFEGUARD: "yes"}


@dataclass(frozen=True)
class Measured:
    """A method with or without the safeguard: its measurements over seeds."""

    method: str
    safeguard: str
    seeds: tuple[int, ...]
    values: dict[str, np.ndarray]  # a key of `MEASURES` to `(seeds,)`

    def over(self, other: Measured, name: str = "score") -> np.ndarray:
        """Differences on the seeds of both, which have equal pairs and noise."""
        common = [seed for seed in self.seeds if seed in other.seeds]
        mine, theirs = (one.values[name][[one.seeds.index(seed) for seed in common]] for one in (self, other))
        return mine - theirs


class Comparison:
    """All rows of a file, and the rule that says what helps.

    A row is ahead of another or behind it if the mean difference of their scores over seeds is more than two standard
    errors from 0, else level. The standard error is that of the difference, or, where that is larger, the median over
    all rows: the deviation of three seeds is uncertain itself.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]):
        rows = list(rows)
        self.costs = {(row["method"], row["safeguard"]): row["ratios"] for row in rows if is_cost(row)}
        self.measured: dict[tuple[str, str], Measured] = {}
        for name in ALL_NAMES:
            for safeguard in SAFEGUARDS:
                mine = [row for row in rows if not is_cost(row) and kind_of(row) == (name, safeguard)]
                if mine:
                    mine.sort(key=lambda row: row["seed"])
                    values = {measure: np.array([read(row) for row in mine]) for measure, read in MEASURES.items()}
                    if all(OWN_NOISE in row for row in mine):
                        values[OWN_WINNER] = np.array([relative_change(row[OWN_NOISE]) for row in mine])
                    seeds = tuple(row["seed"] for row in mine)
                    self.measured[name, safeguard] = Measured(name, safeguard, seeds, values)
        self.main = self.measured.get((MAIN, SAFEGUARD))
        self.base = self.measured.get((BASE, NO_SAFEGUARD))

    def verdict(self, one: Measured, other: Measured | None) -> str:
        """Of the scores of a row and another one; empty with fewer than two seeds, or for a row and itself."""
        if other is None or one is other:
            return ""
        difference = one.over(other)
        if len(difference) < 2:
            return ""
        allowed = ERRORS_OF_A_DIFFERENCE * max(standard_error(difference), self._typical_error(other))
        return AHEAD if difference.mean() > allowed else BEHIND if difference.mean() < -allowed else LEVEL

    def _typical_error(self, other: Measured) -> float:
        """The median standard error of the differences of all rows to one."""
        differences = [one.over(other) for one in self.measured.values() if one is not other]
        return statistics.median(standard_error(found) for found in differences if len(found) > 1)

    def table(self) -> str:
        """Markdown: every row."""
        head = ["method", "safeguard", "seeds", "score, no guidance", "score, best guidance", "over safeguarded DPO"]
        head += ["verdict", "winner change", "Frechet", "diversity", "time of a step"]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for (name, safeguard), one in self.measured.items():
            values = one.values
            scales = ", ".join(f"{scale:g}" for scale in sorted(set(values["scale"])))
            difference = one.over(self.main) if self.main and one is not self.main else np.empty(0)
            cells = [name, SHOWN[safeguard], str(len(one.seeds)), with_error(values["plain"], "{:.3f}")]
            cells += [f"{with_error(values['score'], '{:.3f}')} ({scales})", with_error(difference, "{:+.3f}")]
            cells += [self.verdict(one, self.main), with_error(values["winner"], "{:+.4f}")]
            cells += [with_error(values["frechet"], "{:.2f}"), f"{values['diversity'].mean():.3f}"]
            cells.append(self.cost((name, safeguard)))
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def cost(self, kind: tuple[str, str]) -> str:
        """The median over rounds of a step's time, relative to that of `sigmoid` without the safeguard."""
        return f"{statistics.median(self.costs[kind]):.2f}" if kind in self.costs else ""

    def statements(self) -> str:
        """What the rule says of all rows, one line for each answer."""
        compared = [one for one in self.measured.values() if one.method != BASE and one is not self.main]
        if not any(self.verdict(one, self.main) for one in compared):
            return "- **Nothing is judged yet**: every row has fewer than two seeds."
        helpful = {one.method for one in compared if self.verdict(one, self.main) == AHEAD}
        judged = {one.method for one in compared if self.verdict(one, self.main)} - {MAIN}
        lines = []
        for word, phrase in {AHEAD: "Ahead of", LEVEL: "Level with", BEHIND: "Behind"}.items():
            found = [one for one in compared if self.verdict(one, self.main) == word]
            lines.append(f"- **{phrase}** safeguarded DPO: {grouped(found)}")
        names = sorted(judged - helpful, key=ALL_NAMES.index)
        lines.append(f"- **Do not help here**, as neither of their rows is ahead: {listed(names)}")
        if self.base is not None:
            rows = [one for one in self.measured.values() if self.verdict(one, self.base) in (LEVEL, BEHIND)]
            lines.append(f"- **No better than the base model** at its own best guidance: {grouped(rows)}")
        unjudged = [one for one in compared if not self.verdict(one, self.main)]
        if unjudged:
            lines.append(f"- **Not judged**, with fewer than two seeds: {grouped(unjudged)}")
        return "\n".join([*lines, *self.of_the_safeguard(), *self.of_inversion()])

    def of_inversion(self) -> list[str]:
        """What the winners' error does at the noise of training, where that is not drawn."""
        rows = [one for one in self.measured.values() if OWN_WINNER in one.values]
        if not rows:
            return []
        words = {SAFEGUARD: "with the safeguard", NO_SAFEGUARD: "without it"}
        said = [f"{one.method} {words[one.safeguard]} {100 * one.values[OWN_WINNER].mean():+.0f} %" for one in rows]
        return [
            "- **Noise by inversion**: in the last tenth of training, at the noise that the policy's own inversion "
            f"finds, the winners' error changes against the base model by: {', '.join(said)}. *Winner change* is at "
            "drawn noise."
        ]

    def of_the_safeguard(self) -> list[str]:
        """What it changes, method by method."""
        both = [
            (self.measured[name, SAFEGUARD], self.measured[name, NO_SAFEGUARD])
            for name in ALL_NAMES
            if {(name, SAFEGUARD), (name, NO_SAFEGUARD)} <= self.measured.keys()
        ]
        both = [pair for pair in both if self.verdict(*pair)]
        if not both:
            return []
        found = [self.verdict(*pair) for pair in both]
        lower = sum(one.over(other, "winner").mean() < 0 for one, other in both)
        nearer = sum(one.over(other, "frechet").mean() < 0 for one, other in both)
        worse = [one.method for (one, _), verdict in zip(both, found, strict=True) if verdict == BEHIND]
        return [
            f"- **The safeguard** raises the score of {found.count(AHEAD)} of {len(both)} methods by this rule, leaves "
            f"{found.count(LEVEL)} level and lowers it for {listed(worse)} The winners' error is lower with it for "
            f"{lower} of {len(both)}, and the images are nearer to the drawings for {nearer}."
        ]


# ---- Rows and words ------------------------------------------------------------------------------------------------


def is_cost(row: dict[str, Any]) -> bool:
    return "ratios" in row


def kind_of(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], row["safeguard"]


def is_planned(row: dict[str, Any]) -> bool:
    """Whether a row is of a method as the plan has it."""
    if row["method"] not in ALL_NAMES or is_cost(row):
        return row["method"] in ALL_NAMES
    return row["settings"] == Run(row["method"], row["safeguard"], row["seed"]).settings()


def relative_change(own: dict[str, float]) -> float:
    """Of the winners' error, as a share of that of the base model at the same noise."""
    return own["winner_change"] / (own["winner"] - own["winner_change"])


def grouped(found: list[Measured]) -> str:
    """Methods by the safeguard, as the end of a sentence."""
    words = {SAFEGUARD: "with the safeguard ", NO_SAFEGUARD: "without it "}
    named = {safeguard: [one.method for one in found if one.safeguard == safeguard] for safeguard in words}
    parts = [words[safeguard] + ", ".join(names) for safeguard, names in named.items() if names]
    return "; ".join(parts or ["none"]) + "."


def listed(names: list[str]) -> str:
    """As the end of a sentence."""
    return ", ".join(names or ["none"]) + "."


def standard_error(values: np.ndarray) -> float:
    """Of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def with_error(values: np.ndarray, form: str) -> str:
    """Mean, and for several seeds its standard error."""
    if not len(values):
        return ""
    mean = form.format(values.mean())
    return mean if len(values) == 1 else f"{mean} ± {form.format(standard_error(values)).lstrip('+')}"


def settings_table() -> str:
    """Markdown: the settings of every method."""
    lines = ["| method | settings |", "|---|---|"]
    for name, method in METHODS.items():
        words = ", ".join(f"{key}: {in_yaml(value)}" for key, value in method.all_settings().items())
        lines.append(f"| {name} | `{words}` |")
    return "\n".join(lines)


def in_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(in_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def rewritten(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with every block as it would be made from these rows."""
    comparison = Comparison(rows)
    blocks = {"methods": comparison.table(), "verdicts": comparison.statements(), "settings": settings_table()}
    for name, text in blocks.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, partial(_filled, text=text), page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"The page must have the block {name!r} once, and has it {count} times.")
    return page


def _filled(found: re.Match[str], text: str) -> str:
    return f"{found[1]}\n{text}\n\n{found[2]}"


# ---- Plot ----------------------------------------------------------------------------------------------------------

MARKERS = {NO_SAFEGUARD: "o", SAFEGUARD: "D"}
TITLES = {NO_SAFEGUARD: "without the safeguard", SAFEGUARD: "with the safeguard (parameter space, mu 0.8)"}
AXES = {  # a measure to its label
    "score": "oracle score at the best classifier-free guidance",
    "winner": "change of the winners' error on held-out pairs",
}


def plot(comparison: Comparison, file: Path) -> None:
    """A line for each method, the best score above: its scores, and beside them the changes of the winners' error."""
    from matplotlib.figure import Figure

    best: dict[str, float] = {}
    for one in comparison.measured.values():
        best[one.method] = max(best.get(one.method, 0.0), one.values["score"].mean())
    names = sorted(best, key=best.__getitem__)
    figure = Figure(figsize=(12, 1.5 + 0.28 * len(names)), layout="constrained")
    for ax, (measure, label) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        for one in comparison.measured.values():
            draw_point(ax, one, one.values[measure], names.index(one.method))
        ax.set(xlabel=label)
        ax.grid(alpha=0.25)
    scores, changes = figure.axes
    for row, name, style in ((comparison.main, "safeguarded DPO", "--"), (comparison.base, "base model", ":")):
        if row is not None:
            scores.axvline(row.values["score"].mean(), color="#555555", linestyle=style, linewidth=1, label=name)
    changes.set_xscale("symlog", linthresh=0.001)
    changes.set_xlim(left=-0.001)
    changes.axvline(0, color="black", linewidth=0.6)
    scores.set_yticks(range(len(names)), names)
    for text, name in zip(scores.get_yticklabels(), names, strict=True):
        text.set_color(color_of(name))
    for safeguard, title in TITLES.items():
        filled = "none" if safeguard == NO_SAFEGUARD else "#333333"
        scores.plot([], [], MARKERS[safeguard], color="#333333", markerfacecolor=filled, label=title)
    figure.legend(*scores.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def draw_point(ax: Any, one: Measured, values: np.ndarray, line: int) -> None:
    """Mean and standard error; hollow without the safeguard."""
    color = color_of(one.method)
    filled = "white" if one.safeguard == NO_SAFEGUARD else color
    style = {"marker": MARKERS[one.safeguard], "color": color, "markerfacecolor": filled, "ecolor": "#999999"}
    ax.errorbar(values.mean(), line, xerr=errors_of(values), markersize=6, elinewidth=0.9, **style)


def color_of(method: str) -> str:
    """Red: DPO and what it is compared with; blue: other losses; green: what is added to DPO."""
    if method in (BASE, SFT, MAIN):
        return "#c0392b"
    return "#2471a3" if METHODS[method].settings.keys() <= {"calibrated_scores"} else "#1e8449"


def errors_of(values: np.ndarray) -> float:
    return standard_error(values) if len(values) > 1 else 0.0


def report(file: Path, page: Path, picture: Path) -> None:
    """Print the table and write it into the page, and plot."""
    rows = list(rows_of(file).values())
    left_out = [row["key"] for row in rows if not is_planned(row)]
    if left_out:
        print(f"Left out, as the plan does not make them: {', '.join(left_out)}.")
    rows = [row for row in rows if is_planned(row)]
    protocols = [row["how"] for row in rows if not is_cost(row)]
    if not protocols:
        raise SystemExit(f"There are no runs in {file}. Make some with the command `run`.")
    if any(how != protocols[0] for how in protocols):
        raise SystemExit(f"All rows must be measured alike, and those of {file} are not. Make them anew.")
    comparison = Comparison(rows)
    print(f"{comparison.table()}\n\n{comparison.statements()}")
    page.write_text(rewritten(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    plot(comparison, picture)
