"""`trl-diffusion-sdpo env`: print the versions of all relevant packages for a bug report."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from .. import __version__
from . import EXIT_OK
from .options import OneLineParser

PACKAGES = (
    *("torch", "transformers", "trl", "diffusers", "accelerate", "peft", "datasets", "huggingface_hub"),
    *("safetensors", "pillow", "numpy", "deepspeed", "bitsandbytes", "matplotlib"),
)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    return OneLineParser(
        prog=prog, description="Print the versions of Python, this package and its dependencies for a bug report."
    )


def run(arguments: list[str], prog: str) -> int:
    make_parser(prog).parse_args(arguments)
    print("Copy this into a bug report:\n")
    for name, value in environment().items():
        print(f"- {name}: {value}")
    return EXIT_OK


def environment() -> dict[str, str]:
    """Return the platform, the accelerators and the version of each package, by name."""
    return {
        "trl-diffusion-sdpo": __version__,
        "Platform": platform.platform(),
        "Python": platform.python_version(),
        "Accelerators": ", ".join(_accelerators()) or "none",
        **{package: _installed_version(package) for package in PACKAGES},
    }


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _accelerators() -> list[str]:
    import torch  # imported late because it takes seconds

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not torch.accelerator.is_available():  # `current_accelerator` would raise an error in torch 2.6
        return []
    accelerator = torch.accelerator.current_accelerator()
    return [] if accelerator is None else [accelerator.type]
