"""The set-up file, saved with the weights: model, engine, data and settings of the run that wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..utils.files import write_atomically

SETUP_FILE = "diffusion_sdpo_setup.json"
ARGS_FILE = "training_args.json"  # all arguments; not published, as they name local folders
# What a sweep over scales recommends, by whether it is of the averaged weights. Each says of which weights it is.
RECOMMENDED = {False: "recommended_scale", True: "recommended_scale_of_average"}


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """A short hash of weights, of their names, shapes and up to 16 values of each; equal on every machine."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        few = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_setup(folder: Path, setup: dict[str, Any]) -> None:
    """Write the set-up file into a folder, atomically."""
    write_atomically(folder / SETUP_FILE, json.dumps(setup, indent=2, sort_keys=True).encode() + b"\n")


def read_setup(folder: Path) -> dict[str, Any]:
    """Read a folder's set-up file; empty where it is missing or no JSON object."""
    try:
        setup = json.loads((folder / SETUP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return setup if isinstance(setup, dict) else {}


def recommended_scales(setup: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What sweeps have recommended, by its key in the set-up file."""
    return {key: setup[key] for key in RECOMMENDED.values() if isinstance(setup.get(key), dict)}


def record_recommended_scale(folder: Path, recommended: Mapping[str, Any], *, average: bool) -> None:
    """Write what a sweep recommends into the set-up file of a folder, in place of an earlier recommendation."""
    write_setup(folder, {**read_setup(folder), RECOMMENDED[average]: dict(recommended)})


def still_recommended(
    folder: Path, weights: Mapping[bool, dict[str, torch.Tensor] | None]
) -> dict[str, dict[str, Any]]:
    """What the set-up file of a folder recommends for weights that are now written into it; `weights` by whether they
    are an average."""
    found = recommended_scales(read_setup(folder))
    return {
        key: found[key]
        for is_average, key in RECOMMENDED.items()
        if key in found
        and weights[is_average] is not None
        and found[key].get("of") == fingerprint(weights[is_average])
    }


def forget_recommended_scales(folder: Path) -> None:
    """Remove from the set-up file of a folder what was recommended for weights that are about to change."""
    setup = read_setup(folder)
    found = recommended_scales(setup)
    if found:
        write_setup(folder, {key: value for key, value in setup.items() if key not in found})
