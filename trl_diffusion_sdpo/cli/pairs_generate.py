"""`trl-diffusion-sdpo pairs generate`: pairs of a model's own images, chosen by scorers."""

from __future__ import annotations

import argparse
import logging

from . import EXIT_OK
from .errors import reading_data
from .evaluate import DTYPES, candidate_of
from .options import OneLineParser
from .scorers import load_scorers, mapping_option


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Generate several images of each prompt, score them, and pair the best with the worst. Without scorers, "
            "the folder is for `pairs pick`. A second call goes on where the first ended. Under `accelerate launch -m "
            "trl_diffusion_sdpo pairs generate` all processes share the work."
        ),
    )
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="A Hub id, a folder of a pipeline or a run; MODEL+LORA too.")
    add(
        "--recipe",
        choices=["scored", "negatives", "spin", "partial", "local"],
        default="scored",
        help="`scored`: as said above (default). `negatives` pairs each image with one of the same noise, generated "
        "with `--negative_kwargs`. The others pair each image of `--from_images` with a loser that the model makes: "
        "`spin` from its prompt alone, `partial` by noising the image and denoising it, `local` by drawing a region of "
        "it anew, whose mask is kept for training.",
    )
    add(
        "--negative_kwargs",
        type=mapping_option,
        default={"guidance_scale": 1.0},
        metavar="JSON",
        help="Arguments of the pipeline's call for the losers of `negatives` (default: no guidance).",
    )
    add("--from_images", metavar="FOLDER", help="Good images, a folder of `pairs from-images`.")
    add("--strength", type=float, default=0.6, metavar="X", help="Noise of `partial` and `local` (default: 0.6).")
    add("--prompts", metavar="FILE", help="Prompts: a .txt, .json, .jsonl or .csv file, or a data set.")
    add("--prompt_column", metavar="NAME", help="Column of the prompts; `prompt`, `caption` or `text` if unset.")
    add("--prompt_split", default="train", metavar="NAME", help="Split of a data set of prompts (default: train).")
    add("--max_prompts", type=int, metavar="N", help="Use the first N prompts only.")
    add("--images", type=int, default=4, metavar="K", help="Images of each prompt (default: 4).")
    add("--first_seed", type=int, default=0, metavar="N", help="Seeds are N, N + 1, ... (default: 0).")
    add("--scorers", nargs="+", default=[], metavar="NAME", help="Scorers, or your own `module:function`.")
    add("--scorer_settings", type=mapping_option, default={}, metavar="JSON", help="Settings of scorers by name.")
    add("--weights", type=mapping_option, default={}, metavar="JSON", help='Weights, such as {"pickscore": 2}.')
    add(
        "--combination",
        choices=["weighted", "majority", "pareto"],
        default="weighted",
        help="How several scorers choose: by their weighted z-scores, by majority, or only where none disagrees.",
    )
    add("--margin", type=float, metavar="X", help="All pairs whose rewards differ by X; best and worst if unset.")
    add("--call_kwargs", type=mapping_option, default={}, metavar="JSON", help="Arguments of the pipeline's call.")
    add("--batch_size", type=int, default=4, metavar="N", help="Images generated at once (default: 4).")
    add("--dtype", choices=DTYPES, default="float32", help="Dtype of the pipeline (default: float32).")
    add("--device", metavar="NAME", help="Device of pipeline and scorers; the fastest there is if unset.")
    add("--output_dir", required=True, metavar="FOLDER", help="Folder of images, scores and pairs.jsonl.")
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    import torch
    from accelerate import PartialState

    from ..evaluation.images import ImageSettings
    from ..evaluation.prompts import read_prompts
    from ..pairing.generate import Pairing, generate_pairs, pairs_of_negatives
    from ..pairing.recipes import pairs_from_images

    reads_prompts = options.recipe in ("scored", "negatives")
    wanted, other = options.prompts, options.from_images
    if not reads_prompts:
        wanted, other = other, wanted
    if wanted is None or other is not None:
        raise ValueError(
            f"The recipe `{options.recipe}` reads {'`--prompts`' if reads_prompts else '`--from_images`'} alone, got "
            f"prompts {options.prompts} and images {options.from_images}."
        )
    if options.recipe != "scored" and options.scorers:
        raise ValueError(f"`--scorers` belong to the recipe `scored`, got {options.recipe}. Leave them out.")
    pairing = Pairing(options.combination, options.weights, options.margin)
    state = PartialState(cpu=options.device == "cpu")
    device = options.device or str(state.device)
    settings = ImageSettings(
        seeds=tuple(range(options.first_seed, options.first_seed + options.images)),
        call_kwargs=options.call_kwargs,
        batch_size=options.batch_size,
        dtype=getattr(torch, options.dtype),
        device=device,
    )
    model = candidate_of(f"model={options.model}")
    folder = options.output_dir
    if reads_prompts:
        with reading_data(options.prompts):
            prompts = read_prompts(options.prompts, column=options.prompt_column, split=options.prompt_split)
        if options.max_prompts is not None:
            prompts = prompts.first(options.max_prompts)
        scorers = load_scorers(options.scorers, options.scorer_settings)
        if options.recipe == "scored":
            pairs = generate_pairs(model, prompts, scorers, folder, settings, pairing)
        else:
            pairs = pairs_of_negatives(model, prompts, folder, settings, options.negative_kwargs)
        if state.is_main_process:
            skipped = f" ({prompts.empty} empty and {prompts.duplicates} repeated prompts were skipped)"
            note = skipped if prompts.empty or prompts.duplicates else ""
            if pairs:
                print(f"{pairs} pairs of {len(prompts.prompts)} prompts{note} are in {folder}/pairs.jsonl.")
                print(f"Look at them with: trl-diffusion-sdpo pairs check {folder} --sheet pairs.html")
            else:
                print(f"Images of {len(prompts.prompts)} prompts{note} are in {folder}.")
                print(f"Go on with: trl-diffusion-sdpo pairs pick {folder}")
    else:
        pairs = pairs_from_images(options.recipe, model, options.from_images, folder, settings, options.strength)
        if state.is_main_process:
            print(f"{pairs} pairs are in {folder}/pairs.jsonl. Its README.md says how to train on them.")
    state.wait_for_everyone()  # a launcher ends the other processes when the first has exited
    state.destroy_process_group()  # otherwise its threads can abort the process while Python exits
    return EXIT_OK
