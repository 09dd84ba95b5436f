"""`trl-diffusion-sdpo demo`: compare training methods on a tiny model that is part of the package."""

import argparse
import logging

from . import EXIT_OK
from .options import OneLineParser


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Train a tiny model of the package with several methods on the same pairs: SFT, Diffusion-DPO, "
            "Diffusion-SDPO as published, and Diffusion-SDPO with stricter settings that protect the chosen images. "
            "Then generate images with each, with and without classifier-free guidance, and write scores, curves, "
            "images and a table to a folder."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", default="demo_output", help="Folder to write into.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the pairs, the noise and the generated images.")
    parser.add_argument("--max_steps", type=int, default=None, help="Optimizer steps per method; 240 if unset.")
    parser.add_argument(
        "--write_pairs",
        metavar="FOLDER",
        help="Only write the pairs: a folder of images that `train --dataset_name` reads.",
    )
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    folder = vars(options).pop("write_pairs")
    if folder is not None:
        return _write_pairs(folder, options.seed)
    import diffusers.utils.logging as diffusers_logging  # imported late because it takes seconds
    import transformers.utils.logging as transformers_logging

    from ..tools.demo.comparison import run_demo
    from ..tools.demo.report import FILES, summary

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # the bars for loading weights would break up the bars for training
    result = run_demo(**vars(options))
    print(f"{summary(result)}\n\nFiles in {options.output_dir}: {', '.join(FILES)}.")
    return EXIT_OK


def _write_pairs(folder: str, seed: int) -> int:
    from ..tools.demo.pairs import eval_pairs, off_policy_pairs, write_pairs  # imported late because it takes seconds
    from ..tools.demo.pipeline import base_pipeline_folder

    splits = {"train": off_policy_pairs(seed), "test": eval_pairs(seed)}
    written = write_pairs(splits, folder)
    counts = " and ".join(f"{len(pairs)} pairs in {written / name}" for name, pairs in splits.items())
    print(
        f"Wrote {counts}. To train a LoRA of the tiny model on them:\n\ntrl-diffusion-sdpo train --model_name_or_path "
        f"{base_pipeline_folder()} \\\n    --dataset_name {written} --output_dir shapes-lora --use_peft --max_steps 20"
    )
    return EXIT_OK
