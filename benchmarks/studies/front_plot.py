"""Draw the picture of the safeguard study: `python benchmarks/studies/front_plot.py docs/images/front.png`.

The upper panel shows the score against the change of the winners' error, the lower panel this change by noise bin.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results/front.jsonl"
RULES = {  # rule in the results -> label, color, marker
    "SFT, decay, longer": ("supervised, decay, 800 steps", "#555555", "s"),
    "output": ("output space", "#0072b2", "o"),
    "output, decay": ("output space, decay", "#56b4e9", "o"),
    "parameter, decay": ("parameter space, decay", "#d55e00", "^"),
    "parameter, decay, longer": ("parameter space, decay, 800 steps", "#aa4499", "^"),
}
BY_BIN = (("output", 0.6), ("output, decay", 0.6), ("parameter, decay", 0.8), ("parameter, decay, longer", 0.8))


def main(picture: str) -> None:
    rows = defaultdict(list)
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["pairs"] == "off_policy" and row["push"] == "stress" and row["rule"] in RULES:
            rows[row["rule"], row["strength"]].append(row["measured"]["final"]["raw"])
    # 6.4 inches at 200 dpi, with large text, because phones show the picture at 360 pixels.
    figure = Figure(figsize=(6.4, 9.4), dpi=200, layout="constrained")
    score, bins = figure.subplots(2, 1, height_ratios=(3, 2))
    for rule, (label, color, marker) in RULES.items():
        strengths = sorted(strength for name, strength in rows if name == rule)
        errors = [np.mean([seed["winner"] for seed in rows[rule, strength]]) for strength in strengths]
        scores = [np.mean([seed["oracle"] for seed in rows[rule, strength]]) for strength in strengths]
        score.plot(errors, scores, color=color, marker=marker, markersize=8, linewidth=2, label=label)
        for strength, x, y in zip(strengths, errors, scores, strict=True):
            if strength:
                score.annotate(f"{strength:g}", (x, y), (6, 5), textcoords="offset points", fontsize=12)
    for rule, strength in BY_BIN:
        levels = np.mean([seed["winner_levels"] for seed in rows[rule, strength]], axis=0)
        label, color, marker = RULES[rule]
        bins.plot(100 * levels, color=color, marker=marker, linewidth=2)
    score.axvline(0, color="black", linewidth=1)
    score.set_xscale("symlog", linthresh=0.001)
    score.set_title("Score, by the change of the winners' error", fontsize=14, loc="left", fontweight="bold")
    score.set_xlabel("change of the winners' error", fontsize=13)
    score.set_ylabel("oracle score", fontsize=13)
    score.legend(fontsize=12, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=1)
    bins.axhline(0, color="black", linewidth=1)
    bins.set_title("Change of the winners' error, by noise bin", fontsize=14, loc="left", fontweight="bold")
    bins.set_xlabel("noise bin, from clean to noisy (mu 0.6 or 0.8)", fontsize=13)
    bins.set_ylabel("per cent", fontsize=13)
    for panel in (score, bins):
        panel.tick_params(labelsize=12)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
