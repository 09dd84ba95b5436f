"""Run the same command under `accelerate launch`, for `trl-diffusion-sdpo train --accelerate_config NAME`."""

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
# Marks the processes that this module has started.
LAUNCHED_VARIABLE = "TRL_DIFFUSION_SDPO_LAUNCHED"

# Seconds from Ctrl-C until torch's launcher kills its processes. In its default of 30, a large model cannot end its
# step and write a checkpoint.
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SHUTDOWN_SECONDS = "600"

# Arguments of `accelerate launch` that this module sets, and a note of accelerate's among them.
_RESERVED = {"config_file", "module", "no_python", "training_script", "training_script_args", "nondefault"}


def config_names() -> list[str]:
    """Return the names of the accelerate configurations in this package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def config_path(name: str) -> Path:
    """Return the path of an accelerate configuration, by the name of a packaged one or by its path."""
    if name in config_names():
        return CONFIGS / f"{name}.yaml"
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"`--accelerate_config` must be one of {', '.join(config_names())}, or the path of a configuration of "
            f"accelerate, got {name!r}."
        )
    return path


def launch_options() -> set[str]:
    """Return the options of `accelerate launch` that users can set."""
    settable, _ = _launch_parser().parse_known_args([MODULE])
    return set(vars(settable)) - _RESERVED


def launch_words(config: str, words: list[str], options: Iterable[str]) -> list[str]:
    """Return the arguments of `accelerate launch` that come before the name of the script.

    Args:
        config (`str`): Name of a packaged accelerate configuration, or path of one.
        words (`list[str]`): Options of `accelerate launch`.
        options (`Iterable[str]`): This command's options, to suggest for a misspelt one.
    """
    if "LOCAL_RANK" in os.environ:
        raise UserError(
            "`accelerate_config` starts the training processes, but torchrun or `accelerate launch` has already "
            "started them. Leave it out; with `accelerate launch`, pass the configuration as `--config_file`."
        )
    file = config_path(config)
    settings = read_yaml(file)
    names = launch_options()
    refuse_unknown([word for word in words if option_name(word) not in {None, *names}], [*names, *options])
    parsed, _ = _launch_parser().parse_known_args([*words, MODULE])
    if parsed.training_script != MODULE:
        refuse_unknown([parsed.training_script], ())
    if parsed.num_processes is None and "num_processes" not in settings and settings.get("distributed_type") != "NO":
        import torch  # takes seconds

        devices = torch.accelerator.device_count()
        if devices == 0:
            raise UserError("The number of processes is unknown on a machine without GPUs. Set `--num_processes`.")
        machines = parsed.num_machines or int(settings.get("num_machines", 1))
        words = ["--num_processes", str(devices * machines), *words]
    return ["--config_file", str(file), *words]


def start(words: list[str], command: str, arguments: list[str]) -> int:
    """Run a command in processes of accelerate, and wait until it ends.

    Args:
        words (`list[str]`): Arguments of `accelerate launch`, from [`launch_words`].
        arguments (`list[str]`): Arguments of the command, as typed. The started processes ignore options of `accelerate
            launch` among them.

    Returns:
        `int`: The exit code: 0 after success, 130 after an interruption, otherwise that of the first process that
            failed.
    """
    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parsed = _launch_parser().parse_args([*words, "-m", MODULE, command, *arguments])
    seconds = os.environ.get(SHUTDOWN_VARIABLE, SHUTDOWN_SECONDS)
    # Ctrl-C reaches the child processes too, which write a checkpoint before they end. This process ignores it and
    # waits for them. With several, torch's launcher uses its own handler.
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
    from accelerate.commands.launch import launch_command_parser  # configures logging

    return launch_command_parser()
