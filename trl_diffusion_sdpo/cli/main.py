"""Entry point of `trl-diffusion-sdpo`: find the command, run it, report errors."""

import os
import sys
from importlib import import_module

from .. import __version__
from ..utils.errors import UserError
from ..utils.hints import did_you_mean
from ..utils.import_utils import hide_idle_notes
from . import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR
from .errors import sentence

PROGRAM = "trl-diffusion-sdpo"
TRACEBACK_VARIABLE = "TRL_DIFFUSION_SDPO_TRACEBACK"

# Command -> help. Each is a module in this folder with a function `run(arguments, prog)`, which returns the exit code.
COMMANDS = {
    "train": "Tune a pipeline on preference pairs.",
    "encode": "Encode images and prompts once, for training runs with the same options.",
    "plan": "Compute the peak memory of a training run, without starting it.",
    "evaluate": "Compare models: generate images, score them, and write win rates and a report.",
    "pairs": "Make preference pairs from images by scorers or by your own picks, and score and check them.",
    "export": "Convert the LoRA of a training run for ComfyUI, AUTOMATIC1111 and other tools.",
    "demo": "Compare training methods on a tiny model of the package.",
    "env": "Print the package versions for a bug report.",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command of the program and return the exit code.

    Args:
        argv (`list[str]`, *optional*): The command and its arguments; `sys.argv[1:]` if unset.

    Returns:
        `int`: The exit code: 0 on success and for help, 2 for a user error, 130 after an interruption.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return EXIT_OK
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return EXIT_OK
    name, *rest = arguments
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        print(
            f"{PROGRAM}: there is no command {name!r}. The commands are {', '.join(COMMANDS)}.{near}", file=sys.stderr
        )
        return EXIT_USER_ERROR
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    prog = f"{PROGRAM} {name}"
    hide_idle_notes()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log file, each update of the bar would be a new line
    try:
        module = import_module(f".{name.replace('-', '_')}", __package__)
        return module.run(arguments, prog)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:  # other errors keep their traceback
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        print(f"{prog}: error: {sentence(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [--OPTION VALUE ...]\n\nPreference tuning of text-to-image diffusers "
        f"pipelines.\n\ncommands:\n{commands}\n\n`{PROGRAM} COMMAND --help` lists the options of a command. Set "
        f"{TRACEBACK_VARIABLE}=1 for the traceback of an error."
    )


if __name__ == "__main__":
    sys.exit(main())
