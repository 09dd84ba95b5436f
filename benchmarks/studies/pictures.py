"""Draw the pictures of the documentation from committed results.

    python benchmarks/studies/pictures.py                       # all pictures
    python benchmarks/studies/pictures.py front.png             # one
    python benchmarks/studies/pictures.py --measure guidance    # new images for it first: trains what is missing
    python benchmarks/studies/pictures.py --measure step_pairs

Phones show a picture at 360 pixels, so all text is large.
"""

import argparse
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tables import CONSTANTS, KINDS, RULES, Rows, read, score, winners

from trl_diffusion_sdpo.utils.statistics import standard_error

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs/images"
STUDIES = "benchmarks/studies/results"
WIDTH = 4.8  # inches; 12 points are then 12 pixels on a phone
DPI = 200
SIDE = 32  # of the embedded world's images


def panels(height: float, *titles: str, **settings: Any) -> tuple[Figure, list[Any]]:
    """Return a figure of panels below each other."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(len(titles), 1, squeeze=False, **settings)[:, 0])
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=13, loc="left", fontweight="bold")
        panel.tick_params(labelsize=11)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    return figure, axes


# ---- The safeguard --------------------------------------------------------------------------------------------------

BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of a label that crosses a line
STYLES = {  # label of a rule -> color, marker
    "output space, mu 0.6": ("#0072b2", "o"),
    "output space, mu 0.8": ("#56b4e9", "o"),
    "parameter space, mu 0.6": ("#d55e00", "^"),
    "parameter space, mu 0.8": ("#aa4499", "^"),
}


def draw_front(rules: Rows) -> Figure:
    """Draw the score against the winners' error on each kind of pairs: constants as a line, rules as points."""
    kinds = [kind for kind in KINDS if all(rules.get(f"{kind}, {name}") for name in (*CONSTANTS, *RULES))]
    figure, axes = panels(1.2 + 2.1 * len(kinds), *(f"{KINDS[kind]} pairs" for kind in kinds), sharex=True)
    for panel, kind in zip(axes, kinds, strict=True):
        fixed = {name.removeprefix("constant "): rules[f"{kind}, {name}"] for name in CONSTANTS}
        fixed["DPO"] = rules[f"{kind}, DPO"]
        line = [(100 * mean(rows, winners), mean(rows, score)) for rows in fixed.values()]
        panel.plot(*zip(*line, strict=True), color="#777777", marker=".", markersize=9, linewidth=2, label="constants")
        for number, (name, (x, y)) in enumerate(zip(fixed, line, strict=True)):
            # Above and below by turns, as neighbours can be close.
            offset, side = ((0, 8), "bottom") if number % 2 == 0 else ((0, -8), "top")
            style = {"ha": "center", "va": side, "fontsize": 10, "color": "#555555", "bbox": BEHIND}
            panel.annotate(name, (x, y), offset, textcoords="offset points", **style)
        for name, label in RULES.items():
            if label in STYLES:
                color, marker = STYLES[label]
                rows = rules[f"{kind}, {name}"]
                x, y = 100 * mean(rows, winners), mean(rows, score)
                panel.errorbar(x, y, deviation(rows), color=color, marker=marker, markersize=9, label=label)
        panel.axhline(mean(rules["base"], score), color="black", linestyle=":", linewidth=1.5)
        panel.axvline(0, color="black", linewidth=1)
        panel.set_xscale("symlog", linthresh=3)
        panel.set_xlim(-5, 20_000)
        panel.set_xticks([-3, 0, 3, 30, 300, 3000], ["-3", "0", "+3", "+30", "+300", "+3000"])
        panel.margins(y=0.3)
        panel.set_ylabel("score", fontsize=12)
    axes[-1].set_xlabel("winners' error, per cent", fontsize=12)
    axes[-1].legend(fontsize=11, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.3))
    return figure


def mean(rows: list[Any], value: Callable[[Any], float]) -> float:
    return statistics.mean(map(value, rows))


def deviation(rows: list[Any]) -> float:
    """Return the standard error of the scores, or 0 for one seed."""
    return standard_error(list(map(score, rows))) if len(rows) > 1 else 0.0


# ---- Sizes ----------------------------------------------------------------------------------------------------------


def draw_aspect_ratios() -> Figure:
    """Draw the sizes at 1024 pixels, and how much of an image is cropped."""
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN

    from trl_diffusion_sdpo.data.buckets import AspectRatioBuckets

    figure, (sizes, cropped) = panels(7.6, "Sizes at resolution 1024", "Cropped share of an image")
    buckets = AspectRatioBuckets((1024, 1024))
    published = np.array(sorted(ASPECT_RATIO_1024_BIN.values()))
    ours = np.array(buckets.sizes)
    widths = np.linspace(480, 2080, 200)
    sizes.plot(widths, 1024**2 / widths, color="black", linewidth=1.5, label="area of 1024 x 1024")
    sizes.plot(published[:, 1], published[:, 0], ".", color="#999999", markersize=9, label="other sizes of SDXL")
    sizes.plot(ours[:, 1], ours[:, 0], "o", color="#0072b2", markersize=8, label="sizes of the trainer")
    sizes.set_xlabel("width, pixels", fontsize=12)
    sizes.set_ylabel("height, pixels", fontsize=12)
    sizes.legend(fontsize=11, frameon=False)
    ratios = np.geomspace(0.4, 2.5, 400)
    for label, color, allowed in (
        ("square", "#d55e00", ((1, 1),)),
        ("sizes at 512", "#999999", AspectRatioBuckets((512, 512)).sizes),
        ("sizes at 1024", "#0072b2", buckets.sizes),
    ):
        shapes = np.array([width / height for height, width in allowed])
        nearest = shapes[np.abs(np.log(ratios[:, None] / shapes)).argmin(1)]
        cropped.plot(
            ratios, 100 * (1 - np.exp(-np.abs(np.log(ratios / nearest)))), color=color, linewidth=2, label=label
        )
    cropped.set_xscale("log")
    cropped.set_xticks([0.5, 2 / 3, 1, 3 / 2, 2], ["1:2", "2:3", "1:1", "3:2", "2:1"])
    cropped.minorticks_off()
    cropped.set_xlabel("width to height of the image", fontsize=12)
    cropped.set_ylabel("per cent of its area", fontsize=12)
    cropped.legend(fontsize=11, frameon=False, loc="upper center")
    return figure


# ---- Images ---------------------------------------------------------------------------------------------------------


def read_tiles(file: str) -> np.ndarray:
    """Read images that are stored side by side in one: `(rows, columns, 32, 32, 3)`."""
    pixels = np.asarray(Image.open(ROOT / file).convert("RGB"))
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    return pixels.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 1, 3, 4)


def write_tiles(path: Path, tiles: np.ndarray) -> None:
    """Write images `(rows, columns, 32, 32, 3)` side by side into one."""
    rows, columns = tiles.shape[:2]
    Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(rows * SIDE, columns * SIDE, 3)).save(path)


def grid(tiles: np.ndarray, columns: list[str], rows: list[str], scores: list[list[float]] | None = None) -> Figure:
    """Draw images `(rows, columns, 32, 32, 3)` under the names of their columns."""
    count, width = tiles.shape[:2]
    figure = Figure(figsize=(WIDTH, 0.6 + count * WIDTH / width * (1.1 if scores is None else 1.3)), dpi=DPI)
    axes: Any = figure.subplots(count, width)
    for row in range(count):
        for column in range(width):
            panel = axes[row, column]
            panel.imshow(tiles[row, column], interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            if scores is not None:
                panel.set_xlabel(f"{scores[row][column]:.2f}", fontsize=11, labelpad=2)
    for panel, name in zip(axes[0], columns, strict=True):
        panel.set_title(name, fontsize=10)
    for panel, name in zip(axes[:, 0], rows, strict=True):
        panel.set_ylabel(name, fontsize=10)
    figure.tight_layout(pad=0.3)
    return figure


def draw_edits() -> Figure:
    names = ["source", "base", "DPO", "output\nmu 0.6", "param.\nmu 0.8", "wanted"]
    return grid(read_tiles(f"{STUDIES}/edit_images.png"), names, [""] * 6)


def draw_grid(name: str, facts: dict[str, Any]) -> Figure:
    return grid(read_tiles(f"{STUDIES}/{name}_images.png"), facts["columns"], facts["prompts"], facts["scores"])


SEED = 0
NOISES = 4  # initial noises of each prompt, from which the best image of the base is taken
SHOWN = 4  # prompts
SHAPES = ("square", "triangle")  # at 32 pixels, the base's circles and crosses are hard to tell from these
# Name of a grid, and of its plan if no other is given -> title of a column -> row of the plan, and preference guidance.
GRIDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "guidance": {
        "base": ("base", {}),
        "DPO": ("off_policy, DPO", {}),
        "output\nmu 0.6": ("off_policy, output 0.6", {}),
        "param.\nmu 0.8": ("off_policy, parameter 0.8", {}),
        "param.,\nguided": ("off_policy, parameter 0.8", {"guidance": {"scale": 4.0, "interval": [0.0, 0.62]}}),
    },
    "step_pairs": {
        "base": ("base", {}),
        "recipe,\nguided 3": ("recipe", {"guidance": {"scale": 3.0}}),
        "20 steps": ("step pairs, 20 steps", {}),
        "20 steps,\nguided 2": ("step pairs, 20 steps", {"guidance": {"scale": 2.0}}),
        "50 steps": ("step pairs, 50 steps", {}),
    },
}
PLANS = {"guidance": "rules"}  # of grids that have another plan than their name


def measure_grid(name: str, weights: Path) -> None:
    """Generate the images of a grid, each column at its best scale of classifier-free guidance."""
    import torch
    from step_pairs import StepStudy
    from study import load_plan

    from trl_diffusion_sdpo.tools.demo.oracle import oracle

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("trl_diffusion_sdpo").setLevel(logging.ERROR)
    study = StepStudy(load_plan(PLANS.get(name, name)), weights)
    chosen: tuple[list[str], Any] | None = None
    tiles, scores, scales = [], [], []
    for row, sampled in GRIDS[name].values():
        pipeline = study.load_base()
        if row != "base":
            pipeline.unet.load_state_dict(study.trained(row, SEED))
        context = study.guidance(sampled, SEED)
        found = {scale: study.images(pipeline, "selection", SEED, scale, context)["score"] for scale in study.scales}
        scale = max(found, key=found.__getitem__)
        chosen = chosen or drawn_prompts(study, pipeline, scale)
        with torch.no_grad():
            images = study.model.generate_images(pipeline, *chosen, guidance_scale=scale, context=context)
        tiles.append(images)
        scores.append([round(float(value), 3) for value in oracle(images, chosen[0])])
        scales.append(scale)
    assert chosen is not None
    prompts = [prompt.replace(" on ", "\non ") for prompt in chosen[0]]
    facts = {"columns": list(GRIDS[name]), "prompts": prompts, "scales": scales, "seed": SEED}
    facts["scores"] = np.transpose(scores).tolist()
    write_tiles(ROOT / f"{STUDIES}/{name}_images.png", np.stack(tiles, axis=1))
    (ROOT / f"{STUDIES}/{name}_images.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def drawn_prompts(study: Any, pipeline: Any, scale: float) -> tuple[list[str], Any]:
    """Return prompts that the base model draws well, each of another colour, and the noise of each. The base often
    draws another shape than the prompt names."""
    import torch

    from trl_diffusion_sdpo.tools.demo.oracle import oracle, oracle_parts
    from trl_diffusion_sdpo.tools.demo.world import captions

    prompts = [prompt for prompt in study.prompts["final"] for _ in range(NOISES)]
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(len(prompts), *study.model.LATENT_SHAPE, generator=generator)
    with torch.no_grad():
        images = study.model.generate_images(pipeline, prompts, latents, guidance_scale=scale)
    scores = oracle(images, prompts).numpy()
    shapes = oracle_parts(images, prompts).shape  # 0 for another shape
    content = {caption.text: caption for caption in captions()}
    best: dict[str, int] = {}  # colour -> index of its best image
    for index in np.argsort(-scores):
        caption = content[prompts[index]]
        if shapes[index] > 0 and caption.shape in SHAPES:
            best.setdefault(caption.colour, int(index))
    shown = list(best.values())[:SHOWN]
    return [prompts[index] for index in shown], latents[shown]


# ---- The table of pictures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture of the documentation: results under the root -> figure. JSON and rows are the function's arguments."""

    draw: Callable[..., Figure]
    results: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        figure = self.draw(*(read(file) for file in self.results))
        figure.savefig(path, metadata={"Software": None})


PICTURES = {
    "aspect_ratios.png": Picture(draw_aspect_ratios),
    "edit_grid.png": Picture(draw_edits, images=(f"{STUDIES}/edit_images.png",)),
    "front.png": Picture(draw_front, (f"{STUDIES}/rules.jsonl",)),
    **{
        f"{name}_grid.png": Picture(
            partial(draw_grid, name), (f"{STUDIES}/{name}_images.json",), (f"{STUDIES}/{name}_images.png",)
        )
        for name in GRIDS
    },
}

# Pictures that another program draws -> that program, and its results.
OTHERS = {
    "preferred_images.png": ("benchmarks/demo_page.py", "benchmarks/results/demo.json"),
    "demo_curves.png": ("benchmarks/demo_page.py", "benchmarks/results/demo.json"),
    "demo_images.png": ("benchmarks/demo_page.py", "benchmarks/results/demo.json"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(PICTURES)}; all if unset")
    parser.add_argument("--measure", choices=GRIDS, help="generate the images of this grid first")
    parser.add_argument("--weights", type=Path, default=Path("bench_output/weights"), help="of the study's rows")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(PICTURES)
    if unknown:
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; the pictures are {', '.join(PICTURES)}")
    if options.measure:
        measure_grid(options.measure, options.weights)
    for name in options.names or PICTURES:
        PICTURES[name].save(IMAGES / name)
        print(f"Wrote docs/images/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
