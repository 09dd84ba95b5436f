"""Reads and writes the set-up file beside a run's weights, which records the run's model, engine, data and settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..utils.files import json_object, write_atomically

SETUP_FILE = "diffusion_sdpo_setup.json"
ARGS_FILE = "training_args.json"  # all arguments of a run; never uploaded, because they name local folders


def output_folder(args: TrainingArguments) -> Path:
    """Return the path of a run's output folder. transformers types `output_dir` as optional, but always sets it."""
    assert args.output_dir is not None
    return Path(args.output_dir)


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Return a short hash of each tensor's name, shape and about 16 values, the same on all machines."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        few = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_setup(folder: Path, setup: dict[str, Any]) -> None:
    """Write the set-up file of a run into a folder, atomically."""
    write_atomically(folder / SETUP_FILE, json.dumps(setup, indent=2, sort_keys=True).encode() + b"\n")


def read_setup(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's set-up file, or `{}` if it is missing or is not a JSON object."""
    try:
        return json_object((folder / SETUP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
