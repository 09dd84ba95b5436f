"""`trl-diffusion-sdpo pairs push`: publish a folder of pairs on the Hub."""

from __future__ import annotations

import argparse
import logging

from . import EXIT_OK
from .options import OneLineParser


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Upload the pairs of a folder to the Hub as a data set, images included, with the folder's README.md as "
            "its page. Log in before, with `hf auth login`. `train --dataset_name REPO` then reads it."
        ),
    )
    parser.add_argument("folder", metavar="FOLDER", help="Folder of `pairs pick` or `pairs generate`.")
    parser.add_argument("repo", metavar="REPO", help="Name on the Hub, such as me/my-taste.")
    parser.add_argument("--private", action="store_true", help="Make a new data set private.")
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    from ..pairing.publish import push_pairs

    pairs = push_pairs(options.folder, options.repo, private=options.private)
    print(f"{pairs} pairs are at https://huggingface.co/datasets/{options.repo}.")
    return EXIT_OK
