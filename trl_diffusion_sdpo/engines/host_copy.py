"""A few numbers on their way from an accelerator to the host, which goes on queueing work in the meantime."""

from __future__ import annotations

from typing import Any

import torch


class HostCopy:
    """Values that the host will read later.

    On an accelerator the copy is queued behind the work that makes the values, into pinned memory, and `read` waits
    for that work only, not for what was queued after it. On the CPU there is nothing to wait for.

    Args:
        values (`torch.Tensor`): Small; a plain tensor, whole on this process.
    """

    def __init__(self, values: torch.Tensor):
        self._values, self._arrived = values.detach(), None
        if not is_on_host(values):
            self._values = pinned_like(values)
            self._values.copy_(values.detach(), non_blocking=True)
            self._arrived = event_on(values.device)
            self._arrived.record()

    def read(self) -> Any:
        """The values as a number or nested lists of them, as soon as they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


# Functions of their own, so that a test can walk the branch of accelerators without one.


def is_on_host(values: torch.Tensor) -> bool:
    """Whether reading them waits for nothing."""
    return values.device.type == "cpu"


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Memory of the host that an accelerator can copy to while the host does something else."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)


def event_on(device: torch.device) -> torch.Event:
    """To be recorded behind the work that is queued on a device, and waited for."""
    return torch.Event(device=device)
