"""Exports a run's LoRA to the format of kohya's scripts, which ComfyUI, AUTOMATIC1111's web UI and Forge read."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save

from ..models.ema import EMA_FOLDER
from ..utils.disk import naming_the_disk
from ..utils.errors import UserError
from ..utils.files import write_atomically
from .lora_keys import OriginalModule, original_module
from .setup import SETUP_FILE, read_setup
from .weights import PEFT_CONFIG_FILE, PEFT_FILE, folded, ranks, read_lora

PREFIX = "lora_unet_"  # kohya's scripts use this prefix for transformers too
_A = "lora_A.weight"
_B = "lora_B.weight"
Factors = tuple[torch.Tensor, torch.Tensor]  # factors A `(r, in, ...)` and B `(out, r, ...)` of a LoRA of rank r


def export_kohya(run: str | Path, output: str | Path, *, average: bool = False) -> dict[str, torch.Tensor]:
    """Write a run's LoRA into a file in kohya's format.

    Args:
        run (`str` or `Path`): Output folder of a run, or the folder of one of its checkpoints.
        output (`str` or `Path`): New file whose name ends in `.safetensors`.
        average (`bool`): Whether to export the averaged weights that a run with `ema_decay` saves.

    Returns:
        `dict[str, torch.Tensor]`: The written tensors.

    Raises:
        `ValueError`: If `run` has no LoRA, kohya's format cannot express it, or `output` exists already.
    """
    output = Path(output)
    if output.suffix != ".safetensors" or output.exists():
        raise UserError(
            f"The output must be a new file whose name ends in .safetensors, got {output}. Choose another name."
        )
    denoiser_class, config, weights = _read(Path(run), average)
    converted = to_kohya(weights, config, denoiser_class)
    with naming_the_disk(output.parent, sum(tensor.nbytes for tensor in converted.values())):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, save(converted, {"format": "pt"}))
    return converted


def to_kohya(weights: dict[str, torch.Tensor], config: LoraConfig, denoiser_class: str) -> dict[str, torch.Tensor]:
    """Convert a LoRA's tensors from PEFT's names to kohya's: `lora_unet_...` with `.lora_down.weight`,
    `.lora_up.weight` and `.alpha`. Raise `ValueError` if kohya's format cannot express it.

    Args:
        weights (`dict[str, torch.Tensor]`): Tensors of the LoRA by their names in PEFT.
        denoiser_class (`str`): Name of the denoiser's class in diffusers.
    """
    if config.use_dora:
        raise UserError(
            "Only a plain LoRA can be exported, and this one is a DoRA. Tools normalize a DoRA's weights in different "
            "ways, so its images would differ. Merge the DoRA into the base model instead."
        )
    others = [key for key in weights if not key.endswith((_A, _B))]
    if others:
        raise UserError(
            f"kohya's format stores only the factors A and B of each module, and this LoRA also has {others[0]}. Merge "
            "the LoRA into the base model instead."
        )
    weights, _ = folded(weights, config)
    # Module of the original model -> position in its stacked matrix -> factors of the LoRA.
    factors: dict[str, dict[int, Factors]] = defaultdict(dict)
    originals: dict[str, OriginalModule] = {}
    for module in ranks(weights):
        original = original_module(denoiser_class, module)
        originals[original.module] = original
        factors[original.module][original.position] = (weights[f"{module}.{_A}"], weights[f"{module}.{_B}"])
    return _named({name: _stacked(originals[name], factors[name]) for name in factors})


def _read(run: Path, average: bool) -> tuple[str, LoraConfig, dict[str, torch.Tensor]]:
    folder = run / EMA_FOLDER if average else run
    needed = (run / SETUP_FILE, folder / PEFT_FILE, folder / PEFT_CONFIG_FILE)
    missing = [file for file in needed if not file.is_file()]
    if missing:
        raise UserError(
            f"The run must be a folder in which the trainer saved a LoRA, and {missing[0]} does not exist. Pass the "
            "output folder of a LoRA run. Fully tuned weights need no export: other tools load them in place of the "
            "base model."
        )
    config, weights = read_lora(folder)
    assert isinstance(config, LoraConfig), "The trainer saves no other adapters."
    return str(read_setup(run).get("denoiser_class")), config, weights


def _stacked(original: OriginalModule, factors: dict[int, Factors]) -> Factors:
    """Return one pair of LoRA factors for matrices that the original model stacks into one, such as queries, keys and
    values. Factor A has the shape `(sum r, in)`. Factor B has the shape `(sum out, sum r)` and is block-diagonal, with
    zeros in the rows of a matrix without a LoRA."""
    if len(original.rows) == 1:
        return factors[0]
    rows = _row_counts(original, factors)
    down = torch.cat([factors[position][0] for position in sorted(factors)])
    up = torch.zeros(sum(rows), down.shape[0], dtype=down.dtype)
    rank = 0
    for position in sorted(factors):
        block = factors[position][1]
        top = sum(rows[:position])
        up[top : top + block.shape[0], rank : rank + block.shape[1]] = block
        rank += block.shape[1]
    return down, up


def _row_counts(original: OriginalModule, factors: dict[int, Factors]) -> list[int]:
    """Return the rows of each matrix in a stacked one, as the matrices that have a LoRA tell."""
    row_counts = {position: pair[1].shape[0] for position, pair in factors.items()}
    first, rows = next(iter(row_counts.items()))
    unit = original.rows[first]
    counts = []
    for position, relative in enumerate(original.rows):
        if position in row_counts:
            counts.append(row_counts[position])
        elif relative is None or unit is None:
            raise UserError(
                f"The original model stacks {len(original.rows)} matrices in {original.module}, and the LoRA tunes "
                f"only {len(row_counts)} of them. The sizes of the other matrices are unknown, so export fails. "
                "Tune queries, keys and values together."
            )
        else:
            counts.append(rows * relative // unit)
    return counts


def _named(modules: dict[str, Factors]) -> dict[str, torch.Tensor]:
    """Return the tensors to export: each module's two factors, and an alpha equal to the rank, so that the scale is 1.

    If ranks differ, all modules get the smallest rank as alpha, and factor B is multiplied by rank / alpha: diffusers
    ignores alphas that differ between modules of a UNet's LoRA.
    """
    rank_of = {name: down.shape[0] for name, (down, _) in modules.items()}
    common = min(rank_of.values()) if len(set(rank_of.values())) > 1 else None
    tensors = {}
    for name, (down, up) in modules.items():
        rank = rank_of[name]
        alpha = rank if common is None else common
        key = PREFIX + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = down.contiguous()
        tensors[f"{key}.lora_up.weight"] = (up * (rank / alpha)).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors
