"""`trl-diffusion-sdpo export`: the LoRA of a run in a file format of other tools."""

import argparse

from . import EXIT_OK
from .options import OneLineParser

FORMATS = ("kohya",)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Write the LoRA of a run in the file format of other tools: kohya's scripts, ComfyUI, AUTOMATIC1111's web "
            "UI, Forge."
        ),
    )
    add = parser.add_argument
    add("--run", required=True, metavar="FOLDER", help="Output folder of the run, or one of its checkpoints.")
    add("--output", required=True, metavar="FILE", help="The new file; its name ends in .safetensors.")
    add("--format", choices=FORMATS, default=FORMATS[0], help="The format (default: kohya).")
    add("--average", action="store_true", help="Export the averaged weights of `ema_decay`.")
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    from ..saving.lora_export import export_kohya  # takes seconds: after the arguments are checked

    tensors = export_kohya(options.run, options.output, average=options.average)
    count = sum(key.endswith(".alpha") for key in tensors)
    print(f"The LoRA of {count} modules is in {options.output}.")
    return EXIT_OK
