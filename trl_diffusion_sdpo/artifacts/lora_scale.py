"""The scale of a LoRA, `lora_alpha / r`, brought into its weights: what is left acts with scale 1, which every reader
applies to a file that names no scale."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from .._compat import pattern_key

_FIRST, _SECOND = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


def split_key(key: str) -> tuple[str, str]:
    """`("blocks.0.to_q", "lora_B.weight")` of `"blocks.0.to_q.lora_B.weight"`."""
    module, _, part = key.rpartition(".lora_")
    return module, f"lora_{part}"


def ranks(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Rank of the LoRA of each module, from tensors under their PEFT names."""
    first = {split_key(key)[0]: value for key, value in weights.items() if _half(key) in _FIRST}
    return {module: value.shape[0] for module, value in first.items()}


def scaling(config: LoraConfig, module: str, rank: int) -> float:
    """With what PEFT multiplies the LoRA of a module: its own alpha over its rank, or over the rank's root."""
    alpha = config.alpha_pattern.get(pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def folded(weights: Mapping[str, torch.Tensor], config: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """The same LoRA with its scales multiplied into the second factors.

    Exact where a scale is a power of two, such as that of `r=16, lora_alpha=32`; else each factor is rounded once.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Under their PEFT names.
        config ([`~peft.LoraConfig`]): Whose alphas, patterns and `use_rslora` say the scales.

    Returns:
        `tuple`: New weights, and the configuration under which PEFT applies scale 1: every alpha is the rank.
    """
    scales = {module: scaling(config, module, rank) for module, rank in ranks(weights).items()}
    scaled = {
        key: value * scales[split_key(key)[0]] if _half(key) in _SECOND else value for key, value in weights.items()
    }
    plain = copy.deepcopy(config)
    plain.lora_alpha, plain.alpha_pattern, plain.use_rslora = plain.r, dict(plain.rank_pattern), False
    return scaled, plain


def public_settings(config: LoraConfig) -> dict[str, Any]:
    """A LoRA's settings as a file may carry them: in one order, and without a folder of this machine."""
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    base = settings["base_model_name_or_path"]
    if base is not None and (os.path.isabs(base) or os.path.exists(base) or base.startswith(("~", "."))):
        settings["base_model_name_or_path"] = None
    return settings


def _half(key: str) -> str:
    return split_key(key)[1].partition(".")[0]
