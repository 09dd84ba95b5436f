"""Computes the memory of an optimizer: its states, and the temporary tensors of its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .allocations import Allocations, FakeDevice, rounded

_QUANTIZED = 1 + 4 / 256  # bytes per 8-bit value: one byte, and a float32 scale for each block of 256 values
# Optimizer of bitsandbytes -> bytes of its states per weight.
_STATES: dict[str, float] = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit"), 2 * _QUANTIZED),
    **dict.fromkeys(("lion_8bit", "rmsprop_bnb_8bit"), _QUANTIZED),
    **dict.fromkeys(("lion_32bit", "rmsprop_bnb"), 4.0),
    # Paged states count as 0, because they move to the CPU if the device has no room for them.
    **dict.fromkeys(("paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit", "paged_lion_32bit"), 0.0),
}
_TORCH: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw_torch": (torch.optim.AdamW, {}),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}
OPTIMIZERS = (*_TORCH, *_STATES, "adafactor")


def optimizer_memory(
    name: str, trained: list[nn.Parameter], max_norm: float | None, device: FakeDevice, mode: FakeTensorMode
) -> tuple[int, int]:
    """Return two numbers of bytes: of the optimizer's states, and of the temporary tensors at the peak of clipping and
    stepping.

    Raises:
        `ValueError`: If a plan cannot compute the memory of this optimizer.
    """
    if name in _STATES:
        return sum(round(weight.numel() * _STATES[name]) for weight in trained), 0
    if name == "adafactor":
        return sum(_factored(weight) for weight in trained), max((4 * weight.numel() for weight in trained), default=0)
    if name not in _TORCH:
        raise ValueError(
            f"A plan can only compute the memory of these optimizers: {', '.join(OPTIMIZERS)}. Got `optim={name}`. Set "
            "`optim` to an optimizer of this list."
        )
    optimizer_class, settings = _TORCH[name]
    with mode:  # the optimizer has float32 weights, even if the engine rounds the module's weights
        trained = [nn.Parameter(torch.empty(weight.shape, device="cpu")) for weight in trained]
    if device.type != "cpu" and "fused" not in settings:
        settings = {**settings, "foreach": True}  # torch's default on a GPU
    with mode:
        optimizer = optimizer_class(trained, **settings)
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        allocations = Allocations(device.block)
        allocations.ignore([*states, *trained, *(weight.grad for weight in trained)])
        with allocations, allocations.moment("step"):
            if max_norm:
                torch.nn.utils.clip_grad_norm_(trained, max_norm)
            optimizer.step()
    size = sum(rounded(value.numel() * value.element_size(), device.block) for value in states)
    return size, allocations.peaks["step"]


def _factored(weight: torch.Tensor) -> int:
    """Return the bytes of Adafactor's states for a weight: one number for each row and each column of a matrix, or one
    for each element of a vector. There is no momentum."""
    if weight.dim() < 2:
        return 4 * weight.numel()
    rows, columns = weight.shape[-2:]
    return 4 * (weight.numel() // columns + weight.numel() // rows)
