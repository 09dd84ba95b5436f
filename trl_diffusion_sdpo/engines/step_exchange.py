"""What processes tell one another in every optimizer step: one small message, sent while the backward pass is queued
and read before the weights change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from ..trainer.callbacks import CheckpointOnInterrupt
from .host_copy import HostCopy
from .processes import several_processes


class StepExchange:
    """Whether any process has met a loss that is not finite, and whether any was asked to stop: all processes know the
    same at the same step, and none waits for more than its last forward pass of the step and that of the others.

    A process that is asked to stop after it has sent its message says so in the next step.

    Args:
        callbacks (`Iterable`, *optional*): Those of the trainer; the flag of a [`CheckpointOnInterrupt`] among
            them is part of the message, and it reads from here whether any process has set it.
    """

    def __init__(self, callbacks: Iterable[Any] = ()):
        self._interrupts = [callback for callback in callbacks if isinstance(callback, CheckpointOnInterrupt)]
        for callback in self._interrupts:
            callback.exchange = self
        self._message: HostCopy | None = None
        self._stops = False

    def send(self, ruined: torch.Tensor) -> None:
        """Send this step's message on its way; all processes must call it together.

        Args:
            ruined (`torch.Tensor` of shape `()`, bool): Whether a loss of this process was not finite.
        """
        asked = any(callback.interrupted is not None for callback in self._interrupts)
        message = torch.stack([ruined, torch.full_like(ruined, asked)]).to(torch.int32)
        if several_processes():
            dist.all_reduce(message, op=dist.ReduceOp.MAX)
        self._message = HostCopy(message)

    def receive(self) -> bool:
        """Whether a loss of any process was not finite; no, where no message is under way."""
        if self._message is None:
            return False
        (ruined, stops), self._message = self._message.read(), None
        self._stops = bool(stops)
        return bool(ruined)

    def stops(self, asked: bool) -> bool:
        """Whether training stops after this step: as all have agreed, or where there is one process as it was
        `asked`."""
        return self._stops if several_processes() else asked
