"""`trl-diffusion-sdpo pairs from-images`: a folder of own images, with their prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import EXIT_OK
from .options import OneLineParser


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Read the prompts of the images in a folder, and write manifest.jsonl, which `pairs pick` reads. A prompt "
            "is in a text file beside the image, or in its metadata, as A1111, Forge, ComfyUI and SwarmUI write them. "
            "Images are never changed. Call it again when you have added images: your picks stay."
        ),
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="Folder of images, with subfolders.")
    add("--liked", nargs="+", metavar="NAME", help="Names of subfolders of images that you like; `liked` and others.")
    add("--disliked", nargs="+", metavar="NAME", help="Names of subfolders of images that you do not like.")
    add("--from_names", action="store_true", help="Use the name of an image as its prompt if it has no other.")
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    from ..pairing.own_images import DISLIKED, LIKED, list_images

    liked, disliked = (
        tuple(name.lower() for name in names or usual)
        for names, usual in ((options.liked, LIKED), (options.disliked, DISLIKED))
    )
    lines = list_images(Path(options.folder), liked=liked, disliked=disliked, from_names=options.from_names)
    print("\n".join(lines))
    print(f"Go on with: trl-diffusion-sdpo pairs pick {options.folder}")
    return EXIT_OK
