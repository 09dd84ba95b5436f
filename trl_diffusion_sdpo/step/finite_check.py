"""Flags of a step that all processes must agree on: whether a loss is not finite, and whether training shall stop.

Processes exchange the flags by one small all-reduce per optimizer step. It is queued before the last backward pass, so
the accelerator does not wait for the other processes, and the CPU reads it before the optimizer changes weights.
"""

from __future__ import annotations

from typing import Any

import torch

from ..engines.processes import max_over_processes, several_processes
from ..utils.errors import NotFiniteError


class FiniteCheck:
    """Stops a run if a loss or a gradient is not finite.

    It notices a loss before the optimizer changes the weights. One flag per step is enough for all micro-batches and
    processes, because a single bad loss spoils the averaged gradient. The flag is copied to the CPU while the last
    backward pass is queued, and read afterwards, so the CPU only waits for the forward pass.

    In rare cases, a gradient is infinite or NaN although the loss is finite. The weights that it spoils are noticed at
    the next step, or before they are saved.

    Args:
        exchange ([`StepExchange`]): Exchanges the flag between processes.
        before_backward (`bool`): Whether [`FiniteCheck.verify`] must come before the last backward pass of a step, in
            which the engine (DeepSpeed) already changes the weights.
    """

    def __init__(self, exchange: StepExchange, *, before_backward: bool = False):
        self.before_backward = before_backward
        self._exchange = exchange
        self.reset()

    def reset(self) -> None:
        """Forget the losses of a step, within which an earlier training may have stopped."""
        self._watched: list[tuple[torch.Tensor, torch.Tensor]] = []  # losses and rows of this step's micro-batches
        self._bad: torch.Tensor | None = None
        self._sent = False

    def watch(self, pair_losses: torch.Tensor, rows: torch.Tensor, *, last: bool) -> None:
        """Record the losses of a micro-batch.

        Args:
            rows (`torch.Tensor` of shape `(B,)`): Row of each pair in the data set.
            last (`bool`): Whether this is the last micro-batch before an optimizer step. The flag is then sent to the
                other processes.
        """
        if self._sent:
            self.reset()
        self._watched.append((pair_losses.detach(), rows))
        bad = ~torch.isfinite(pair_losses.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad
        if last:
            self._exchange.send(self._bad)
            self._sent = True

    def verify(self, step: int) -> None:
        """Raise `FloatingPointError`, with the step's number and rows of the data set, if a loss of this optimizer step
        is not finite. The step has not changed the weights yet.

        Call it after `watch` has seen all micro-batches of the step.
        """
        if not self._exchange.receive():
            return
        losses, rows = (torch.cat(batches) for batches in zip(*self._watched, strict=True))
        values = zip(rows.tolist(), losses.float().tolist(), strict=True)
        bad = [(row, value) for row, value in values if not abs(value) < float("inf")]
        listed = ", ".join(f"row {row}: {value}" for row, value in bad[:8]) or "in another process"
        raise NotFiniteError(
            f"Every pair's loss must be finite. At step {step}, {len(bad)} of {len(losses)} losses were not finite "
            f"({listed}). This step has not changed the weights. Look at these rows of the data set, resume from the "
            "last checkpoint with a lower learning rate, or use bf16 instead of fp16."
        )


class StepExchange:
    """Exchanges two flags between all processes in every step: whether a loss is not finite, and whether training shall
    stop.

    All processes read the same flags at the same step. Reading them makes the CPU wait only for the step's forward
    passes.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget all flags, when training begins."""
        self._several = several_processes()
        self._requested = False
        self._stops = False
        self._messages: list[HostCopy] = []

    def request_stop(self) -> None:
        """Ask all processes to stop training. After this step's [`StepExchange.send`], the request goes out with the
        next step."""
        self._requested = True

    def send(self, bad_loss: torch.Tensor) -> None:
        """Send this step's flags to the other processes, by queueing an all-reduce. Call it in all processes.

        Args:
            bad_loss (`torch.Tensor` of shape `()`): Whether a loss of this process was not finite, on the device.
        """
        flags = torch.stack([bad_loss, torch.full_like(bad_loss, self._requested)]).to(torch.int32)
        self._messages = [HostCopy(max_over_processes(flags) if self._several else flags)]

    def receive(self) -> bool:
        """Return whether a loss of any process was not finite, or `False` without a `send` since the last call."""
        if not self._messages:
            return False
        bad_loss, stops = self._messages.pop().read()
        self._stops = bool(stops)
        return bool(bad_loss)

    @property
    def stops(self) -> bool:
        """Whether training stops after this step.

        With one process, after `request_stop`; with several, after any of them has sent its request.
        """
        return self._stops if self._several else self._requested


class HostCopy:
    """Asynchronous copy of a small tensor (no DTensor) from a device to pinned CPU memory. A tensor that is already on
    the CPU is not copied.

    `read` waits until the device has computed the values, but not for work that was queued after the copy.
    """

    def __init__(self, values: torch.Tensor):
        self._values = values.detach()
        self._arrived: torch.Event | None = None
        if not is_on_host(values):
            self._values = pinned_like(values)
            self._values.copy_(values.detach(), non_blocking=True)
            self._arrived = event_on(values.device)
            self._arrived.record()

    def read(self) -> Any:
        """Wait for the values, and return them as a number or as nested lists."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


# Tests on a CPU replace these functions, to run the code for accelerators.


def is_on_host(values: torch.Tensor) -> bool:
    """Return whether a tensor is on the CPU."""
    return values.device.type == "cpu"


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Return an empty CPU tensor of the same shape and dtype, in pinned memory (Apple's GPUs need none)."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type != "mps")


def event_on(device: torch.device) -> torch.Event:
    """Return a new event, with which the CPU can wait for the current stream of the device."""
    return torch.Event(device=device)
