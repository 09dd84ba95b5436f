"""The memory layout in which layers read, on which rounding depends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .._compat import forward_pre_hooks


def read_contiguous(modules: Iterable[nn.Module]) -> None:
    """Have the linear layers among `modules` read contiguous inputs; nothing is copied of those that are contiguous.

    A product with a weight that trains is computed as one large matrix product whatever the input's layout, and one
    with a frozen weight, or without gradients, as a batch of products where the input's rows do not lie one after the
    other: PyTorch then spares the copy. The two round differently, so a policy that trains and its frozen reference
    would differ before the first step. Contiguous inputs take one way in both.

    Args:
        modules (`Iterable[nn.Module]`): Layers of policy and reference alike; others than [`~torch.nn.Linear`] are left
            as they are, and those that have been seen to before.
    """
    for layer in modules:
        if isinstance(layer, nn.Linear) and _contiguous not in forward_pre_hooks(layer):
            layer.register_forward_pre_hook(_contiguous)


def _contiguous(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])
