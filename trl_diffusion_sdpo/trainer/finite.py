"""A look at every loss and gradient for values that are not finite, without holding the accelerator up."""

from __future__ import annotations

import torch
import torch.distributed as dist


class FiniteCheck:
    """Stops a run whose loss or gradient is not finite.

    A loss is caught before the optimizer's step: the verdict is copied to the host while the backward pass is being
    queued and read after it, so that the host waits for the forward pass only and the accelerator never runs dry. All
    processes share one verdict, since a gradient is averaged over them. A gradient that is not finite although the
    loss is, which is rare, is caught one step later, before anything is saved.
    """

    def __init__(self):
        self._loss = Verdict()
        self._gradient = Verdict()
        self._losses: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._gradient_step = 0

    def watch(self, pair_losses: torch.Tensor, rows: torch.Tensor) -> None:
        """Note a batch's losses `(B,)`; `rows` `(B,)` are its pairs' numbers in the data set."""
        self._losses, self._rows = pair_losses, rows
        self._loss.ask(torch.isfinite(pair_losses).all())

    def watch_gradient(self, norm: torch.Tensor, step: int) -> None:
        """Note the gradient's norm, the same on all processes, before the optimizer takes `step`."""
        self._gradient_step = step
        self._gradient.ask(torch.isfinite(norm), shared=True)

    def verify(self, step: int) -> None:
        """Raise if the watched losses, or the gradient of the step before, were not finite.

        Raises:
            `FloatingPointError`: With the optimizer step and, for a loss, the rows; the weights then are as they were.
        """
        self.verify_gradient()
        if not self._loss.answer():
            self._report(step)

    def verify_gradient(self) -> None:
        """Raise if the gradient of the last step was not finite; called before anything is saved."""
        if not self._gradient.answer():
            raise FloatingPointError(
                f"Every gradient must be finite; at step {self._gradient_step} its norm was not, while the loss was. "
                "Unless DeepSpeed has left that step out, it has spoiled the weights; nothing was saved since. Resume "
                "from the last checkpoint with a lower learning rate, or use bf16 instead of fp16."
            )

    def _report(self, step: int) -> None:
        values = zip(self._rows.tolist(), self._losses.float().tolist(), strict=True)
        bad = [(row, value) for row, value in values if not abs(value) < float("inf")]
        listed = ", ".join(f"row {row}: {value}" for row, value in bad[:8]) or "those of another process"
        raise FloatingPointError(
            f"Every pair's loss must be finite; at step {step}, {len(bad)} of {len(self._losses)} were not ({listed}). "
            "The weights were not changed. Look at these rows, lower the learning rate, or use bf16 instead of fp16."
        )


class Verdict:
    """A yes or no that is computed on the device and read on the host when it has arrived there."""

    def __init__(self):
        self._value: torch.Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def ask(self, finite: torch.Tensor, *, shared: bool = False) -> None:
        """Send a boolean scalar on its way; the processes' conjunction, unless they `shared` it before."""
        finite = finite.detach().to(torch.int32)
        if not shared and dist.is_available() and dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.is_cuda:
            self._value, self._ready = finite, None
            return
        self._value = torch.empty((), dtype=finite.dtype, pin_memory=True)
        self._value.copy_(finite, non_blocking=True)
        self._ready = torch.cuda.Event()
        self._ready.record()

    def answer(self) -> bool:
        """The newest verdict, once; yes where none was asked for."""
        if self._value is None:
            return True
        if self._ready is not None:
            self._ready.synchronize()
        value, self._value = self._value, None
        return bool(value)
