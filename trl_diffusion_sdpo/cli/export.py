"""`trl-diffusion-sdpo export`: convert the LoRA of a training run to a file format of other tools."""

import argparse

from . import EXIT_OK
from .options import OneLineParser


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Convert the LoRA of a training run to the file format of other tools: kohya's scripts, ComfyUI, "
            "AUTOMATIC1111's web UI and Forge."
        ),
    )
    add = parser.add_argument
    add("--run", required=True, metavar="FOLDER", help="Output folder of the run, or one of its checkpoints.")
    add("--output", required=True, metavar="FILE", help="File to write; its name must end in .safetensors.")
    add("--average", action="store_true", help="Export the averaged weights (of `ema_decay`).")
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    from ..saving.lora_export import export_kohya  # takes seconds

    tensors = export_kohya(options.run, options.output, average=options.average)
    count = sum(key.endswith(".alpha") for key in tensors)
    print(f"Wrote a LoRA of {count} modules to {options.output}.")
    return EXIT_OK
