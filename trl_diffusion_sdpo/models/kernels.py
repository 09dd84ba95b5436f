"""Attention back ends of diffusers, and which models are compiled block by block."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..utils._compat import attention_backends, repeated_blocks
from ..utils.errors import UserError

NO_BACKWARD = "sage"  # back ends with this word in their name have no backward pass


def check_attention(denoiser: nn.Module) -> None:
    """Raise `ValueError` if a denoiser's attention uses a back end without a backward pass, chosen by diffusers'
    variable `DIFFUSERS_ATTN_BACKEND` or the denoiser's `set_attention_backend`."""
    refused = [name for name in attention_backends(denoiser) if NO_BACKWARD in name]
    if refused:
        raise UserError(
            "Training needs an attention back end with a backward pass, and those that quantize queries and keys have "
            f"none; got {refused[0]!r}. Choose another in `DIFFUSERS_ATTN_BACKEND` or `set_attention_backend`."
        )


def is_mostly_blocks(denoiser: Any) -> bool:
    """Return whether the repeated blocks that diffusers lists for a denoiser hold most of its weights. In UNets of the
    size of SD 1.5 they do not: compiled block by block, two thirds of such a network would run uncompiled."""
    names = repeated_blocks(denoiser)
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    inside = {weight for block in blocks for weight in block.parameters()}
    return 2 * sum(weight.numel() for weight in inside) > sum(weight.numel() for weight in denoiser.parameters())
