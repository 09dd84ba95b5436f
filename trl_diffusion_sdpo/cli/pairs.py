"""`trl-diffusion-sdpo pairs`: commands that make and check pairs."""

from __future__ import annotations

import argparse
from importlib import import_module

from .options import OneLineParser

# Sub-command -> help. Each is a module of this folder, `pairs_` and its name with underscores for dashes, and has
# `run(arguments, prog) -> int` and `make_parser(prog)`.
SUBCOMMANDS = {
    "generate": "Generate several images of each prompt by a model, and pair the best with the worst by scorers.",
    "pick": "Show two images of a prompt at a time, and save which one you prefer.",
    "from-images": "List a folder of your own images with the prompts in their files, and leave out duplicates.",
    "push": "Upload the pairs of a folder to the Hub, with their card.",
    "check": "Say what training would read of a data set of pairs, and what it would drop, and why.",
}


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    width = max(map(len, SUBCOMMANDS))
    listed = "\n".join(f"  {name:{width}}  {text}" for name, text in SUBCOMMANDS.items())
    parser = OneLineParser(
        prog=prog,
        usage=f"{prog} SUBCOMMAND ...",
        description=f"Make pairs of images from your own taste, and check them.\n\nsub-commands:\n{listed}",
        epilog=f"`{prog} SUBCOMMAND --help` lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subcommand", choices=list(SUBCOMMANDS), help=argparse.SUPPRESS)
    return parser


def run(arguments: list[str], prog: str) -> int:
    name = make_parser(prog).parse_args(arguments[:1]).subcommand
    return module_of(name).run(arguments[1:], f"{prog} {name}")


def module_of(name: str):
    """Return the module of a sub-command."""
    return import_module(f".pairs_{name.replace('-', '_')}", __package__)
