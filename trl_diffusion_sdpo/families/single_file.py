"""Pipelines in one `.safetensors` file, in the format of the original models; diffusers converts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..utils._compat import SingleFileComponentError, default_configuration

SUFFIX = ".safetensors"
CONFIG_OPTION = '`model_init_kwargs={"config": "FOLDER OR HUB ID"}`, for a reference `ref_model_init_kwargs`'
_PICKLES = (".bin", ".pt", ".ckpt")


def is_single_file(name_or_path: str) -> bool:
    """Whether a model is a file."""
    return os.path.isfile(name_or_path)


def configuration_of(name_or_path: str, config: str | None = None) -> str:
    """Folder or Hub id of the diffusers pipeline that has the configuration of a model: the model itself, or of a file
    `config`, or else what diffusers takes its tensors for.

    Raises:
        `ValueError`: If a file is no safetensors file, or `config` is given for another model or would be read from
            pickles.
    """
    if not is_single_file(name_or_path):
        if config is not None:
            raise ValueError(
                f"`config` is for a model in one file, got {config!r} for {name_or_path}, which has its own. Leave it "
                "out."
            )
        return name_or_path
    if Path(name_or_path).suffix != SUFFIX:
        raise ValueError(
            f"A model in one file is a {SUFFIX} file, got {name_or_path}: other checkpoints are pickles, which can run "
            "code when they are read. Get the model in safetensors, or convert it where you trust it."
        )
    if config is None:
        return _inferred(name_or_path)
    for folder in {file.parent for file in Path(config).glob("*/*") if file.suffix in _PICKLES}:
        if not any(folder.glob(f"*{SUFFIX}")):
            raise ValueError(
                f"What the file lacks would be read from the folder of `config`, and {folder} has pickled weights. "
                f"Remove them, or convert them to {SUFFIX}."
            )
    return config


@contextmanager
def reading_single_file(name_or_path: str, config: str) -> Iterator[None]:
    """Within, what a file or its configuration lacks is a `ValueError`."""
    try:
        yield
    except SingleFileComponentError as error:
        raise ValueError(
            f"{name_or_path} lacks a component of the pipeline: {' '.join(str(error).split())} Take the model as a "
            "folder saved by diffusers."
        ) from error
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{name_or_path} could not be read with the configuration of {config}: {' '.join(str(error).split())} To "
            f"name another, or a folder where there is no network, use {CONFIG_OPTION}."
        ) from error


def _inferred(file: str) -> str:
    """The Hub id of the pipeline that diffusers takes a file for, by names and shapes of its tensors; none is read."""
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Download it again.") from error
    return default_configuration({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
