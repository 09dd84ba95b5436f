"""Checks that every loss and gradient is finite, without making the accelerator wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..engines.host_copy import HostCopy
from ..engines.sharding import local_tensor
from ..engines.step_exchange import StepExchange


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
