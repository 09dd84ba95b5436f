"""`trl-diffusion-sdpo pairs check`: what training would read of a data set of pairs."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from . import EXIT_OK
from .errors import reading_data
from .options import OneLineParser
from .scorers import mapping_option, scorer_named


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Read a data set of pairs as `train` does, and say how many pairs there are, what is dropped and why, and "
            "what looks wrong. Nothing is trained."
        ),
    )
    add = parser.add_argument
    add("data", metavar="PATH", help="Data set: a folder, a file or an id of the Hub, as for `--dataset_name`.")
    add("--split", default="train", metavar="NAME", help="Split of the data set (default: train).")
    add("--dataset_format", metavar="NAME", help="Format of the columns; detected if unset.")
    add("--resolution", type=int, default=512, metavar="N", help="Side of the images in training (default: 512).")
    add("--min_side", type=int, metavar="N", help="Drop pairs with an image whose shorter side is smaller.")
    add("--look_at", type=int, default=500, metavar="N", help="Pairs to compare, score and show (default: 500).")
    add("--scorer", metavar="NAME", help="Scorer, such as pickscore, or your own `module:function`.")
    add("--scorer_settings", type=mapping_option, default={}, metavar="JSON", help='Such as {"device": "cuda"}.')
    add("--sheet", metavar="FILE", help="Write a contact sheet of the pairs to this HTML file.")
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    from ..data import PairOptions, PairTransform, load_pairs
    from ..pairing.check import check_pairs

    sheet = None if options.sheet is None else Path(options.sheet)
    if sheet is not None and not sheet.absolute().parent.is_dir():
        raise ValueError(f"`--sheet` must be a file in a folder that exists, got {sheet}.")
    scorer = None if options.scorer is None else scorer_named(options.scorer, **options.scorer_settings)
    reading = PairOptions(
        PairTransform(options.resolution),
        dataset_format=options.dataset_format,
        verify_images="all",
        min_side=options.min_side or 1,
        compare=False,
    )
    path = Path(options.data).expanduser()
    folder = path if path.is_dir() else path.parent
    with reading_data(options.data):
        dataset = load_pairs(options.data, options.split)
        lines = check_pairs(dataset, reading, look_at=options.look_at, scorer=scorer, sheet=sheet, folder=folder)
    print("\n".join(lines))
    if sheet is not None:
        print(f"The contact sheet is {sheet}.")
    return EXIT_OK
