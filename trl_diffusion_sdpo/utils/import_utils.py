"""Checks of optional dependencies, lazy import of public names, and filters for messages of libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .errors import UserError

# Our extra -> the module that it installs.
EXTRAS: dict[str, str] = {"deepspeed": "deepspeed", "quantization": "bitsandbytes", "bf16": "torchao"}

# Beginnings of warnings that need no action. PEFT prints the first for a second adapter, which this package adds on
# purpose for the reference. torch prints the second on machines without a GPU, and the third because transformers
# passes `ddp_broadcast_buffers` to DDP under its name in older versions of torch.
_IDLE_WARNINGS = (
    r"Already found a `peft_config` attribute in the model",
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"`broadcast_buffers` is deprecated",
)


class MissingExtraError(ImportError, UserError):
    """An optional dependency is not installed. The message says how to install it."""


def require(extra: str, purpose: str) -> None:
    """Raise a `MissingExtraError` if the module of one of our extras is not installed.

    Args:
        extra (`str`): A key of `EXTRAS`.
        purpose (`str`): Subject of the error message, such as "A quantized base".

    Raises:
        MissingExtraError: If the module is not installed.
    """
    if find_spec(EXTRAS[extra]) is None:
        raise MissingExtraError(
            f"{purpose} needs {EXTRAS[extra]}, which is not installed. Run `pip install {EXTRAS[extra]}`."
        )


def lazy_attributes(
    package: str, homes: Mapping[str, str], others: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package that imports each public name when it is first used.

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
    """Hide messages and warnings that libraries print in every run and that need no action."""
    import logging  # late: a third of the package's import time
    import warnings

    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # it recommends torchvision
    # With torchao installed, it says in every run that checkpoints which torchao has quantized may not load.
    logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").setLevel(logging.ERROR)
    for beginning in _IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)
