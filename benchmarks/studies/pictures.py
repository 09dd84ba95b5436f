"""Draw the pictures of the documentation.

    make demo && python benchmarks/studies/pictures.py demo docs/images/preferred_images.png
    python benchmarks/studies/pictures.py front docs/images/front.png
    python benchmarks/studies/pictures.py guidance docs/images/guidance_grid.png

`demo` draws the errors and scores of a run of the demo. `front` draws the stored rows of the study `front`. `guidance`
draws images of equal noise by the models of the study `guided_front`. It reads their weights from `bench_output`, and
trains those that are missing.
"""

import json
import logging
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from study import BASE, Study, load_plan

from trl_diffusion_sdpo.tools.demo.oracle import oracle, oracle_parts
from trl_diffusion_sdpo.tools.demo.pipeline import LATENT_SHAPE, generate_images, load_base_pipeline
from trl_diffusion_sdpo.tools.demo.world import captions

# ---- Curves ---------------------------------------------------------------------------------------------------------

DEMO_RESULTS = Path("demo_output/results.json")
METHODS = {
    "dpo": ("Diffusion-DPO", "#d55e00", "v"),
    "sdpo": ("Diffusion-SDPO", "#009e73", "o"),
    "sdpo_recipe": ("Diffusion-SDPO,\nrecipe", "#aa4499", "P"),
}
FRONT_RESULTS = Path(__file__).parent / "results/front.jsonl"
RULES = {  # rule in the results -> label, color, marker
    "SFT, decay, longer": ("supervised, decay, 800 steps", "#555555", "s"),
    "output": ("output space", "#0072b2", "o"),
    "output, decay": ("output space, decay", "#56b4e9", "o"),
    "parameter, decay": ("parameter space, decay", "#d55e00", "^"),
    "parameter, decay, longer": ("parameter space, decay, 800 steps", "#aa4499", "^"),
}
BY_BIN = (("output", 0.6), ("output, decay", 0.6), ("parameter, decay", 0.8), ("parameter, decay, longer", 0.8))


def two_panels(height: float, *titles: str, **settings: Any) -> tuple[Figure, Any, Any]:
    """Return a figure with two panels. Its text is large, because phones show the picture at 360 pixels."""
    figure = Figure(figsize=(6.4, height), dpi=200, layout="constrained")
    panels = figure.subplots(2, 1, **settings)
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=14, loc="left", fontweight="bold")
        panel.tick_params(labelsize=12)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    return figure, *panels


def draw_demo() -> Figure:
    """Draw the error on preferred images, and the score of new images."""
    results = json.loads(DEMO_RESULTS.read_text(encoding="utf-8"))
    titles = "Change of error on held-out preferred images", "Score of generated images"
    figure, errors, scores = two_panels(6.2, *titles, sharex=True)
    for method in results["methods"]:
        if method["key"] in METHODS:
            label, color, marker = METHODS[method["key"]]
            style = {"color": color, "marker": marker, "linewidth": 2.5, "label": label}
            curves = method["curves"]
            errors.plot(curves["steps"], curves["winner_change"], **style)
            scores.plot(curves["steps"], [point["mean"] for point in curves["oracle"]], **style)
    for panel, before, meaning in ((errors, 0.0, "up is worse"), (scores, results["base"]["oracle"], "up is better")):
        panel.axhline(before, color="black", linestyle=":", linewidth=1.5)
        panel.set_ylabel(meaning, fontsize=13)
    errors.annotate("before training", (240, 0), (0, -15), textcoords="offset points", ha="right", fontsize=12)
    errors.set_ylim(bottom=-0.06)
    errors.legend(fontsize=13, frameon=False, loc="upper left")
    scores.set_xlabel("training step", fontsize=13)
    return figure


def draw_front() -> Figure:
    """Draw the score against the change of the winners' error, and this change by noise bin."""
    rows = defaultdict(list)
    for line in FRONT_RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["pairs"] == "off_policy" and row["push"] == "stress" and row["rule"] in RULES:
            rows[row["rule"], row["strength"]].append(row["measured"]["final"]["raw"])
    titles = "Score, by the change of the winners' error", "Change of the winners' error, by noise bin"
    figure, score, bins = two_panels(9.4, *titles, height_ratios=(3, 2))
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
        _, color, marker = RULES[rule]
        bins.plot(100 * levels, color=color, marker=marker, linewidth=2)
    score.axvline(0, color="black", linewidth=1)
    score.set_xscale("symlog", linthresh=0.001)
    score.set_xlabel("change of the winners' error", fontsize=13)
    score.set_ylabel("oracle score", fontsize=13)
    score.legend(fontsize=12, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=1)
    bins.axhline(0, color="black", linewidth=1)
    bins.set_xlabel("noise bin, from clean to noisy (mu 0.6 or 0.8)", fontsize=13)
    bins.set_ylabel("per cent", fontsize=13)
    return figure


# ---- Images of equal noise ------------------------------------------------------------------------------------------

SEED = 3
NOISES = 4  # initial noises of each prompt, from which the best image of the base is taken
ROWS = 4
SHAPES = ("square", "triangle")  # at 32 pixels, the base's circles and crosses are hard to tell from these
# Title -> row of the plan, and scale of classifier-free guidance. The scales are those of the page "Measurements".
COLUMNS = {
    "base": (BASE, 5.0),
    "DPO": ("DPO", 3.0),
    "loose SDPO": ("loose SDPO", 2.0),
    "recipe": ("recipe", 5.0),
    "recipe, guided\nat low noise": ("recipe, guided 4 at low noise", 3.0),
}


def draw_guidance() -> Figure:
    """Draw images by the base model and the tuned ones, in a column each."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("trl_diffusion_sdpo").setLevel(logging.ERROR)
    study = Study(load_plan("guided_front"), Path("bench_output/guided_front"))
    prompts, latents = drawn_prompts(study)
    figure = Figure(figsize=(1.55 * len(COLUMNS), 1.75 * len(prompts)), dpi=110)
    axes = figure.subplots(len(prompts), len(COLUMNS))
    for index, (title, (row, scale)) in enumerate(COLUMNS.items()):
        images = images_of_row(study, row, scale, prompts, latents)
        scores = oracle(images, prompts)
        axes[0, index].set_title(title, fontsize=11)
        for line, image in enumerate(images):
            axis = axes[line, index]
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"{scores[line]:.2f}", fontsize=10)
    for line, prompt in enumerate(prompts):
        axes[line, 0].set_ylabel(prompt.replace(" on ", "\non "), fontsize=10)
    figure.tight_layout(pad=0.5)
    return figure


def drawn_prompts(study: Study) -> tuple[list[str], torch.Tensor]:
    """Return prompts that the base model draws well, each of another colour, and the noise of each. The base often
    draws another shape than the prompt names."""
    prompts = [prompt for prompt in study.prompts["final"] for _ in range(NOISES)]
    latents = torch.randn(len(prompts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(SEED))
    images = generate_images(load_base_pipeline(), prompts, latents, guidance_scale=COLUMNS["base"][1])
    scores = oracle(images, prompts).numpy()
    shapes = oracle_parts(images, prompts).shape  # 0 for another shape
    content = {caption.text: caption for caption in captions()}
    best: dict[str, int] = {}  # colour -> index of its best image
    for index in np.argsort(-scores):
        caption = content[prompts[index]]
        if shapes[index] > 0 and caption.shape in SHAPES:
            best.setdefault(caption.colour, int(index))
    chosen = list(best.values())[:ROWS]
    return [prompts[index] for index in chosen], latents[chosen]


def images_of_row(study: Study, row: str, guidance_scale: float, prompts: list[str], latents: torch.Tensor) -> Any:
    settings = {} if row == BASE else study.plan["rows"][row]
    pipeline = load_base_pipeline()
    if row != BASE:
        pipeline.unet.load_state_dict(study.trained(settings.get("of", row), SEED, "trained"))
    context = study.guidance(settings, SEED)
    with torch.no_grad():
        return generate_images(pipeline, prompts, latents, guidance_scale=guidance_scale, context=context)


PICTURES = {"demo": draw_demo, "front": draw_front, "guidance": draw_guidance}

if __name__ == "__main__":
    PICTURES[sys.argv[1]]().savefig(sys.argv[2])
