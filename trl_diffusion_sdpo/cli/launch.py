"""Run the same command again under `accelerate launch`, for `trl-diffusion-sdpo train --accelerate_config NAME`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ..utils.errors import UserError
from . import EXIT_INTERRUPTED, EXIT_OK
from .options import option_name, read_yaml, refuse_unknown

CONFIGS = Path(__file__).parent / "accelerate_configs"
MODULE = f"{__package__}.main"
# Environment variable that marks processes which this module has started.
LAUNCHED_VARIABLE = "TRL_DIFFUSION_SDPO_LAUNCHED"

# Seconds that torch's launcher waits between Ctrl-C and killing its processes. Its default of 30 is too short for a
# large model to end its step and write a checkpoint.
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SHUTDOWN_SECONDS = "600"

# Arguments of `accelerate launch` that this module sets, and a note that accelerate keeps among them.
_RESERVED = {"config_file", "module", "no_python", "training_script", "training_script_args", "nondefault"}


def config_names() -> list[str]:
    """Return the names of the accelerate configurations in this package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def config_path(name: str) -> Path:
    """Return the path of an accelerate configuration. `name` is the name of a packaged configuration, or a path."""
    if name in config_names():
        return CONFIGS / f"{name}.yaml"
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"`--accelerate_config` must be one of {', '.join(config_names())}, or the path of an "
            f"accelerate configuration, got {name!r}."
        )
    return path


def launch_options() -> set[str]:
    """Return the names of the options of `accelerate launch` that users can set."""
    settable, _ = _launch_parser().parse_known_args([MODULE])
    return set(vars(settable)) - _RESERVED


def launch_words(config: str, words: list[str], options: Iterable[str]) -> list[str]:
    """Return the arguments of `accelerate launch` that come before the name of the script.

    Args:
        config (`str`): Name of one of the package's accelerate configurations, or path of an accelerate configuration
            file.
        words (`list[str]`): Options of `accelerate launch`.
        options (`Iterable[str]`): Names of this command's options. The error for a misspelt option suggests one of
            these names.
    """
    if "LOCAL_RANK" in os.environ:
        raise UserError(
            "`accelerate_config` makes this command start the training processes, but torchrun or `accelerate launch` "
            "has already started them. Leave out `accelerate_config`. With `accelerate launch`, pass the configuration "
            "as `--config_file`."
        )
    file = config_path(config)
    settings = read_yaml(file)
    names = launch_options()
    refuse_unknown([word for word in words if option_name(word) not in {None, *names}], [*names, *options])
    parsed, _ = _launch_parser().parse_known_args([*words, MODULE])
    if parsed.training_script != MODULE:
        refuse_unknown([parsed.training_script], ())
    if parsed.num_processes is None and "num_processes" not in settings and settings.get("distributed_type") != "NO":
        import torch  # imported late because it takes seconds

        devices = torch.accelerator.device_count()
        if devices == 0:
            raise UserError("The number of processes is unknown on a machine without GPUs. Set `--num_processes`.")
        machines = parsed.num_machines or int(settings.get("num_machines", 1))
        words = ["--num_processes", str(devices * machines), *words]
    return ["--config_file", str(file), *words]


def start(words: list[str], command: str, arguments: list[str]) -> int:
    """Run a command in processes that accelerate launches, and wait until it ends.

    Args:
        words (`list[str]`): Arguments of `accelerate launch`, which [`launch_words`] returns.
        arguments (`list[str]`): Arguments of the command, as the user typed them. The started processes ignore options
            of `accelerate launch` among these arguments.

    Returns:
        `int`: The exit code. 0 after success, 130 after an interruption, or else the exit code of the first process
            that failed.
    """
    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parsed = _launch_parser().parse_args([*words, "-m", MODULE, command, *arguments])
    seconds = os.environ.get(SHUTDOWN_VARIABLE, SHUTDOWN_SECONDS)
    # Ctrl-C also reaches the child processes, which write a checkpoint before they end. This process ignores Ctrl-C and
    # waits for the child processes. With several child processes, torch's launcher uses its own handler.
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        with patch_environment(**{LAUNCHED_VARIABLE: "1", SHUTDOWN_VARIABLE: seconds}):
            launch_command(parsed)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    except SignalException:
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, previous)
    return EXIT_OK


def _launch_parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser  # imported late because it configures logging

    return launch_command_parser()
