"""One small all-reduce in every optimizer step, queued before the last backward pass and read before the weights
change."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from .host_copy import HostCopy
from .processes import several_processes


class StepExchange:
    """Whether any process has a loss that is not finite, and whether any was asked to stop: all processes know the same
    at the same step, and the host waits for the step's forward passes only.

    `stop_requested` tells whether this process was asked to stop. A request after [`StepExchange.send`] is sent in the
    next step.
    """

    def __init__(self, stop_requested: Callable[[], bool] | None = None):
        self._stop_requested = stop_requested
        self._message: HostCopy | None = None
        self._stops = False

    def send(self, bad_loss: torch.Tensor) -> None:
        """Queue this step's all-reduce; all processes must call it. `bad_loss`, a boolean scalar on the device, says
        whether a loss of this process was not finite."""
        stop = self._stop_requested is not None and self._stop_requested()
        message = torch.stack([bad_loss, torch.full_like(bad_loss, stop)]).to(torch.int32)
        if several_processes():
            dist.all_reduce(message, op=dist.ReduceOp.MAX)
        self._message = HostCopy(message)

    def receive(self) -> bool:
        """Whether a loss of any process was not finite; `False` where nothing was sent since the last call."""
        if self._message is None:
            return False
        (bad_loss, stops), self._message = self._message.read(), None
        self._stops = bool(stops)
        return bool(bad_loss)

    def stops(self, requested: bool) -> bool:
        """Whether training stops after this step: with one process as `requested` says, else as all have agreed."""
        return self._stops if several_processes() else requested
