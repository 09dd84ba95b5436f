"""What is installed, and what to install: the package's extras by name, and public names that are imported when they
are asked for."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Extra of this package -> the module that it brings.
EXTRAS: dict[str, str] = {
    "deepspeed": "deepspeed",
    "plots": "matplotlib",
    "quantization": "bitsandbytes",
}


class MissingExtraError(ImportError):
    """Something was asked for that needs an extra of this package; the message says which."""


def is_plots_available() -> bool:
    """Whether the extra `plots` is installed."""
    return _is_installed("plots")


def require(extra: str, purpose: str) -> None:
    """Make sure that an extra of this package is installed.

    Args:
        extra (`str`): A key of `EXTRAS`.
        purpose (`str`): What needs it, as the subject of a sentence, such as "Drawing curves".

    Raises:
        MissingExtraError: If it is not; with the command that installs it.
    """
    if not _is_installed(extra):
        raise MissingExtraError(
            f"{purpose} needs {EXTRAS[extra]}, which is not installed. Run "
            f"`pip install 'trl-diffusion-sdpo[{extra}]'`."
        )


def lazy_attributes(
    package: str, homes: Mapping[str, str], others: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`, under which its public names are imported at their first use.

    Args:
        package (`str`): Name of the package.
        homes (`Mapping[str, str]`): Public name -> the module that defines it, relative to the package.
        others (`Iterable[str]`): Public names that the package defines itself, for `dir()`.

    Returns:
        `tuple`: The two functions.
    """
    public = sorted([*homes, *others])

    def get_attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    def list_attributes() -> list[str]:
        return public

    return get_attribute, list_attributes


def _is_installed(extra: str) -> bool:
    return find_spec(EXTRAS[extra]) is not None
