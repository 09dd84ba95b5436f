"""Multiplying a LoRA's scale, `lora_alpha / r`, into its weights: readers assume scale 1 if a file names none."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from .._compat import pattern_key
from ..losses import lora_scaling

LORA_A, LORA_B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


def split_key(key: str) -> tuple[str, str]:
    """`("blocks.0.to_q", "lora_B.weight")` of `"blocks.0.to_q.lora_B.weight"`."""
    module, _, part = key.rpartition(".lora_")
    return module, f"lora_{part}"


def ranks(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Rank of the LoRA of each module, from tensors under their PEFT names."""
    first = {split_key(key)[0]: value for key, value in weights.items() if factor_of(key) in LORA_A}
    return {module: value.shape[0] for module, value in first.items()}


def scaling(config: LoraConfig, module: str, rank: int) -> float:
    """The factor that PEFT applies to the LoRA of a module, with the module's alpha if it has one."""
    alpha = config.alpha_pattern.get(pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return lora_scaling(alpha, rank, rank_stabilized=config.use_rslora)


def folded(weights: Mapping[str, torch.Tensor], config: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """The same LoRA with its scales multiplied into the factors B.

    Exact where a scale is a power of two, as with `r=16, lora_alpha=32`; otherwise each value is rounded once.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Under their PEFT names.
        config ([`~peft.LoraConfig`]): Has the alphas, their patterns and `use_rslora`.

    Returns:
        `tuple`: New weights, and a configuration in which every alpha is the rank, so that PEFT applies scale 1.
    """
    scales = {module: scaling(config, module, rank) for module, rank in ranks(weights).items()}
    scaled = {
        key: value * scales[split_key(key)[0]] if factor_of(key) in LORA_B else value for key, value in weights.items()
    }
    plain = copy.deepcopy(config)
    plain.lora_alpha, plain.alpha_pattern, plain.use_rslora = plain.r, dict(plain.rank_pattern), False
    return scaled, plain


def public_settings(config: LoraConfig) -> dict[str, Any]:
    """A LoRA's settings for a published file: in a fixed order, without local folders."""
    settings: dict[str, Any] = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }
    base = config.base_model_name_or_path
    if base is not None and (os.path.isabs(base) or os.path.exists(base) or base.startswith(("~", "."))):
        settings["base_model_name_or_path"] = None
    return settings


def factor_of(key: str) -> str:
    """`"lora_B"` of `"blocks.0.to_q.lora_B.weight"`."""
    return split_key(key)[1].partition(".")[0]
