"""Checks of optional dependencies, lazy import of public names, and filters for notes of libraries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logging import LogRecord

# Extra of this package -> the module that it installs.
EXTRAS: dict[str, str] = {"deepspeed": "deepspeed", "quantization": "bitsandbytes"}

# Trackers of `report_to` whose module and package have the same name.
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "clearml", "swanlab", "dvclive")

# Pattern of the name in `optim` -> the package that it needs.
OPTIMIZERS = {
    r"adamw_torch_[48]bit": "torchao",
    r"galore_.*": "galore-torch",
    r"apollo_.*": "apollo-torch",
    r"(ada)?lomo": "lomo-optim",
    r"grokadamw": "grokadamw",
    r"schedule_free_.*": "schedulefree",
    r"stable_adamw": "torch-optimi",
    r"(paged_)?(ademamix|lion|adamw)(_bnb)?(_8bit|_32bit)|ademamix|rmsprop_bnb.*": "bitsandbytes",
}

# Logger -> the beginning of notes about which a user of this package can do nothing.
_IDLE_NOTES = {
    "transformers.utils.import_utils": r"`\w+ImageProcessor` requires torchvision \(not installed\); falling back",
    "DeepSpeed": r"Setting (ds_)?accelerator to ",
    "diffusers.models.modeling_utils": r"There are modules in \w+ that should be kept in float32: \[\]\.",
}


# Beginnings of warnings that need no action: a second stage adds the reference's adapter to the policy on purpose, and
# memory is not pinned on a CPU.
_IDLE_WARNINGS = (
    r"Already found a `peft_config` attribute in the model",
    r"'pin_memory' argument is set as true but no accelerator is found",
)


class MissingExtraError(ImportError):
    """Error of a missing optional dependency. The message names the extra or package to install."""


def require(extra: str, purpose: str) -> None:
    """Raise an error unless an extra of this package is installed.

    Args:
        extra (`str`): A key of `EXTRAS`.
        purpose (`str`): The subject of the message's sentence, such as "A quantized base".

    Raises:
        MissingExtraError: If it is not installed. The message has the command that installs it.
    """
    if find_spec(EXTRAS[extra]) is None:
        raise MissingExtraError(
            f"{purpose} needs {EXTRAS[extra]}, which is not installed. Run `pip install {EXTRAS[extra]}`."
        )


def require_trackers(names: Iterable[str]) -> None:
    """Raise a `MissingExtraError` unless the trackers of `report_to` are installed. Unknown names pass."""
    for name in names:
        has_writer = name == "tensorboard" and find_spec("tensorboardX")
        if name in TRACKERS and not (find_spec(name) or has_writer):
            raise MissingExtraError(
                f"`report_to={name}` needs {name}, which is not installed. Run `pip install {name}`, or set "
                "`report_to` to `none`."
            )


def require_optimizer(name: str) -> None:
    """Raise a `MissingExtraError` unless the package of an optimizer of `optim` is installed. Unknown names pass."""
    for pattern, package in OPTIMIZERS.items():
        if re.fullmatch(pattern, name) and not find_spec(package.removeprefix("torch-").replace("-", "_")):
            raise MissingExtraError(
                f"`optim={name}` needs {package}, which is not installed. Run `pip install {package}`, or set `optim` "
                "to `adamw_torch`."
            )


def lazy_attributes(
    package: str, homes: Mapping[str, str], others: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`. They import public names at their first use.

    Args:
        package (`str`): Name of the package.
        homes (`Mapping[str, str]`): Public name -> the module that defines it, relative to the package.
        others (`Iterable[str]`): Public names that the package defines itself, for `dir()`.
    """
    public = sorted([*homes, *others])

    def get_attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        hide_idle_notes()  # the next line imports libraries that log
        return getattr(import_module(homes[name], package), name)

    return get_attribute, lambda: public


def hide_idle_notes() -> None:
    """Hide the notes and warnings that libraries print in every run and that need no action."""
    import logging  # a third of this package's import time
    import warnings

    for beginning in _IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)

    for name in _IDLE_NOTES:
        logging.getLogger(name).addFilter(_says_something)  # a second call has no effect


def _says_something(record: LogRecord) -> bool:
    return re.match(_IDLE_NOTES[record.name], record.getMessage()) is None
