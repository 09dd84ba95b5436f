"""Write the tables of the documentation from the committed results.

Each table of `TABLES` is a function from results to Markdown. On a page, it stands between two markers:

    <!-- table: NAME -->
    <!-- end of table -->

Scores are those at each model's best scale of classifier-free guidance, which is chosen on other prompts. Errors are in
per cent of the error before training. ± is the standard error over seeds. A difference between two rows is the mean of
the differences of their seeds, with its 95 % interval by Student's t-distribution; a row is "higher" or "lower" than
another only if this interval does not contain 0, and only with three seeds or more.

    python benchmarks/studies/tables.py              # write all tables
    python benchmarks/studies/tables.py losses       # print one
"""

import argparse
import functools
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_diffusion_sdpo.utils.statistics import mean_interval, standard_error

ROOT = Path(__file__).parents[2]
STUDIES = Path("benchmarks/studies/results")
BENCHMARKS = Path("benchmarks/results")
PAGES = ("README.md", "docs/*.md", "benchmarks/**/*.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
FEWEST_SEEDS = 3  # with fewer, no verdict
BASE = "base"

Row = dict[str, Any]
Rows = dict[str, list[Row]]  # the finished rows of a plan, by name: one for each seed


# ---- Numbers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A row minus another, paired over seeds."""

    values: tuple[float, ...]  # one for each seed that both rows have

    @property
    def verdict(self) -> str:
        """Return "higher", "lower" or "no difference shown", and nothing with fewer than three seeds."""
        if len(self.values) < FEWEST_SEEDS:
            return ""
        low, high = mean_interval(np.array(self.values))
        if low > 0:
            return "higher"
        return "lower" if high < 0 else "no difference shown"

    def __str__(self) -> str:
        if not self.values:
            return ""
        mean = f"{statistics.mean(self.values):+.3f}"
        if len(self.values) < FEWEST_SEEDS:
            return mean
        low, high = mean_interval(np.array(self.values))
        return f"{mean} ({low:+.3f} to {high:+.3f}), {self.verdict}"


def score(row: Row) -> float:
    return row["best"]["score"]


def winners(row: Row) -> float:
    """Return the change of the error on held-out winners of the row's own kind, as a share of the error before."""
    return row["own_errors"]["winner_change_relative"]


def worst_bin(row: Row) -> float:
    errors = row["own_errors"]
    return max(value for name, value in errors.items() if name.startswith("winner_change_relative@"))


def difference(rows: list[Row], others: list[Row], value: Callable[[Row], float] = score) -> Difference:
    """Return the differences of a value over the seeds that both have."""
    by_seed = {row["seed"]: value(row) for row in others}
    return Difference(tuple(value(row) - by_seed[row["seed"]] for row in rows if row["seed"] in by_seed))


def number(rows: list[Row], value: Callable[[Row], float] = score) -> str:
    """Return mean and standard error of a score, such as `0.534 ± 0.007`."""
    values = [value(row) for row in rows]
    if not values:
        return ""
    error = f" ± {standard_error(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def share(rows: list[Row], value: Callable[[Row], float] = winners) -> str:
    """Return mean and standard error in per cent, such as `+12 % ± 3`."""
    values = [100 * value(row) for row in rows]
    if not values:
        return ""
    if not any(values):
        return "0"  # the model before training
    mean = statistics.mean(values)
    digits = 1 if abs(mean) < 10 else 0
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:+.{digits}f} %{error}"


def constants_at(points: Iterable[tuple[float, float]], error: float) -> float | None:
    """Return the score that constants reach at a winners' error, or `None` outside of the errors that they have.

    Between two neighbouring constants, the score is linear in the logarithm of the error after training, `1 + error`:
    the errors differ by orders of magnitude.

    Args:
        points (`Iterable[tuple[float, float]]`): Winners' error, as a share of the error before, and score of each
            constant.
        error (`float`): The winners' error at which to compare.
    """
    ordered = sorted(points)
    errors = [math.log1p(at) for at, _ in ordered]
    if not ordered or not errors[0] <= math.log1p(error) <= errors[-1]:
        return None
    return float(np.interp(math.log1p(error), errors, [reached for _, reached in ordered]))


def over_constants(rows: list[Row], constants: list[list[Row]]) -> Difference:
    """Return, for each seed, a row's score minus that of constants at the same winners' error."""
    found = []
    for row in rows:
        points = [(winners(one), score(one)) for arm in constants for one in arm if one["seed"] == row["seed"]]
        reached = constants_at(points, winners(row)) if len(points) == len(constants) else None
        if reached is not None:
            found.append(score(row) - reached)
    return Difference(tuple(found))


# ---- Layout ---------------------------------------------------------------------------------------------------------


def markdown(columns: list[str], lines: list[list[str]], below: str = "") -> str:
    """Return a table with a line below it, or nothing without rows."""
    if not lines:
        return ""
    rows = [columns, ["---"] * len(columns), *lines]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n*{below}.*" if below else table


def seeds_of(made: Iterable[Sized]) -> int:
    """Return the number of seeds that most rows have."""
    counts = [len(rows) for rows in made]
    return statistics.mode(sorted(counts, reverse=True)) if counts else 0


def labelled(label: str, rows: list[Row], usual: int) -> str:
    """Return a row's label, with its number of seeds if this is not the usual one."""
    return label if len(rows) == usual else f"{label} ({count(len(rows))})"


def count(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds != 1 else ''}"


def note(seeds: int, *more: str) -> str:
    """Return the line below a table: how many seeds it has, and what else belongs to its numbers."""
    return ". ".join([f"{count(seeds)} a row, unless the row says otherwise", *more])


# ---- Views: the safeguard -------------------------------------------------------------------------------------------

RULES = {  # row of the plans `rules`, `gentle` and `transformer` -> label
    "DPO": "DPO",
    "output 0.6": "output space, mu 0.6",
    "output 0.8": "output space, mu 0.8",
    "parameter 0.6": "parameter space, mu 0.6",
    "parameter 0.8": "parameter space, mu 0.8",
}
SAFEGUARDS = {name: label for name, label in RULES.items() if name != "DPO"}
CONSTANTS = {f"constant {share}": f"constant {share}" for share in (0.1, 0.3, 0.5, 0.7, 0.9)}
KINDS = {
    "off_policy": "off-policy",
    "on_policy": "on-policy",
    "blurred": "blurred",
    "partial": "partial",
    "local": "local",
}
VARIANTS = {
    "SFT": "supervised tuning",
    "DPO, constant rate": "DPO, constant rate",
    "output 0.6, constant rate": "output space, mu 0.6, constant rate",
    "parameter 0.8, constant rate": "parameter space, mu 0.8, constant rate",
    "parameter 0.8, linear decay": "parameter space, mu 0.8, linear decay",
    "parameter 0.8, error anchor": "parameter space, mu 0.8, anchor `error`",
    "output 0.6, pair": "output space, mu 0.6, granularity `pair`",
    "output 0.6, weighted": "output space, mu 0.6, granularity `weighted`",
    "output 0.6, noise bin": "output space, mu 0.6, granularity `noise_bin`",
    "budget 0.05": "budget of 5 %, no safeguard",
    "output 0.6, losers at high noise": "output space, mu 0.6, losers at high noise only",
    "SFT, LoRA": "supervised tuning, LoRA",
    "DPO, LoRA": "DPO, LoRA",
    "output 0.6, LoRA": "output space, mu 0.6, LoRA",
    "parameter 0.8, LoRA": "parameter space, mu 0.8, LoRA",
}


def arms(rows: Rows, kind: str, names: dict[str, str]) -> dict[str, list[Row]]:
    """Return the finished rows of a kind of pairs by their labels."""
    return {label: rows[f"{kind}, {name}"] for name, label in names.items() if rows.get(f"{kind}, {name}")}


def plain(row: Row) -> float:
    return row["plain"]["score"]


def scored(made: dict[str, list[Row]], base: list[Row]) -> str:
    """Return a table of rows, each compared with the base."""
    usual = seeds_of(made.values())
    columns = ["Training", "Score", "Without guidance", "Score over the base", "Winners' error", "Worst bin"]
    lines = []
    for label, rows in {BASE: base, **made}.items() if made else ():
        compared = "" if rows is base else str(difference(rows, base))
        cells = [number(rows), number(rows, plain), compared, share(rows), share(rows, worst_bin)]
        lines.append([labelled(label, rows, usual), *cells])
    return markdown(columns, lines, note(usual))


def safeguard(rules: Rows, variants: Rows) -> str:
    """Everything on off-policy pairs: rules, constants, and what else changes how strictly winners are kept."""
    base = rules.get(BASE, [])
    made = arms(rules, "off_policy", {**RULES, **CONSTANTS})
    return scored(made | {label: variants[name] for name, label in VARIANTS.items() if variants.get(name)}, base)


def safeguard_short(rules: Rows, variants: Rows) -> str:
    """The rows of `safeguard` that a first reader needs."""
    names = ("SFT", "output 0.6, constant rate", "parameter 0.8, constant rate")
    supervised = {VARIANTS["SFT"]: variants["SFT"]} if variants.get("SFT") else {}
    made = supervised | arms(rules, "off_policy", {**RULES, "constant 0.3": "constant 0.3"})
    made |= {VARIANTS[name]: variants[name] for name in names[1:] if variants.get(name)}
    return scored(made, rules.get(BASE, []))


def constants(rules: Rows, gentle: Rows) -> str:
    """Each rule's score over constants in the place of lambda, at the winners' error of the rule."""
    made = {}
    for plan, settings in ((rules, "harsh"), (gentle, "gentle")):
        for kind, name in KINDS.items():
            # DPO is the constant 1.
            fixed = list(arms(plan, kind, {"DPO": "1", **CONSTANTS}).values())
            if len(fixed) == len(CONSTANTS) + 1:
                found = arms(plan, kind, SAFEGUARDS)
                made[settings, name] = [over_constants(found.get(label, []), fixed) for label in SAFEGUARDS.values()]
    return compared(
        made,
        ["Settings", "Pairs", *SAFEGUARDS.values()],
        "Seeds in which no constant has an error as small are left out",
    )


def recipe(rules: Rows, gentle: Rows) -> str:
    """The recipe, parameter space with mu 0.8, minus output space with mu 0.6."""
    made = {}
    for plan, settings in ((rules, "harsh"), (gentle, "gentle")):
        for kind, name in KINDS.items():
            ours, theirs = (plan.get(f"{kind}, {rule}", []) for rule in ("parameter 0.8", "output 0.6"))
            if ours and theirs:
                made[settings, name] = [difference(ours, theirs), difference(ours, theirs, plain)]
    return compared(made, ["Settings", "Pairs", "Score", "Score without guidance"])


def compared(made: Mapping[tuple[str, ...], list[Difference]], columns: list[str], *notes: str) -> str:
    """Return a table of differences, with the words in front of them."""
    usual = seeds_of(found.values for row in made.values() for found in row)
    lines = []
    for words, row in made.items():
        few = [f" ({count(len(found.values))})" if len(found.values) not in (0, usual) else "" for found in row]
        cells = [f"{found}{which}".replace(", no difference shown", "") for found, which in zip(row, few, strict=True)]
        lines.append([*words, *cells])
    return markdown(columns, lines, note(usual, *notes, "No word behind an interval: no difference shown"))


def kinds(rules: Rows) -> str:
    """All rules and constants on all kinds of pairs."""
    usual = seeds_of(rules.values())
    columns = ["Pairs", "Training", "Score", "Without guidance", "Score over the base", "Winners' error", "Accuracy"]
    base = rules.get(BASE, [])
    lines = []
    for kind, name in KINDS.items():
        for label, rows in arms(rules, kind, {**RULES, **CONSTANTS}).items():
            cells = [number(rows), number(rows, plain), str(difference(rows, base)), share(rows), accuracy(rows)]
            lines.append([name, labelled(label, rows, usual), *cells])
    without = f"The base scores {number(base)}, and {number(base, plain)} without guidance"
    return markdown(columns, lines, note(usual, without))


def one_setting(rules: Rows) -> str:
    """What one rule or constant costs and gains on each kind of pairs."""
    usual = seeds_of(rules.values())
    lines = []
    for name, label in {**RULES, **CONSTANTS}.items():
        made = [rules.get(f"{kind}, {name}", []) for kind in KINDS]
        cells = [f"{number(rows).split(' ')[0]}, {share(rows).split(' ±')[0]}" if rows else "" for rows in made]
        errors = [100 * statistics.mean(map(winners, rows)) for rows in made if rows]
        spread = f"{min(errors):+.0f} to {max(errors):+.0f} %" if errors else ""
        lines.append([label, *cells, spread])
    columns = ["Training", *KINDS.values(), "Winners' error over the kinds"]
    return markdown(columns, lines, note(usual, "Each cell has the score and the winners' error"))


def gentle(gentle: Rows) -> str:
    """All rules and constants with gentle settings."""
    return kinds(gentle)


def accuracy(rows: list[Row]) -> str:
    return f"{statistics.mean(row['own_errors']['accuracy'] for row in rows):.2f}"


def on_policy(rules: Rows) -> str:
    """The rules and a constant on on-policy pairs."""
    made = arms(rules, "on_policy", {**RULES, "constant 0.3": "constant 0.3"})
    usual = seeds_of(made.values())
    base = rules.get(BASE, [])
    lines = []
    for label, rows in made.items():
        few = "" if len(rows) == usual else f" ({count(len(rows))})"
        lines.append([label, f"{number(rows)}{few}", difference(rows, base).verdict, share(rows)])
    columns = ["Training", "On-policy: score", "against the base", "winners' error"]
    return markdown(columns, lines, note(usual, f"The base scores {number(base)}"))


SINGLES = {
    "liked only, SFT": "liked images only, `sft`",
    "pairs, DPO": "pairs, plain DPO",
    "pairs, SDPO": "pairs, the recipe",
    "pairs, tgo": "pairs, `tgo`, parameter space",
    "matched, SDPO": "matched, the recipe",
    "tgo": "matched, `tgo`, no safeguard",
    "tgo, output": "matched, `tgo`, output space",
    "tgo, parameter": "matched, `tgo`, parameter space",
    "kto": "matched, `kto`, no safeguard",
    "kto, output": "matched, `kto`, output space",
    "kto, parameter": "matched, `kto`, parameter space",
}


def single_images(rows: Rows) -> str:
    """Images that are liked or disliked by themselves, beside pairs of the same images."""
    usual = seeds_of(rows.values())
    base = rows.get(BASE, [])
    lines = []
    for kind in ("off_policy", "on_policy"):
        made = arms(rows, kind, SINGLES)
        pairs = made.get(SINGLES["pairs, SDPO"], [])
        for label, found in made.items():
            beside = "" if found is pairs else difference(found, pairs).verdict
            cells = [number(found), difference(found, base).verdict, beside, share(found), number(found, diversity)]
            lines.append([KINDS[kind], labelled(label, found, usual), *cells])
    columns = [
        "Images",
        "Training",
        "Score",
        "Over the base",
        "Over the recipe on pairs",
        "Winners' error",
        "Diversity",
    ]
    without = f"The base scores {number(base)}, with diversity {number(base, diversity)}"
    return markdown(columns, lines, note(usual, without))


def how_many(rows: Rows) -> str:
    """What a training gains by the number of its pairs, or of its liked and its disliked images."""
    usual = seeds_of(rows.values())
    lines = []
    for size in (64, 256, 1024, 4096):
        found = [rows.get(f"{size} pairs, SDPO", []), rows.get(f"{size} liked and {size} disliked, tgo", [])]
        cells = [cell for made in found for cell in ((number(made), share(made)) if made else ("", ""))]
        if any(found):
            lines.append([f"{size:,}", *cells])
    columns = [
        "Pairs, or images of each kind",
        "Pairs: score",
        "winners' error",
        "`tgo`: score",
        "liked images' error",
    ]
    return markdown(columns, lines, note(usual, f"The base scores {number(rows.get(BASE, []))}"))


def step_pairs(rows: Rows) -> str:
    """Step pairs beside pairs of finished images, with what each costs in predictions of the denoiser."""
    usual = seeds_of(made for name, made in rows.items() if len(made) > 1)
    guided = rows.get("recipe, guided 3", [])
    lines = []
    for name, made in rows.items():
        beside = "" if made is guided else str(difference(made, guided))
        cost = f"{made[0]['cost'] / 1000:,.0f}"
        cells = [number(made), beside, number(made, diversity), number(made, frechet), share(made), cost]
        lines.append([labelled(name, made, usual), *cells])
    columns = ["Training", "Score", "Over the recipe, guided 3", "Diversity", "Frechet", "Winners' error"]
    return markdown([*columns, "Thousand predictions"], lines, note(usual))


def long(long: Rows, rules: Rows, variants: Rows) -> str:
    """Scores and winners' errors by the number of steps."""
    names = {"SFT": "supervised tuning", **{name: RULES[name] for name in ("DPO", "output 0.6", "parameter 0.8")}}
    names["constant 0.5"] = "constant 0.5"
    seeds = {row["seed"] for rows in long.values() for row in rows}
    lines, shown = [], []
    for name, label in names.items():
        first = variants.get("SFT", []) if name == "SFT" else rules.get(f"off_policy, {name}", [])
        by_steps = [[row for row in first if row["seed"] in seeds]]
        by_steps += [long.get(f"{name}, {steps} steps", []) for steps in (600, 2400)]
        shown += [rows for rows in by_steps if rows]
        lines.append((label, by_steps))
    usual = seeds_of(shown)
    cells = []
    for label, by_steps in lines if any(long.values()) else ():
        cells.append([label])
        for rows in by_steps:
            few = "" if len(rows) == usual or not rows else f" ({count(len(rows))})"
            cells[-1] += [f"{number(rows)}{few}", share(rows)]
    columns = ["Training"]
    for steps in (150, 600, 2400):
        columns += [f"{steps} steps: score", "winners' error"]
    return markdown(columns, cells, note(usual))


def transformer(transformer: Rows) -> str:
    """The rules of `rules` with a small transformer."""
    names = {"SFT": "supervised tuning", **RULES, **CONSTANTS}
    made = {label: transformer[name] for name, label in names.items() if transformer.get(name)}
    return scored(made, transformer.get(BASE, []))


# ---- Views: losses, guidance, masks ---------------------------------------------------------------------------------


def losses(losses: Rows) -> str:
    """Each loss without and with the safeguard, and both against `sigmoid` with the safeguard."""
    against = losses.get("sigmoid, safeguarded", [])
    usual = seeds_of(losses.values())
    names = [name for name in losses if not name.endswith(", safeguarded")]
    lines, compared = [], 0
    for name in names:
        line = [
            labelled(f"`{name}`" if re.fullmatch(r"[a-z_]+", name) and name != BASE else name, losses[name], usual)
        ]
        both = losses[name], losses.get(f"{name}, safeguarded", [])
        for rows in both:
            verdict = "" if rows is against else difference(rows, against).verdict
            compared += bool(verdict)
            line.append(number(rows) + (f", {verdict}" if verdict in ("higher", "lower") else ""))
        line += [str(difference(both[1], both[0])), share(both[0]), share(both[1])]
        lines.append(line)
    columns = ["Loss", "Score, no safeguard", "Score, safeguard", "Safeguard minus none"]
    columns += ["Winners' error, no safeguard", "Winners' error, safeguard"]
    chance = f"Of {compared} comparisons with `sigmoid`, chance alone marks about {0.05 * compared:g}"
    return markdown(columns, lines, note(usual, chance))


def inversion(published_steps: Rows) -> str:
    """Sources of noise at steps of the published size."""
    usual = seeds_of(published_steps.values())
    columns = ["Method", "Score", "Without guidance", "Score over `sigmoid`", "Winners' error"]
    lines = []
    for name, rows in published_steps.items():
        compared = "" if name in (BASE, "sigmoid") else str(difference(rows, published_steps["sigmoid"]))
        lines.append([labelled(name, rows, usual), number(rows), number(rows, plain), compared, share(rows)])
    return markdown(columns, lines, note(usual))


def guidance(guidance: Rows) -> str:
    """Ways to sample, each against the base."""
    base = guidance.get(BASE, [])
    usual = seeds_of(guidance.values())
    columns = ["Sampled", "Score", "Without guidance", "Score over the base", "Over the same weights, unguided"]
    lines = []
    for name, rows in guidance.items():
        if name != "negative":
            unguided = guidance.get(rows[0]["settings"].get("of", ""), [])
            compared = ["" if name == BASE else str(difference(rows, base)), str(difference(rows, unguided))]
            cells = [number(rows), number(rows, plain), *compared, number(rows, diversity), number(rows, frechet)]
            lines.append([labelled(name.replace("on_policy", "on-policy"), rows, usual), *cells])
    return markdown([*columns, "Diversity", "Frechet"], lines, note(usual))


def diversity(row: Row) -> float:
    return row["best"]["diversity"]


def frechet(row: Row) -> float:
    return row["best"]["frechet"]


GUIDED = {  # trained row of the plan `guidance` -> label
    "recipe": "the recipe on off-policy pairs",
    "on_policy, recipe": "on on-policy pairs",
    "LoRA, recipe": "as a LoRA",
    "gentle, recipe": "with gentle settings",
}


def guidance_gain(guidance: Rows) -> str:
    """What guidance at low noise adds to each trained model."""
    columns = ["Trained", "Score", "Guided, scale 4 at low noise", "Guided minus unguided", "Guided minus the base"]
    made = {name: guidance[name] for name in GUIDED if guidance.get(name)}
    usual = seeds_of(made.values())
    lines = []
    for name, rows in made.items():
        guided = guidance.get(f"{name}, guided 4 at low noise", [])
        compared = [str(difference(guided, rows)), str(difference(guided, guidance.get(BASE, [])))]
        lines.append([labelled(GUIDED[name], rows, usual), number(rows), number(guided), *compared])
    return markdown(columns, lines, note(usual, f"The base scores {number(guidance.get(BASE, []))}"))


PAIRS_RED = 0.133  # what the world's VAE makes of the corners of the pairs, as in masks.yaml


def masks(masks: Rows) -> str:
    """How much of the corner and of the rest changed."""
    usual = seeds_of(masks.values())
    columns = ["Training", "Corner, % of the pairs' red", "Outside", "Score at guidance 3"]
    lines = []
    for name, rows in masks.items():
        red = f"{100 * statistics.mean(row['best']['red'] for row in rows) / PAIRS_RED:.0f}"
        outside = f"{statistics.mean(row['best']['outside'] for row in rows):.1f}"
        lines.append([labelled(name, rows, usual), red, outside, number(rows)])
    return markdown(columns, lines, note(usual))


# ---- Views: what the safeguard assumes ------------------------------------------------------------------------------

SHOWN_STEPS = (0, 20, 60, 100, 200)
SPACES = ("cosine_output", "cosine_parameter", "lambda_output", "lambda_parameter")


def probes(rows: list[Row], arm: str | None = None) -> list[Row]:
    """Return the probes of all arms, or of one, of all seeds."""
    chosen = [row for row in rows if row["part"] == "arms" and arm in (None, row["rule"])]
    return [probe for row in chosen for probe in row["measured"]["probes"]]


def by_model(unet: list[Row], transformer: list[Row]) -> dict[str, list[Row]]:
    return {"U-Net": unet, "transformer": transformer}


def quantiles(values: Iterable[float]) -> list[float]:
    """Return the 5, 50 and 95 % quantiles."""
    return list(np.quantile(list(values), (0.05, 0.5, 0.95)))


def spread(values: Iterable[float], digits: str, unit: str = "") -> str:
    low, middle, high = (format(value, digits) for value in quantiles(values))
    return f"{middle}{unit} ({low} to {high}{unit})"


def isometry(*results: list[Row]) -> str:
    """Cosines and lambdas of the same batches in both spaces: medians over the probe, then with 5 to 95 %."""
    lines = []
    for model, rows in by_model(*results).items():
        after = [probe for probe in probes(rows) if probe["step"] > 0]
        for step in SHOWN_STEPS:
            found = [row for probe in probes(rows) if probe["step"] == step for row in probe["rows"]]
            lines.append(
                [model, str(step), *(f"{statistics.median(row[name] for row in found):.2f}" for name in SPACES)]
            )
        for label, part in (("all after 0", "rows"), ("all after 0, single pairs", "single_pairs")):
            found = [row for probe in after for row in probe.get(part, ())]
            lines.append([model, label, *(spread((row[name] for row in found), ".2f") for name in SPACES)])
    columns = ["Model", "Step", "Cosine at the output", "Cosine in parameter space", "Lambda at the output"]
    return markdown([*columns, "Lambda in parameter space"], lines)


def promises(*results: list[Row]) -> str:
    """What each rule promises, and what it keeps, on the batches of the probe after the first step."""
    lines, missed = [], []
    for model, rows in by_model(*results).items():
        found = [row for probe in probes(rows) if probe["step"] > 0 for row in probe["rows"]]
        for rule in found[0]["tried"]:
            mu = float(rule.rpartition(" ")[2]) if "mu" in rule else None
            # The parameter rule is about the error that is weighted as in the loss; the output rule about the mean.
            kept = "left_weighted" if rule.startswith("parameter") else "left"
            held = sum(mu is not None and row[kept][rule] >= mu - 1e-3 for row in found)
            tried = [row["tried"][rule] for row in found]
            missed += [abs(each["sgd"] / each["predicted"] - 1) for each in tried]
            line = [model, rule, "" if mu is None else f"{100 * mu:.0f} %"]
            line.append(spread((100 * row["left"][rule] for row in found), ".0f", " %"))
            line.append("" if mu is None else f"{held} of {len(found)}")
            line += [f"{sum(each[step] > 0 for each in tried)} of {len(found)}" for step in ("sgd", "adamw")]
            lines.append(line)
    _, middle, high = quantiles(missed)
    columns = ["Model", "Rule", "Promised", "Left: median (5 to 95 %)", "Kept the promise", "Small SGD step raises"]
    below = f"The small step's change differs from the predicted one by {middle:.1%} (median; 95 %: {high:.0%})"
    return markdown([*columns, "AdamW step raises"], lines, below)


def rises(*results: list[Row]) -> str:
    """Steps of plain SGD that raised their own winners' error, one number a seed."""
    lines, rules, steps = [], [], 0
    for model, rows in by_model(*results).items():
        found = defaultdict(list)
        for row in rows:
            if row["part"] == "sgd":
                found[row["rate"], row["rule"]].append(row["measured"])
                steps = row["measured"]["steps"]
        rules = list(dict.fromkeys(rule for _, rule in found))
        for rate in sorted({rate for rate, _ in found}, reverse=True):
            line = [model, f"{rate:g}"]
            for made in (found[rate, rule] for rule in rules):
                counts = ", ".join(str(each["rises"]) for each in made)
                line.append(
                    f"{counts} ({statistics.mean(each['sum_of_changes'] for each in made):+.2g})" if made else ""
                )
            lines.append(line)
    below = f"Of {steps} steps, one number a seed; in brackets, the sum of the changes of the error"
    return markdown(["Model", "Learning rate", *rules], lines, below)


def sigmoid(*results: list[Row]) -> str:
    """How far lambda from plain residuals is from lambda with the loss's weights, and in parameter space."""
    lines = []
    for model, rows in by_model(*results).items():
        after = [probe for probe in probes(rows) if probe["step"] > 0]
        for size in after[0]["groups"]:
            groups = [group for probe in after for group in probe["groups"][size]]
            apart = [abs(plainly - weighted) for plainly, weighted in groups]
            _, middle, high = quantiles(apart)
            parameter = ""
            if size in after[0]["parameter_groups"]:
                both = [zip(probe["groups"][size], probe["parameter_groups"][size], strict=True) for probe in after]
                found = quantiles(group[0] - own for pairs in both for group, own in pairs)
                parameter = f"{found[1]:+.2f} ({found[2]:+.2f})"
            cells = [spread((plainly for plainly, _ in groups), ".2f"), f"{middle:.3f} ({high:.3f}, {max(apart):.3f})"]
            lines.append([model, size, *cells, parameter])
    columns = ["Model", "Pairs", "Lambda, plain", "Differs from the weighted one by: median (95 %, largest)"]
    return markdown([*columns, "From that in parameter space by: median (95 %)"], lines)


def lambda_by_noise(*results: list[Row]) -> str:
    """The arm's own lambda over the training, on the batches of each quarter of the noise levels: means."""
    quarters = {
        f"{start / 8:g} to {start / 8 + 0.25:g}": {f"bin {start}", f"bin {start + 1}"} for start in range(0, 8, 2)
    }
    own = {"output, mu 0.6": "lambda_output", "parameter, mu 0.8": "lambda_parameter_own"}
    lines = []
    for model, rows in by_model(*results).items():
        for arm, name in own.items():
            for levels, batches in {**quarters, "all, fresh pairs": {"fresh"}}.items():
                line = [model, arm, levels]
                for step in SHOWN_STEPS:
                    at = [probe for probe in probes(rows, arm) if probe["step"] == step]
                    values = [row[name] for probe in at for row in probe["rows"] if row["batch"] in batches]
                    line.append(f"{statistics.mean(values):.2f}")
                lines.append(line)
    return markdown(["Model", "Arm", "Noise level", *(f"Step {step}" for step in SHOWN_STEPS)], lines)


# ---- Views: single files --------------------------------------------------------------------------------------------


def edits(results: dict[str, dict[str, float]]) -> str:
    """The edit model; ± is the standard error over edits."""
    lines = [["base", f"{results[BASE]['score']:.3f}", "", "0"]]
    for name, row in results.items():
        if name != BASE:
            gain = f"{row['gain']:+.3f} ± {row['standard_error']:.3f}"
            lines.append([name, f"{row['score']:.3f}", gain, f"{100 * row['winners']:+.0f} %"])
    columns = ["Training", "Score", "Score over the base", "Winners' error"]
    return markdown(columns, lines, "One seed. ± is the standard error over the 120 edits")


def planned_memory(rows: list[dict[str, Any]]) -> str:
    columns = ["Configuration", "Computed, MiB", "Measured, MiB", "Computed / measured"]
    lines = []
    for row in rows:
        sizes = [f"{row[name] / 2**20:.1f}" for name in ("planned", "measured")]
        lines.append([row["name"], *sizes, f"{row['planned'] / row['measured']:.3f}"])
    return markdown(columns, lines)


FLOPS = (  # model in the results -> label, and the forward passes that a backward pass counts as
    ("sd15", "Stable Diffusion 1.5, 512", "LoRA", 1),
    ("sdxl", "SDXL, 1024", "LoRA", 1),
    ("sdxl", "SDXL, 1024", "all weights", 2),
    ("sd35-medium", "SD 3.5 Medium, 1024", "LoRA", 1),
    ("flux-dev", "FLUX.1 dev, 1024", "LoRA", 1),
)


def pair_flops(counted: dict[str, dict[str, int]]) -> str:
    """TFLOP of a pair: two images encoded and one prompt, two predictions of the reference, and two trained ones."""
    lines = []
    for model, label, tuning, backward in FLOPS:
        tera = {name: value / 1e12 for name, value in counted[model].items()}
        trained = 2 * (1 + backward) * tera["denoiser"]
        cached = trained + 2 * tera["denoiser"]
        whole = cached + 2 * tera["vae"] + tera["text"]
        lines.append([label, tuning, f"{whole:.1f}", f"{cached:.1f}", f"{trained:.1f}"])
    columns = ["Model, side of the image in pixels", "Tuning", "Without caches", "With `precompute_latents`"]
    return markdown([*columns, "Also with `precompute_ref_errors`"], lines)


STEPS = {  # (part, tuning) of step_time.py -> label
    ("authors", "full"): "our step / the step of the Diffusion-SDPO authors' script",
    ("both", "full"): "our step with both caches / the step of the authors' script",
    ("diffusers", "lora"): "our step / the step of diffusers' script",
    ("both", "lora"): "our step with both caches / the step of diffusers' script",
}


def step_time(results: dict[str, Any]) -> str:
    """Times of our step and of other scripts' steps."""
    lines = []
    for group in results["groups"]:
        for result in group["results"]:
            place = result["comparison"]["part"], result["comparison"]["tuning"]
            if place in STEPS:
                low, middle, high = statistics.quantiles(result["ratios"], n=4, method="inclusive")
                tuning = {"full": "all weights", "lora": "LoRA"}[place[1]]
                cells = [STEPS[place], f"{middle:.2f}", f"{low:.2f} to {high:.2f}", str(len(result["ratios"]))]
                lines.append([tuning, *cells])
    found = results["environment"]
    columns = ["Tuning", "Compared", "Median ratio", "Quartiles", "Rounds"]
    where = f"{found['device']}, {found['threads']} thread, {found['clock']}, torch {found['torch']}"
    return markdown(columns, sorted(lines), where)


def large_cache(results: list[dict[str, Any]]) -> str:
    """CPU time to open a cache, and what its readers keep in memory."""
    lines = []
    for size in results:
        found = size["processes"]
        readers = {
            way: [found[name] for name in found if "worker" in name and way in name] for way in ("fork", "spawn")
        }
        opened = [f"{sum(seconds.values()):.1f} s" for seconds in (size["first_seconds"], size["seconds"])]
        own = found["cache opened"]["private"] - found["at the start"]["private"]
        kept = [f"{max(reader['private'] for reader in of):.0f} MiB" for of in readers.values()]
        files = max(process["files"] for process in found.values())
        lines.append([f"{size['pairs']:,}", f"{size['shard_files']:,}", *opened, f"{own:.0f} MiB", *kept, f"{files}"])
    columns = ["Pairs", "Files", "First start", "Later starts", "Memory", "Of a forked worker", "Of a spawned one"]
    return markdown([*columns, "Open files"], lines)


def start_up(results: dict[str, Any]) -> str:
    """CPU time and private memory until the first step, when the index is made and when it is kept."""
    rows = {(row["rows"], row["way"]): row for row in results["start_up"]}
    lines = []
    for count in dict.fromkeys(rows for rows, _ in rows):
        made = [rows[count, way] for way in ("map", "again", "stream")]
        cells = [f"{row['cpu']:.1f} s, {row['private']:.0f} MiB" for row in made]
        lines.append([f"{count:,}", *cells])
    return markdown(["Pairs", "First start", "Later starts", "As a stream"], lines)


def bf16_weights(results: list[dict[str, Any]]) -> str:
    """What bf16 weights lose to float32 ones, with both ways to round."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in results):
        runs = [row["evaluations"] for row in results if row["kind"] == kind]
        last = [run[-1] for run in runs]
        rises = [
            100 * end["eval_errors/winner_change"] / run[0]["eval_errors/winner"]
            for run, end in zip(runs, last, strict=True)
        ]
        cells = []
        for values, form in (
            ([end["eval_loss"] for end in last], ".3f"),
            (rises, "+.1f"),
            ([end["eval_rewards/accuracies"] for end in last], ".2f"),
        ):
            spread = f" ({min(values):{form}} to {max(values):{form}})" if values[1:] else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        moved = statistics.mean(end["moved"] for end in last)
        lines.append([kind, str(len(runs)), *cells, f"{moved:.0%}"])
    return markdown(["Weights", "Seeds", "Loss", "Winners' error, %", "Accuracy", "Weights that moved"], lines)


def first_epoch(results: dict[str, Any]) -> str:
    """What a run of one epoch costs when it fills a cache."""
    names = {"drawn": "encodes the flips that it draws", "all": "encodes each image plain and mirrored"}
    lines = []
    for name, label in names.items():
        low, middle, high = statistics.quantiles(results["ratios"][name], n=4, method="inclusive")
        kib = results["bytes"][name] / results["pairs"] / 1024
        lines.append([label, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{kib:.1f} KiB"])
    columns = ["A run that", "CPU time over a run without a cache", "Quartiles", "Cache, a pair"]
    return markdown(columns, lines, f"{len(results['seconds']['live'])} rounds, {results['pairs']} pairs")


def weights_once(results: list[dict[str, Any]]) -> str:
    """Host memory of two processes until their first step, in sizes of the model."""
    lines = []
    for row in results:
        cells = [
            f"{(row[version]['large'][level] - row[version]['small'][level]) / row['model']:.2f}"
            for level in ("peak", "first_step")
            for version in ("before", "after")
        ]
        lines.append([row["engine"], {"lora": "LoRA", "full": "all weights"}[row["tuning"]], *cells])
    columns = ["Engine", "Trained", "Peak, each reads", "One reads", "At the first step, each reads", "One reads"]
    return markdown(columns, lines)


# ---- The table of tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of the documentation."""

    view: Callable[..., str]  # results, one argument a file -> Markdown
    files: tuple[str, ...]  # under the root; of a `.jsonl` file, the finished rows of the plan of its name

    def __str__(self) -> str:
        return self.view(*map(read, self.files))


def _of_plans(view: Callable[..., str], *plans: str) -> Table:
    return Table(view, tuple((STUDIES / f"{plan}.jsonl").as_posix() for plan in plans))


ASSUMPTIONS = tuple(f"{BENCHMARKS}/assumptions_{model}.json" for model in ("unet", "transformer"))
TABLES = {
    "safeguard": _of_plans(safeguard, "rules", "variants"),
    "safeguard_short": _of_plans(safeguard_short, "rules", "variants"),
    "constants": _of_plans(constants, "rules", "gentle"),
    "kinds": _of_plans(kinds, "rules"),
    "recipe": _of_plans(recipe, "rules", "gentle"),
    "one_setting": _of_plans(one_setting, "rules"),
    "gentle": _of_plans(gentle, "gentle"),
    "on_policy": _of_plans(on_policy, "rules"),
    "single_images": _of_plans(single_images, "single_images"),
    "how_many": _of_plans(how_many, "how_many"),
    "step_pairs": _of_plans(step_pairs, "step_pairs"),
    "long": _of_plans(long, "long", "rules", "variants"),
    "transformer": _of_plans(transformer, "transformer"),
    "losses": _of_plans(losses, "losses"),
    "inversion": _of_plans(inversion, "published_steps"),
    "guidance": _of_plans(guidance, "guidance"),
    "guidance_gain": _of_plans(guidance_gain, "guidance"),
    "masks": _of_plans(masks, "masks"),
    **{view.__name__: Table(view, ASSUMPTIONS) for view in (isometry, promises, rises, sigmoid, lambda_by_noise)},
    "edits": Table(edits, (f"{STUDIES}/edit.json",)),
    "planned_memory": Table(planned_memory, (f"{BENCHMARKS}/planned_memory.json",)),
    "pair_flops": Table(pair_flops, (f"{BENCHMARKS}/pair_flops.json",)),
    "step_time": Table(step_time, (f"{BENCHMARKS}/step_time.json",)),
    "large_cache": Table(large_cache, (f"{BENCHMARKS}/large_cache.json",)),
    "bf16_weights": Table(bf16_weights, (f"{BENCHMARKS}/bf16_weights.json",)),
    "first_epoch": Table(first_epoch, (f"{BENCHMARKS}/first_epoch.json",)),
    "weights_once": Table(weights_once, (f"{BENCHMARKS}/weights_once.json",)),
    "start_up": Table(start_up, (f"{BENCHMARKS}/data_loading.json",)),
}
# Tables that another program writes between the same markers -> that program, and its results.
OTHERS = {"overhead": ("benchmarks/safeguard_overhead.py", f"{BENCHMARKS}/safeguard_overhead.json")}


@functools.cache
def read(file: str) -> Any:
    path = ROOT / file
    if path.suffix == ".jsonl":
        from study import finished_rows, load_plan  # slow to import

        return finished_rows(load_plan(path.stem), path)
    return json.loads(path.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


def written(text: str, shown: Mapping[str, Any] = TABLES) -> str:
    """Return a page with its tables of today: those of this program, or the `shown` ones of another.

    All others stay as they are, and so do tables without finished rows.
    """

    def table(match: re.Match[str]) -> str:
        made = str(shown.get(match[2], ""))
        return f"{match[1]}\n{made}\n\n{match[3]}" if made else match[0]

    return MARKED.sub(table, text)


def write() -> list[Path]:
    """Write all tables into their pages, and return the pages that changed."""
    changed = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            changed.append(page)
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*TABLES, []], help="print these tables; write all if unset")
    options = parser.parse_args(arguments)
    for name in options.names:
        print(f"{TABLES[name]}\n")
    if not options.names:
        for page in write():
            print(f"Wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
