"""Draw the picture of preference guidance: images of equal noise by the base model and the tuned ones.

The rows are those of the plan `guided_front`, trained with one seed. The embedded world's base often draws another
shape than the prompt names. The picture has prompts whose shape it mostly draws, each at a noise from which it draws
it. Weights that the study has trained are read, others are trained first.

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

from trl_diffusion_sdpo.demo.oracle import oracle_parts, oracle_score
from trl_diffusion_sdpo.demo.pipeline import LATENT_SHAPE, generate_images, load_base_pipeline
from trl_diffusion_sdpo.demo.world import captions

SEED = 3
NOISES = 4  # initial noises of each prompt, from which the shapes of the base are judged
DRAWN = 3  # of them from which the base must draw the shape
ROWS_OF_A_SHAPE = 2
# Title -> row of the plan, and scale of classifier-free guidance. The scales are those of the page "Measurements".
COLUMNS = {
    "base": (BASE, 5.0),
    "DPO": ("DPO", 3.0),
    "loose SDPO": ("loose SDPO", 2.0),
    "recipe": ("recipe", 5.0),
    "recipe, guided\nat low noise": ("recipe, guided 4 at low noise", 3.0),
}


def drawn_prompts(study: Study) -> tuple[list[str], torch.Tensor]:
    """Return prompts whose shape the base model draws, each of another colour, and the noise of each."""
    prompts = [prompt for prompt in study.prompts["final"] for _ in range(NOISES)]
    latents = torch.randn(len(prompts), *LATENT_SHAPE, generator=torch.Generator().manual_seed(SEED))
    images = generate_images(load_base_pipeline(), prompts, latents, guidance_scale=COLUMNS["base"][1])
    shapes = oracle_parts(images, prompts).shape.reshape(-1, NOISES)  # 0 if it looks like another shape
    content = {caption.text: caption for caption in captions()}
    chosen: list[int] = []
    for index in np.argsort(-shapes.mean(axis=1)):
        caption = content[prompts[index * NOISES]]
        others = [content[prompts[other * NOISES]] for other in chosen]
        is_full = sum(other.shape == caption.shape for other in others) == ROWS_OF_A_SHAPE
        if (shapes[index] > 0).sum() >= DRAWN and not is_full and caption.colour not in {o.colour for o in others}:
            chosen.append(int(index))
    places = [index * NOISES + int(np.argmax(shapes[index] > 0)) for index in chosen]
    return [prompts[place] for place in places], latents[places]


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
        scores = oracle_score(images, prompts)
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
