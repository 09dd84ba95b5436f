"""Load models from a single `.safetensors` file in the original code's format, which diffusers converts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..utils._compat import SingleFileComponentError, default_configuration
from ..utils.errors import UserError
from .model_files import LOADING_ERRORS

SUFFIX = ".safetensors"
CONFIG_OPTION = '`model_init_kwargs={"config": "FOLDER OR HUB ID"}`, for a reference `ref_model_init_kwargs`'
_PICKLES = (".bin", ".pt", ".ckpt")


def is_single_file(name_or_path: str) -> bool:
    return os.path.isfile(name_or_path)


def configuration_of(name_or_path: str, config: str | None = None) -> str:
    """Return the folder or Hub id of the diffusers pipeline from which a model's configuration is read.

    For a folder or a Hub id, that is the model itself; for a single file, `config`, or without it the model that
    diffusers recognises by the names and shapes of the file's tensors.
    """
    if not is_single_file(name_or_path):
        if config is not None:
            raise UserError(
                f"`config` is only for a model in one file, got {config!r} for {name_or_path}, which is not a file. "
                "Leave out `config`."
            )
        return name_or_path
    if Path(name_or_path).suffix != SUFFIX:
        raise UserError(
            f"A model in a single file must be a {SUFFIX} file, got {name_or_path}. Other formats are pickles, which "
            "can run code when they are read. Download the model as safetensors, or convert it if you trust its source."
        )
    if config is None:
        return _inferred(name_or_path)
    for folder in {file.parent for file in Path(config).glob("*/*") if file.suffix in _PICKLES}:
        if not any(folder.glob(f"*{SUFFIX}")):
            raise UserError(
                f"Weights in the folder of `config` must be {SUFFIX} files, and {folder} has pickled weights, which "
                f"are never read. Convert these weights to {SUFFIX} files, or remove them."
            )
    return config


@contextmanager
def reading_single_file(name_or_path: str, config: str) -> Iterator[None]:
    """Return a context manager that turns errors of diffusers, such as missing components, into a `ValueError`."""
    try:
        yield
    except SingleFileComponentError as error:
        raise UserError(
            f"{name_or_path} lacks a component of the pipeline: {' '.join(str(error).split())} Pass the folder of a "
            "pipeline saved by diffusers instead of a single file."
        ) from error
    except LOADING_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{name_or_path} could not be read with the configuration of {config}: {' '.join(str(error).split())} To "
            f"name another configuration, or a local folder if you are offline, use {CONFIG_OPTION}."
        ) from error


def _inferred(file: str) -> str:
    """Return the Hub id of the model that diffusers recognises by the names and shapes of a file's tensors."""
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}. Download it again.") from error
    return default_configuration({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
