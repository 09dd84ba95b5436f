"""The micro-batches of an optimizer step: when they are loaded, and how they reach the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on the device. Tensors in pinned memory are copied asynchronously."""
    waits = device.type == "mps"  # MPS has no pinned memory

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return on_device(value, device)
        return value.to(device, non_blocking=not waits) if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in inputs.items()}


class LazyBatches:
    """Iterable over the micro-batches of an optimizer step, for one loop. The constructor loads the first, because a
    data loader draws the random seeds of an epoch with its first batch; the others are loaded when the loop reaches
    them.

    Args:
        batches (`Iterator`): Remaining batches of the epoch.
        count (`int`): Number of micro-batches in the step, of which `batches` must have enough left.
    """

    def __init__(self, batches: Iterator[Any], count: int):
        self._batches = batches
        self._count = count
        self._first = [next(batches)]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        yield self._first.pop()
        for _ in range(self._count - 1):
            yield next(self._batches)
