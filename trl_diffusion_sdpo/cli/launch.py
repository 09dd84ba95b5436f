"""`trl-diffusion-sdpo train --accelerate_config NAME`: runs the same command by `accelerate launch`, in the processes
of a configuration of accelerate."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..utils.hints import did_you_mean
from ..utils.import_utils import require
from . import EXIT_INTERRUPTED, EXIT_OK

CONFIGS = Path(__file__).parent / "accelerate_configs"
# The example configurations: in an installed package, and in a clone.
EXAMPLES = (Path(__file__).parent / "example_configs", Path(__file__).parents[2] / "examples" / "configs")
OPTION = "accelerate_config"
MODULE = f"{__package__}.main"

# Set in the launched processes: the keys of the file of `--config` that the launcher has used.
LAUNCHED_VARIABLE = "TRL_DIFFUSION_SDPO_LAUNCHED"

# Seconds that torch's launcher waits between Ctrl-C and killing its processes. Its default of 30 is too short for a
# large model to end its step and write a checkpoint.
SHUTDOWN_VARIABLE, SHUTDOWN_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"


# Options of `accelerate launch` that users cannot give, as this module sets them.
_RESERVED = {"config_file", "module", "no_python", "help"}
ENVIRONMENT_KEY = "env"  # in a file of `--config`: environment variables, as in TRL's parser; not accelerate's option
_MERGE_TAG = "tag:yaml.org,2002:merge"


class Launch(NamedTuple):
    """A launch of the command."""

    config_file: Path  # the configuration of accelerate
    options: list[str]  # arguments of `accelerate launch`
    arguments: list[str]  # arguments of the command, without those of the launcher
    used_keys: list[str]  # keys of the file of `--config` that the launcher uses


def config_names() -> list[str]:
    """Names of the packaged configurations."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def config_path(name: str) -> Path:
    """The file of a configuration, by its name or by its path.

    Raises:
        ValueError: If it is neither.
    """
    if name in config_names():
        return CONFIGS / f"{name}.yaml"
    if not Path(name).expanduser().is_file():
        raise ValueError(
            f"`--{OPTION}` must be one of {', '.join(config_names())}, or the path of a file, got {name!r}."
        )
    return Path(name).expanduser()


def keys_used_by_the_launcher() -> list[str]:
    """In a launched process: keys of the file of `--config` that are the launcher's and not the command's."""
    return os.environ.get(LAUNCHED_VARIABLE, "").split(",")


def plan(arguments: list[str], command_options: Collection[str]) -> Launch | None:
    """The launch by these arguments; `None` without `accelerate_config`, or in a launched process.

    Args:
        arguments (`list[str]`): Of the command and of `accelerate launch`.
        command_options (`Collection[str]`): The command's options, without dashes. They take precedence over
            accelerate's of the same name, such as `gradient_accumulation_steps`.

    Raises:
        ValueError: If there is no such configuration, or another launcher started this process.
        MissingExtraError: If the configuration needs DeepSpeed, which is not installed.
    """
    if LAUNCHED_VARIABLE in os.environ:
        return None
    in_file = read_file(arguments)
    named, rest = take_option(arguments, OPTION)
    chosen = named or in_file.get(OPTION)
    if chosen is None:
        return None
    _refuse_a_second_launcher()
    takes_value = launch_options(command_options)
    options, remaining = separate(rest, takes_value)
    used = {key: value for key, value in in_file.items() if key in takes_value and key != ENVIRONMENT_KEY}
    file = config_path(str(chosen))
    settings = _read_yaml(file)
    if settings.get("distributed_type") == "DEEPSPEED":
        require("deepspeed", f"The configuration {chosen}")
    options = [*_as_words(used, takes_value), *options]  # the command line overrides the file
    return Launch(file, [*_processes(settings, options), *options], remaining, [OPTION, *used])


def start(launch: Launch, command: str) -> int:
    """Start a command under accelerate and wait for its end.

    Returns:
        `int`: The exit code: 0; that of the first process that failed, 128 plus the signal's number if it was killed
        by one; 130 after an interruption.
    """
    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = ["--config_file", str(launch.config_file), *launch.options, "-m", MODULE, command, *launch.arguments]
    parsed = _launch_parser().parse_args(words)
    environment = {LAUNCHED_VARIABLE: ",".join(launch.used_keys)}
    environment[SHUTDOWN_VARIABLE] = os.environ.get(SHUTDOWN_VARIABLE, SHUTDOWN_SECONDS)
    try:
        with patch_environment(**environment), _ignore_interrupts_with_one_process(launch.config_file):
            launch_command(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != EXIT_INTERRUPTED:
            print(f"Process {rank} was the first to fail, with exit code {failure.exitcode}.", file=sys.stderr)
        return _exit_code(failure.exitcode)
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
    except SignalException:
        return EXIT_INTERRUPTED
    return EXIT_OK


def read_file(arguments: list[str]) -> dict[str, Any]:
    """The contents of the file of `--config`; empty without one.

    Raises:
        ValueError: If there is no such file, it is not a mapping in YAML, or two files are given.
    """
    name, _ = take_option(arguments, "config")
    return {} if name is None else _read_yaml(_file_of_settings(name))


def example_configs() -> dict[str, Path]:
    """The example configurations, by name."""
    return {path.stem: path for folder in reversed(EXAMPLES) for path in sorted(folder.glob("*.yaml"))}


def _file_of_settings(name: str) -> Path:
    """A file of settings, by its path, or else by the name of an example configuration."""
    path, examples = Path(name).expanduser(), example_configs()
    if path.is_file():
        return path
    if name not in examples:
        near = did_you_mean(path.stem, examples)
        raise ValueError(
            f"`--config` must be a YAML file, or one of the example configurations {', '.join(examples)}; got "
            f"{name}, and there is no such file.{near}"
        )
    return examples[name]


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, and the other arguments.

    Raises:
        ValueError: If it is given twice or without a value.
    """
    values, rest = [], []
    words = iter(arguments)
    for word in words:
        if option_of(word) != name:
            rest.append(word)
            continue
        values.append(word.partition("=")[2] if "=" in word else next(words, ""))
    if len(values) > 1 or "" in values:
        raise ValueError(f"`--{name}` takes one value, once, got {len(values)}: {' '.join(values) or 'none'}.")
    return (values[0] if values else None), rest


def launch_options(command_options: Collection[str]) -> dict[str, bool]:
    """The options of `accelerate launch` that users can give, and whether each takes a value."""
    actions = [action for action in _launch_parser()._actions if action.option_strings]
    taken = {*command_options, *_RESERVED}
    return {action.dest: action.nargs != 0 for action in actions if action.dest not in taken}


def separate(arguments: list[str], takes_value: dict[str, bool]) -> tuple[list[str], list[str]]:
    """The arguments of `accelerate launch`, by [`launch_options`], and the others, in order.

    Raises:
        ValueError: If a value is missing.
    """
    options, rest = [], []
    words = iter(arguments)
    for word in words:
        name = option_of(word)
        if name not in takes_value:
            rest.append(word)
            continue
        options.append(word)
        if takes_value[name] and "=" not in word:
            value = next(words, None)
            if value is None:
                raise ValueError(f"`--{name}` takes a value, got none.")
            options.append(value)
    return options, rest


def option_of(word: str) -> str | None:
    """`num_processes` of `--num_processes`, `--num-processes` and `--num_processes=4`."""
    return word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else None


def _launch_parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser  # configures logging when imported

    return launch_command_parser()


def _as_words(settings: dict[str, Any], takes_value: dict[str, bool]) -> list[str]:
    """Keys and values of a file as arguments; a flag without a value is written if it is true."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", str(value)] if takes_value[name] else [f"--{name}"] * bool(value)
    return words


def _processes(settings: dict[str, Any], options: list[str]) -> list[str]:
    """One process per accelerator of each machine, unless the file or the arguments give the number."""
    if "num_processes" in settings or settings.get("distributed_type") == "NO":
        return []
    given = _launch_parser().parse_args([*options, MODULE])
    if given.num_processes is not None:
        return []
    machines = given.num_machines or settings.get("num_machines", 1)
    import torch  # takes seconds

    devices = torch.accelerator.device_count()
    if devices == 0:
        raise ValueError(
            "`--num_processes` must be the number of processes to start where there is no accelerator, and got nothing."
        )
    return ["--num_processes", str(devices * machines)]


def _refuse_a_second_launcher() -> None:
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            f"`{OPTION}` starts the processes itself, and this one was started by torchrun or `accelerate launch` "
            f"already. Leave out one of the two: with `accelerate launch`, pass the file as `--config_file`."
        )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"The file {path} must be YAML{_in_words(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The file {path} must be YAML that can be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The file {path} must map names to values in YAML, got {type(settings).__name__}.")
    return settings


def _in_words(error: yaml.YAMLError) -> str:
    """What is wrong with a file, in one line, and where."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {error}"
    began = (
        ""
        if error.context is None or error.context_mark is None
        else (f", {error.context} that began in line {error.context_mark.line + 1}")
    )
    return f"; line {error.problem_mark.line + 1} is not: {error.problem}{began}."


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses duplicate keys; YAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise yaml.YAMLError(f"{', '.join(sorted(twice))} is given twice. Remove one")
        return super().construct_mapping(node, deep)


@contextlib.contextmanager
def _ignore_interrupts_with_one_process(config_file: Path) -> Iterator[None]:
    """Ignores SIGINT while a single child process runs: the terminal sends it Ctrl-C too, and it writes a checkpoint
    before it ends. For several processes, torch's launcher has its own handlers."""
    if _read_yaml(config_file).get("distributed_type") != "NO":
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)  # unlike SIG_IGN, not inherited by the child
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _exit_code(code: int) -> int:
    """128 plus the number of a signal, as in shells; Python reports signals as negative codes."""
    return 128 - code if code < 0 else code
