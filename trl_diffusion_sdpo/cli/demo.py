"""`trl-diffusion-sdpo demo`: the main job on the embedded world."""

import argparse
import logging

from .options import OneLineParser

PAIRS = ("off_policy", "on_policy")


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Tune the embedded tiny pipeline from the same start with the same pairs (SFT, Diffusion-DPO, "
            "Diffusion-SDPO, and a recipe for keeping winners), then write curves, a before/after image grid and "
            "a table to one folder."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", default="demo_output", help="Folder for everything that the demo writes.")
    parser.add_argument("--seed", type=int, default=0, help="Decides the pairs, the noise and the sampled images.")
    parser.add_argument(
        "--max_steps", type=int, default=None, help="Optimizer steps of each run; the demo's if unset."
    )
    parser.add_argument(
        "--pairs",
        choices=PAIRS,
        default="off_policy",
        help="Pairs of two drawn images (off_policy) or of two samples of the base model (on_policy).",
    )
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    from ..demo.story import run_demo  # seconds: after the arguments are known to be good

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger(f"{__package__.partition('.')[0]}.demo").setLevel(logging.INFO)
    result = run_demo(
        output_dir=options.output_dir, seed=options.seed, max_steps=options.max_steps, pairs=options.pairs
    )
    print(result.summary)
    return 0
