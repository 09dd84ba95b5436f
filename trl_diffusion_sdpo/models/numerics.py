"""Dtypes and memory layouts of weights and inputs. Policy and reference round equally only with equal layouts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from ..utils._compat import forward_pre_hooks
from ..utils.errors import UserError

# Layers whose weights autocast casts at every use.
AUTOCAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CPU_ALIGNMENT = 64  # bytes; alignment of PyTorch's CPU allocator


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype that has the name `name`: float32, bfloat16 or float16. `None` gives float32, and a dtype is
    returned unchanged.

    Raises:
        `ValueError`: If `name` is another dtype.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return torch.float32
    dtype = dtypes.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in dtypes.values():
        raise UserError(f"`dtype` must be one of {', '.join(dtypes)}; got {name!r}.")
    return dtype


def autocast_dtype(mixed_precision: str) -> torch.dtype | None:
    """Return the dtype of autocast for `"bf16"` and `"fp16"`, or `None` for `"no"`."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)


def halve_autocast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear and convolution layers to autocast's dtype.

    That saves memory and does not change results: autocast would cast these weights at every use, and norms and
    embeddings at none.
    """
    for layer in module.modules():
        if isinstance(layer, AUTOCAST_LAYERS):
            layer.to(dtype)


@torch.no_grad()
def align_weights(module: nn.Module) -> None:
    """Copy each CPU tensor of a module whose memory address is not a multiple of `CPU_ALIGNMENT` bytes, to aligned
    memory.

    Weights that are memory-mapped from a safetensors file may start at any address. On a CPU, the rounding of matrix
    products depends on the alignment of the address. The predictions of a memory-mapped policy and of its copy would
    differ in the last bit.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % CPU_ALIGNMENT:
            tensor.data = tensor.data.clone()


def store_channels_last(module: nn.Module) -> None:
    """Store the weights of a module's 2D convolutions in the channels-last layout, in place.

    Convolutions then compute in this layout, which makes a VAE faster. Values and shapes stay the same. UNets are left
    alone: their training steps did not get faster (0.97 to 1.05 times as long on a CPU).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            cast(Any, layer).to(memory_format=torch.channels_last)  # the type stubs of `to` lack `memory_format`


def read_contiguous(modules: Iterable[nn.Module]) -> None:
    """Make the linear layers among `modules` copy each input that is not contiguous in memory before they use it.

    PyTorch computes a linear layer in one of two ways, which round differently: one large matrix product if the weight
    trains, or, if it is frozen or gradients are off and the rows of the input are not adjacent in memory, a batch of
    smaller products to avoid a copy. A policy and its frozen reference would differ before the first step.
    """
    for layer in modules:
        if isinstance(layer, nn.Linear) and _contiguous not in forward_pre_hooks(layer):
            layer.register_forward_pre_hook(_contiguous)


def _contiguous(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])
