"""Writing tuned weights in the formats that diffusers and PEFT read, and reading them back exactly."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from .._compat import LORA_ADAPTER_METADATA_KEY, loads_lora
from ..models.adapters import adapter_state
from .lora_scale import folded, public_settings

logger = logging.getLogger(__name__)

PEFT_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
SETUP_FILE = "diffusion_sdpo_setup.json"
STRUCTURE = ("pipeline_class", "denoiser_class", "tuning", "reference", "lora", "weights_before_training", "engine")
NOT_COMPARED = ("train_data", "run_id")  # name by name
# Of checkpoints from before these were stored.
UNKNOWN_BEFORE = ("engine", "processes", "safeguard_anchor", "given_reference")
# What later settings were before they could be set.
ALWAYS_BEFORE = {
    "vae_dtype": "float32",  # of most VAEs: those of Stable Diffusion, SDXL, SD3 and FLUX say `force_upcast`
    "timesteps": None,
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "timestep_weighting": "none",
    "guidance_scale": None,
    "num_noise_bins": 8,
    "loser_noise_range": None,
    "winner_budget": None,
    "winner_budget_pairs": 32,
    "winner_budget_steps": 10,
    "ema_decay": None,
    "safeguard_preconditioner": "plain",
}


def trained_weights(denoiser: nn.Module, adapter: str | None) -> dict[str, torch.Tensor]:
    """What a run saves: the adapter's parameters, or all parameters and buffers of the denoiser; not copied."""
    return denoiser.state_dict(keep_vars=True) if adapter is None else adapter_state(denoiser, adapter)


def save_weights(
    folder: Path,
    *,
    pipeline: DiffusionPipeline,
    denoiser: nn.Module,
    denoiser_name: str,
    adapter: str | None,
    whole: dict[str, torch.Tensor] | None = None,
    full_pipeline: bool = False,
) -> None:
    """Write the LoRA as `pytorch_lora_weights.safetensors` and for PEFT, or the denoiser as its own folder.

    Args:
        whole (`dict[str, torch.Tensor]`, *optional*): The tensors of [`trained_weights`] where the denoiser itself holds
            parts of them only.
        full_pipeline (`bool`): Whether to write the pipeline's other parts as well; not with a LoRA.
    """
    if adapter is not None:
        weights = trained_weights(denoiser, adapter) if whole is None else whole
        save_adapter(weights, denoiser.peft_config[adapter], type(pipeline), denoiser_name, folder)
        return
    if whole is not None:
        denoiser = with_weights(denoiser, whole)
        pipeline = copy.copy(pipeline)
        pipeline.register_modules(**{denoiser_name: denoiser})
    if full_pipeline:
        pipeline.save_pretrained(folder, safe_serialization=True)
    else:
        denoiser.save_pretrained(folder / denoiser_name, safe_serialization=True)


def with_weights(denoiser: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A denoiser of the same architecture that holds these tensors, which are not copied."""
    with init_empty_weights():
        twin = type(denoiser).from_config(denoiser.config)
    twin.load_state_dict(weights, strict=True, assign=True)
    return twin


def read_weights(
    folder: Path, *, denoiser: nn.Module, denoiser_name: str, adapter: str | None, shapes: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Read what [`save_weights`] wrote, exactly.

    Args:
        shapes (`dict[str, tuple[int, ...]]`): Of the tensors of [`trained_weights`], whole.

    Raises:
        `ValueError`: If the folder holds no such weights, or those of another model.
    """
    if adapter is not None:
        return read_adapter(shapes, folder)
    source = folder / denoiser_name
    if not source.is_dir():
        hint = " It holds a LoRA: resume with `peft_config`." if (folder / PEFT_FILE).is_file() else ""
        raise ValueError(f"A checkpoint of full tuning must hold the folder {denoiser_name}; {folder} does not.{hint}")
    return type(denoiser).from_pretrained(source, use_safetensors=True).state_dict()


def save_adapter(
    weights: dict[str, torch.Tensor],
    config: LoraConfig,
    pipeline_class: type[DiffusionPipeline],
    denoiser_name: str,
    folder: Path,
) -> None:
    """Write an adapter's weights for [`~peft.PeftModel.from_pretrained`] and, where the pipeline has it, for
    `pipeline.load_lora_weights`.

    PEFT's file has the weights as they train, and their scale beside them. In the other file the scale is multiplied
    into the weights: tools that read neither diffusers' metadata nor PEFT's configuration assume 1. Both have PEFT's
    names: renaming to older diffusers formats knows attention layers only and would drop the rest.
    """
    weights = {key: value.detach().contiguous().cpu() for key, value in weights.items()}
    if loads_lora(pipeline_class):
        scaled, plain = folded(weights, config)
        settings = {f"{denoiser_name}.{name}": value for name, value in public_settings(plain).items()}

        def write(tensors: dict[str, torch.Tensor], file: str) -> None:
            # One entry: safetensors writes several in a random order, and equal files would be uploaded again.
            save_file(tensors, file, {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)})

        layers = {f"{denoiser_name}_lora_layers": scaled}
        pipeline_class.save_lora_weights(folder, **layers, save_function=write)
    save_file({PEFT_PREFIX + key: value for key, value in weights.items()}, folder / PEFT_FILE, {"format": "pt"})
    text = json.dumps(public_settings(config), indent=2, sort_keys=True)
    (folder / PEFT_CONFIG_FILE).write_text(text, encoding="utf-8")


def read_adapter(shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, torch.Tensor]:
    """Read what [`save_adapter`] wrote for an adapter with tensors of these shapes.

    Raises:
        `ValueError`: If the file is missing or its tensors are not the adapter's.
    """
    file = folder / PEFT_FILE
    if not file.is_file():
        raise ValueError(f"A LoRA checkpoint must hold {PEFT_FILE}; {folder} does not. Was it tuned in full?")
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}
    stored = {key: tuple(value.shape) for key, value in state.items()}
    if shapes != stored:
        differing = sorted(set(shapes.items()) ^ set(stored.items()))[:4]
        raise ValueError(
            f"{file} holds a LoRA of another set-up: {len(stored)} tensors for {len(shapes)}, such as {differing}. "
            "Resume with the `peft_config` of the run that wrote it."
        )
    return state


def remove_local_paths(configs: Iterable[Path]) -> None:
    """Take out of configurations just saved from which folder of this machine a component was loaded."""
    for file in configs:
        if not file.is_file():
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        if os.path.exists(str(config.get("_name_or_path", ""))):
            del config["_name_or_path"]
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """A short mark of weights, from their names, shapes and a few values of each; equal on every machine."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        few = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_setup(folder: Path, setup: dict[str, Any]) -> None:
    """Write what a later run must share to resume here."""
    (folder / SETUP_FILE).write_text(json.dumps(setup, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_setup(folder: Path, setup: dict[str, Any]) -> dict[str, Any]:
    """Compare a checkpoint's set-up with this run's, but for its data and its mark, which others look at.

    Returns:
        `dict[str, Any]`: The checkpoint's.

    Raises:
        `ValueError`: If the two cannot be one run: another model, LoRA or kind of reference.
    """
    file = folder / SETUP_FILE
    if not file.is_file():
        raise ValueError(
            f"A checkpoint to resume from must hold {SETUP_FILE}; {folder} does not. Pass a `checkpoint-*` folder "
            "that this trainer wrote."
        )
    stored = json.loads(file.read_text(encoding="utf-8"))
    ours = json.loads(json.dumps(setup))
    stored = {**ALWAYS_BEFORE, **{name: ours[name] for name in UNKNOWN_BEFORE}, **stored}
    differing = [name for name in ours if name not in NOT_COMPARED and stored.get(name) != ours[name]]
    broken = [name for name in differing if name in STRUCTURE]
    if broken:
        raise ValueError(
            "A run resumes with the set-up that wrote its checkpoint; differing: "
            + "; ".join(f"{name} was {stored.get(name)!r}, is {ours[name]!r}" for name in broken)
            + f". Restore these, or start anew instead of resuming from {folder}."
        )
    for name in differing:
        logger.warning("Resuming with another `%s`: it was %r, is %r.", name, stored.get(name), ours[name])
    return stored
