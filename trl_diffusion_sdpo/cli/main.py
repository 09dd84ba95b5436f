"""The entry point `trl-diffusion-sdpo`: its commands and exit codes."""

import os
import sys
from importlib import import_module

from .. import __version__
from ..utils.hints import did_you_mean
from ..utils.import_utils import MissingExtraError, hide_idle_notes
from ..utils.own_errors import is_own
from . import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR
from .errors import sentence

PROGRAM = "trl-diffusion-sdpo"
TRACEBACK_VARIABLE = "TRL_DIFFUSION_SDPO_TRACEBACK"

# Command -> help. Each is a module of this folder, with underscores for dashes, and has `run(arguments, prog) -> int`,
# which returns the exit code.
COMMANDS = {
    "train": "Tune a pipeline on preference pairs.",
    "encode": "Encode images and prompts once, for later runs with the same options.",
    "plan": "Compute the memory and time that a run needs.",
    "evaluate": "Compare models by scorers: images, win rates and a report.",
    "pairs": "Make pairs from your own images and your own picks, and check them.",
    "export": "Write the LoRA of a run for ComfyUI, AUTOMATIC1111 and others.",
    "demo": "Train on the embedded world and plot the results.",
    "env": "Print the versions that a bug report needs.",
}


# If this package raised one of these errors, only its message is shown. Other errors need their traceback.
_EXPLAINED = (ValueError, OSError, FloatingPointError, MissingExtraError)


def main(argv: list[str] | None = None) -> int:
    """Run a command.

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
        print(f"{PROGRAM}: there is no command {name!r}; there are {', '.join(COMMANDS)}.{near}", file=sys.stderr)
        return EXIT_USER_ERROR
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    prog = f"{PROGRAM} {name}"
    hide_idle_notes()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log file would get a line for each update of a bar
    try:
        module = import_module(f".{name.replace('-', '_')}", __package__)
        return module.run(arguments, prog)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except _EXPLAINED as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1" or not is_own(error):
            raise
        print(f"{prog}: error: {sentence(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [--OPTION VALUE ...]\n\n"
        "Preference tuning of text-to-image diffusers pipelines.\n\n"
        f"commands:\n{commands}\n\n"
        f"`{PROGRAM} COMMAND --help` lists a command's options. Errors of this package are one line; set "
        f"{TRACEBACK_VARIABLE}=1 to see where they come from. Errors of libraries have a traceback."
    )


if __name__ == "__main__":
    sys.exit(main())
