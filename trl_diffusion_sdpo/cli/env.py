"""`trl-diffusion-sdpo env`: print package versions for a bug report."""

import argparse
import platform
from importlib.util import find_spec

from .. import __version__
from . import EXIT_OK
from .options import OneLineParser

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "diffusers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "deepspeed",
    "bitsandbytes",
)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    return OneLineParser(
        prog=prog, description="Print the versions of Python, this package and its dependencies for a bug report."
    )


def run(arguments: list[str], prog: str) -> int:
    make_parser(prog).parse_args(arguments)
    from importlib.metadata import version

    import torch  # imported late because it takes seconds

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print("Copy this into a bug report:\n")
    print(f"- trl-diffusion-sdpo: {__version__}")
    print(f"- Platform: {platform.platform()}, Python {platform.python_version()}")
    print(f"- GPUs: {', '.join(devices) or 'none'}")
    for package in PACKAGES:
        print(f"- {package}: {version(package) if find_spec(package) else 'not installed'}")
    return EXIT_OK
