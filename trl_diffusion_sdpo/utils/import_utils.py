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

# Tracker of `report_to` -> the modules of which one must be installed, and the package that has it.
TRACKERS = {
    "wandb": (("wandb",), "wandb"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "mlflow": (("mlflow",), "mlflow"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "clearml": (("clearml",), "clearml"),
    "swanlab": (("swanlab",), "swanlab"),
    "dvclive": (("dvclive",), "dvclive"),
}

# Pattern of the name in `optim` -> the module that it needs, and the package that has it.
OPTIMIZERS = {
    r"adamw_torch_[48]bit": ("torchao", "torchao"),
    r"galore_.*": ("galore_torch", "galore-torch"),
    r"apollo_.*": ("apollo_torch", "apollo-torch"),
    r"(ada)?lomo": ("lomo_optim", "lomo-optim"),
    r"grokadamw": ("grokadamw", "grokadamw"),
    r"schedule_free_.*": ("schedulefree", "schedulefree"),
    r"stable_adamw": ("optimi", "torch-optimi"),
    r"(paged_)?(ademamix|lion|adamw)(_bnb)?(_8bit|_32bit)|ademamix|rmsprop_bnb.*": ("bitsandbytes", "bitsandbytes"),
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
    if not _is_installed(extra):
        raise MissingExtraError(
            f"{purpose} needs {EXTRAS[extra]}, which is not installed. Run `pip install {EXTRAS[extra]}`."
        )


def require_trackers(names: Iterable[str]) -> None:
    """Raise a `MissingExtraError` unless the trackers of `report_to` are installed. Unknown names pass."""
    for name in names:
        modules, package = TRACKERS.get(name, ((), ""))
        if modules and not any(find_spec(module) for module in modules):
            raise MissingExtraError(
                f"`report_to={name}` needs {modules[0]}, which is not installed. Run `pip install {package}`, or set "
                "`report_to` to `none`."
            )


def require_optimizer(name: str) -> None:
    """Raise a `MissingExtraError` unless the package of an optimizer of `optim` is installed. Unknown names pass."""
    for pattern, (module, package) in OPTIMIZERS.items():
        if re.fullmatch(pattern, name) and not find_spec(module):
            raise MissingExtraError(
                f"`optim={name}` needs {module}, which is not installed. Run `pip install {package}`, or set `optim` "
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


def _is_installed(extra: str) -> bool:
    return find_spec(EXTRAS[extra]) is not None
