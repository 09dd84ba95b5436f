"""Asynchronous device-to-host copies of a few numbers."""

from __future__ import annotations

from typing import Any

import torch


class HostCopy:
    """An asynchronous device-to-host copy of a small tensor (no DTensor) into pinned memory; on the CPU, none.

    `read` waits for the work that makes the values, not for what was queued after it.
    """

    def __init__(self, values: torch.Tensor):
        self._values, self._arrived = values.detach(), None
        if not is_on_host(values):
            self._values = pinned_like(values)
            self._values.copy_(values.detach(), non_blocking=True)
            self._arrived = event_on(values.device)
            self._arrived.record()

    def read(self) -> Any:
        """The values as a number or nested lists, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


# Functions, so that a test can replace them and take the branch of accelerators on a CPU.


def is_on_host(values: torch.Tensor) -> bool:
    """Whether the values can be read without waiting."""
    return values.device.type == "cpu"


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Host memory of the same shape and dtype; pinned, except on Apple's GPUs, which share the host's memory."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type != "mps")


def event_on(device: torch.device) -> torch.Event:
    """An event to be recorded on the device's current stream."""
    return torch.Event(device=device)
