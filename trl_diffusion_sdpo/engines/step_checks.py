"""Checks that every loss and gradient is finite, and agreement of all processes to stop.

The accelerator does not wait for them. Every optimizer step has one small all-reduce. It is queued before the last
backward pass and read before the weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .processes import several_processes
from .sharding import local_tensor


class FiniteCheck:
    """Check that stops a run whose loss or gradient is not finite.

    The check detects a loss that is not finite before the optimizer's step. One flag per step covers all micro-batches
    and processes, because gradients are averaged over them. The flag is copied to the host while the last backward
    pass is being queued, and read afterwards. So the host waits for the forward pass only.

    A gradient may be infinite or NaN although the loss is finite. This is rare. The check detects it one step later,
    before anything is saved.

    Args:
        networks (`Callable`, *optional*): Returns the networks that computed the losses, by name. Their weights are
            checked only if a loss is not finite.
    """

    def __init__(
        self, exchange: StepExchange | None = None, networks: Callable[[], Mapping[str, nn.Module]] | None = None
    ):
        self._exchange = StepExchange() if exchange is None else exchange
        self._networks = dict if networks is None else networks
        self._gradient: HostCopy | None = None
        self._gradient_step = 0
        self._watched: list[tuple[torch.Tensor, torch.Tensor]] = []  # losses and rows of this step
        self._bad: torch.Tensor | None = None
        self._sent = False

    def watch(self, pair_losses: torch.Tensor, rows: torch.Tensor, *, last: bool) -> None:
        """Record the losses of a micro-batch.

        Args:
            pair_losses (`torch.Tensor` of shape `(B,)`): Loss of each pair.
            rows (`torch.Tensor` of shape `(B,)`): Row of each pair in the data set.
            last (`bool`): Whether this is the last micro-batch before an optimizer step. It sends the flag.
        """
        if self._sent:
            self._watched = []
            self._bad = None
            self._sent = False
        self._watched.append((pair_losses.detach(), rows))
        bad = ~torch.isfinite(pair_losses.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad
        if last:
            self._exchange.send(self._bad)
            self._sent = True

    def watch_gradient(self, norm: torch.Tensor, step: int) -> None:
        """Record the gradient's norm before the optimizer takes `step`.

        `norm` must be a plain tensor that is equal on all processes.
        """
        self._gradient = HostCopy(torch.isfinite(norm))
        self._gradient_step = step

    def verify(self, step: int) -> None:
        """Raise if a loss of this step, or the gradient of the previous step, is not finite.

        Call this after all micro-batches of the step were watched.

        Raises:
            `FloatingPointError`: The message names the optimizer step. For a loss it also names the rows, and the
                step has not changed the weights.
        """
        self.verify_gradient()
        if self._exchange.receive():
            self._report(step)

    def verify_gradient(self) -> None:
        """Raise if the gradient of the last step was not finite. The trainer calls this before it saves anything."""
        gradient = self._gradient
        self._gradient = None
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
    """Return the names of weights that are not finite in this process's shards. Waits for the device."""
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
    """Exchange of two flags between all processes in every step: a loss is not finite, and training shall stop.

    All processes read equal flags at the same step. The host waits for the step's forward passes only.

    Args:
        stop_requested (`Callable`, *optional*): Returns whether this process was asked to stop. A request after
            [`StepExchange.send`] is sent in the next step.
    """

    def __init__(self, stop_requested: Callable[[], bool] | None = None):
        self._stop_requested = stop_requested
        self._message: HostCopy | None = None
        self._stops = False

    def send(self, bad_loss: torch.Tensor) -> None:
        """Queue this step's all-reduce. All processes must call this.

        Args:
            bad_loss (`torch.Tensor` of shape `()`): Whether a loss of this process was not finite, on the device.
        """
        stop = self._stop_requested is not None and self._stop_requested()
        message = torch.stack([bad_loss, torch.full_like(bad_loss, stop)]).to(torch.int32)
        if several_processes():
            dist.all_reduce(message, op=dist.ReduceOp.MAX)
        self._message = HostCopy(message)

    def receive(self) -> bool:
        """Return whether a loss of any process was not finite. `False` if nothing was sent since the last call."""
        if self._message is None:
            return False
        (bad_loss, stops), self._message = self._message.read(), None
        self._stops = bool(stops)
        return bool(bad_loss)

    def stops(self, requested: bool) -> bool:
        """Return whether training stops after this step.

        One process stops if `requested`. Several processes stop if any of them sent a request.
        """
        return self._stops if several_processes() else requested


class HostCopy:
    """Asynchronous copy of a small tensor (no DTensor) from a device to pinned memory. On the CPU, it does nothing.

    `read` waits for the work that computes the values, and not for work that was queued after the copy.
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
        """Wait for the values and return them as a number or nested lists."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


# Functions, so that a test can replace them and take the branch of accelerators on a CPU.


def is_on_host(values: torch.Tensor) -> bool:
    """Return whether the values can be read without waiting."""
    return values.device.type == "cpu"


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Return host memory of the same shape and dtype. It is pinned, except on Apple's GPUs: they share host memory."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type != "mps")


def event_on(device: torch.device) -> torch.Event:
    """Return an event for the device's current stream."""
    return torch.Event(device=device)
