"""Draw the README's picture from a run of the demo: the error on preferred images, and the score of new images.

make demo && python benchmarks/front_picture.py demo_output docs/images/preferred_images.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

LINES = {
    "dpo": ("Diffusion-DPO", "#d55e00", "v"),
    "sdpo": ("Diffusion-SDPO", "#009e73", "o"),
    "sdpo_recipe": ("Diffusion-SDPO,\nrecipe", "#aa4499", "P"),
}
PANELS = {
    "winner_change": ("Change of error on held-out preferred images", "up is worse"),
    "oracle": ("Score of generated images", "up is better"),
}


def main(demo: str, picture: str) -> None:
    results = json.loads(Path(demo, "results.json").read_text(encoding="utf-8"))
    # 6.4 inches at 200 dpi: shown at 640 pixels a point of text is 1.4 pixels high, and on a phone it still reads.
    figure = Figure(figsize=(6.4, 6.2), dpi=200, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, (curve, (title, meaning)) in zip(panels, PANELS.items(), strict=True):
        before = 0.0 if curve == "winner_change" else results["base"]["oracle"]
        panel.axhline(before, color="black", linestyle=":", linewidth=1.5)
        for method in results["methods"]:
            if method["key"] in LINES:
                label, color, marker = LINES[method["key"]]
                curves = method["curves"]
                heights = [point["mean"] if curve == "oracle" else point for point in curves[curve]]
                panel.plot(curves["steps"], heights, color=color, marker=marker, linewidth=2.5, label=label)
        panel.set_title(title, fontsize=14, loc="left", fontweight="bold")
        panel.set_ylabel(meaning, fontsize=13)
        panel.tick_params(labelsize=13)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[0].annotate("before training", (240, 0), (0, -15), textcoords="offset points", ha="right", fontsize=12)
    panels[0].set_ylim(bottom=-0.06)
    panels[1].set_xlabel("training step", fontsize=13)
    panels[0].legend(fontsize=13, frameon=False, loc="upper left")
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
