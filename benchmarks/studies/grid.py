"""Draw the picture of preference guidance: images of equal noise by the base model and the tuned ones.

The rows are those of the plan `guided_front`, trained with one seed. The embedded world's base often draws another
shape than the prompt names. The picture has squares and triangles, one for each colour, each at the noise from which
the base draws it best. Weights that the study has trained are read, others are trained first.

    python benchmarks/studies/grid.py docs/images/guidance_grid.png
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from study import BASE, Study, load_plan

from trl_diffusion_sdpo.demo.oracle import oracle, oracle_parts
from trl_diffusion_sdpo.demo.pipeline import LATENT_SHAPE, generate_images, load_base_pipeline
from trl_diffusion_sdpo.demo.world import captions

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


def drawn_prompts(study: Study) -> tuple[list[str], torch.Tensor]:
    """Return prompts that the base model draws well, each of another colour, and the noise of each."""
    prompts = [prompt for prompt in study.prompts["final"] for _ in range(NOISES)]
    latents = torch.randn(len(prompts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(SEED))
    images = generate_images(load_base_pipeline(), prompts, latents, guidance_scale=COLUMNS["base"][1])
    scores = oracle(images, prompts).numpy()
    shapes = oracle_parts(images, prompts).shape  # 0 for another shape
    content = {caption.text: caption for caption in captions()}
    places: dict[str, int] = {}  # by colour
    for place in np.argsort(-scores):
        caption = content[prompts[place]]
        if shapes[place] > 0 and caption.shape in SHAPES:
            places.setdefault(caption.colour, int(place))
    chosen = list(places.values())[:ROWS]
    return [prompts[place] for place in chosen], latents[chosen]


def column(study: Study, row: str, guidance_scale: float, prompts: list[str], latents: torch.Tensor) -> Any:
    """Return the images of a row."""
    settings = {} if row == BASE else study.plan["rows"][row]
    pipeline = load_base_pipeline()
    if row != BASE:
        pipeline.unet.load_state_dict(study.trained(settings.get("of", row), SEED, "trained"))
    context = study.guidance(settings, SEED)
    with torch.no_grad():
        return generate_images(pipeline, prompts, latents, guidance_scale=guidance_scale, context=context)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="file of the picture")
    parser.add_argument("--weights", type=Path, default=Path("bench_output/guided_front"), help="folder of the study")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("trl_diffusion_sdpo").setLevel(logging.ERROR)
    study = Study(load_plan("guided_front"), options.weights)
    prompts, latents = drawn_prompts(study)
    figure, axes = plt.subplots(len(prompts), len(COLUMNS), figsize=(1.55 * len(COLUMNS), 1.75 * len(prompts)))
    for index, (title, (row, scale)) in enumerate(COLUMNS.items()):
        images = column(study, row, scale, prompts, latents)
        scores = oracle(images, prompts)
        for line, image in enumerate(images):
            axis = axes[line, index]
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"{scores[line]:.2f}", fontsize=10)
            if line == 0:
                axis.set_title(title, fontsize=11)
            if index == 0:
                axis.set_ylabel(prompts[line].replace(" on ", "\non "), fontsize=10)
    figure.tight_layout(pad=0.5)
    figure.savefig(options.picture, dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
