"""Checks that every loss and gradient is finite, and agreement to stop, without making the accelerator wait: one small
all-reduce in every optimizer step, queued before the last backward pass and read before the weights change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .processes import several_processes
from .sharding import local_tensor


class FiniteCheck:
    """Stops a run whose loss or gradient is not finite.

    A loss is found before the optimizer's step: once a step, one flag for all micro-batches and processes (gradients
    are averaged over them) is copied to the host while the last backward pass is being queued and read after it, so
    that the host waits for the forward pass only. A gradient that is not finite although the loss is, which is rare,
    is found one step later, before anything is saved.

    Args:
        networks (`Callable`, *optional*): Returns what the losses were computed with, by name: where a loss is not
            finite, and only then, their weights are looked at.
    """

    def __init__(
        self, exchange: StepExchange | None = None, networks: Callable[[], Mapping[str, nn.Module]] | None = None
    ):
        self._exchange = StepExchange() if exchange is None else exchange
        self._networks = dict if networks is None else networks
        self._gradient: HostCopy | None = None
        self._gradient_step = 0
        self._watched: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the step: losses and rows
        self._bad: torch.Tensor | None = None
        self._sent = False

    def watch(self, pair_losses: torch.Tensor, rows: torch.Tensor, *, last: bool) -> None:
        """Note a micro-batch's losses `(B,)`; `rows` `(B,)` are its pairs' numbers in the data set. The `last` one
        before an optimizer step sends the flag."""
        if self._sent:
            self._watched, self._bad, self._sent = [], None, False
        self._watched.append((pair_losses.detach(), rows))
        bad = ~torch.isfinite(pair_losses.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad
        if last:
            self._exchange.send(self._bad)
            self._sent = True

    def watch_gradient(self, norm: torch.Tensor, step: int) -> None:
        """Note the gradient's norm, a plain tensor that is the same on all processes, before the optimizer takes
        `step`."""
        self._gradient, self._gradient_step = HostCopy(torch.isfinite(norm)), step

    def verify(self, step: int) -> None:
        """Raise if the losses of the step, once all were watched, or the gradient of the step before were not finite.

        Raises:
            `FloatingPointError`: With the optimizer step and, for a loss, the rows; the weights then are as they were.
        """
        self.verify_gradient()
        if self._exchange.receive():
            self._report(step)

    def verify_gradient(self) -> None:
        """Raise if the gradient of the last step was not finite; called before anything is saved."""
        gradient, self._gradient = self._gradient, None
        if gradient is not None and not gradient.read():
            raise FloatingPointError(
                f"Every gradient must be finite; at step {self._gradient_step} its norm was not, while the loss was. "
                "Unless DeepSpeed has left that step out, it has spoiled the weights; nothing was saved since. Resume "
                "from the last checkpoint with a lower learning rate, or use bf16 instead of fp16."
            )

    def _report(self, step: int) -> None:
        losses, rows = (torch.cat(parts) for parts in zip(*self._watched, strict=True))
        values = zip(rows.tolist(), losses.float().tolist(), strict=True)
        bad = [(row, value) for row, value in values if not abs(value) < float("inf")]
        listed = ", ".join(f"row {row}: {value}" for row, value in bad[:8]) or "those of another process"
        spoiled = spoiled_weights(self._networks())
        if spoiled:
            way = "Download the model again, or another revision or precision of it."
            if step > 1:
                way = "Resume from the last checkpoint with a lower learning rate, or use bf16 instead of fp16."
            raise FloatingPointError(
                f"Every pair's loss must be finite; at step {step}, {len(bad)} of {len(losses)} were not, as weights "
                f"were not finite before it: {', '.join(spoiled[:3])}, of {len(spoiled)}. {way}"
            )
        raise FloatingPointError(
            f"Every pair's loss must be finite; at step {step}, {len(bad)} of {len(losses)} were not ({listed}). "
            "The weights were not changed. Look at these rows, lower the learning rate, or use bf16 instead of fp16."
        )


def spoiled_weights(networks: Mapping[str, nn.Module]) -> list[str]:
    """Names of weights with a number that is not finite, of this process's shards. Waits for the device."""
    return [
        f"`{name}` {weight}"
        for name, network in networks.items()
        for weight, values in network.state_dict(keep_vars=True).items()
        if values.is_floating_point() and not values.is_meta and not _is_finite(values)
    ]


@torch.no_grad()
def _is_finite(values: torch.Tensor) -> bool:
    shard = getattr(values, "ds_tensor", values)  # under ZeRO-3 the weight itself is empty
    return bool(torch.isfinite(local_tensor(shard).float()).all())


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
