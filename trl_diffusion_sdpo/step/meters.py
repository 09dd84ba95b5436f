"""Values that a step leaves on the device until they are read: metrics, sizes of margins, and flags of bad losses.

Metrics are read at each log. The flags of a step are read before the weights change. For them, every optimizer step has
one small all-reduce, which is queued before the last backward pass, so the accelerator does not wait.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import nn

from ..engines.processes import max_over_processes, several_processes
from ..engines.sharding import spoiled_weights
from ..losses import BetaController, PreferenceLossOutput

BETA_FILE = "auto_beta.json"


class MetricMeter:
    """Weighted means of named scalars. Each log costs one transfer to the host and one reduction over processes."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float | torch.Tensor] = {}

    def add(self, metrics: dict[str, torch.Tensor], weight: float | torch.Tensor) -> None:
        """Add the means of a batch. `weight` is the number of pairs, or the weight of a value measured once a step."""
        for name, value in metrics.items():
            weighted = value.detach().float() * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes since the last call. Values of weight 0 are left out. All processes must
        call it together."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        weights = torch.stack([_on_device(self._weights[name], sums.device) for name in names])
        totals = accelerator.reduce(torch.stack([sums, weights]), reduction="sum")
        self._sums, self._weights = {}, {}
        means, weighed = torch.stack([totals[0] / totals[1], totals[1]]).tolist()  # the only wait for the device
        return {name: mean for name, mean, weight in zip(names, means, weighed, strict=True) if weight > 0}


def _on_device(weight: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a weight as a float32 scalar. A number is filled in on the device, because a copy would wait."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device).float()
    return torch.full((), float(weight), dtype=torch.float32, device=device)


class StoredController:
    """A controller that adjusts the loss while training. Checkpoints contain its state.

    Attributes:
        setting (`str`): The setting that turns it on.
        file (`str`): Name of its file in a checkpoint.
    """

    setting: ClassVar[str]
    file: ClassVar[str]

    def __init__(self, controller: Any):
        self.controller = controller

    def save(self, folder: Path) -> None:
        """Write the controller's state."""
        (folder / self.file).write_text(json.dumps(self.controller.state()) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read the file that `save` wrote. Raises `ValueError` if it is missing or does not fit the settings."""
        file = folder / self.file
        if not file.is_file():
            raise ValueError(
                f"A checkpoint with `{self.setting}` must contain {self.file}. {folder} does not. Resume from a "
                f"complete checkpoint of such a run, or leave `{self.setting}` out."
            )
        self.controller.load_state(json.loads(file.read_text(encoding="utf-8")))


class AutoBeta(StoredController):
    """Sums the sizes of an optimizer step's margins, and adjusts beta by their mean after the step.

    Args:
        controller ([`~trl_diffusion_sdpo.losses.BetaController`]): Controller of beta.
        meter ([`MetricMeter`]): Meter of training.
    """

    setting, file = "auto_beta", BETA_FILE
    controller: BetaController

    def __init__(self, controller: BetaController, meter: MetricMeter):
        super().__init__(controller)
        self._meter = meter
        self._sums: torch.Tensor | None = None  # sum of the sizes and number of pairs, (2,)

    def begin(self) -> None:
        """Reset the sums. An earlier training may have stopped within an optimizer step."""
        self._sums = None

    def add(self, outputs: PreferenceLossOutput) -> None:
        """Add a micro-batch. Its loss must have used the controller's beta."""
        margins = self.controller.margins(outputs.pair_rewards)
        sums = torch.stack([margins.sum(), torch.ones_like(margins).sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def after_step(self) -> None:
        """Log the beta of the optimizer step, then adjust it. All processes must call it together."""
        assert self._sums is not None
        self._meter.add({"rewards/beta": self.controller.beta}, 1)
        sums, self._sums = reduce(self._sums, "sum"), None
        self.controller.steer(sums[0] / sums[1])


class FiniteCheck:
    """Check that stops a run whose loss or gradient is not finite.

    The check detects a loss that is not finite before the optimizer's step. One flag per step covers all micro-batches
    and processes, because gradients are averaged over them. The flag is copied to the host while the last backward
    pass is being queued, and read afterwards. So the host waits for the forward pass only.

    A gradient may be infinite or NaN although the loss is finite. This is rare. The check detects it one step later,
    before anything is saved.

    Args:
        exchange ([`StepExchange`]): Exchange of the flag between processes.
        networks (`Callable`): Returns the networks that computed the losses, by name. Their weights are checked only if
            a loss is not finite.
        before_backward (`bool`): Whether [`FiniteCheck.verify`] must be called before the last backward pass of a step,
            because the engine changes the weights within this pass.
    """

    def __init__(
        self,
        exchange: StepExchange,
        networks: Callable[[], Mapping[str, nn.Module]],
        *,
        before_backward: bool = False,
    ):
        self.before_backward = before_backward
        self._exchange = exchange
        self._networks = networks
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
                f"Every gradient must be finite. Its norm at step {self._gradient_step} was not, but the loss was. "
                "This step has ruined the weights unless DeepSpeed skipped it. Nothing was saved since. Resume from "
                "the last checkpoint with a lower learning rate, or use bf16 instead of fp16."
            )

    def _report(self, step: int) -> None:
        losses, rows = (torch.cat(batches) for batches in zip(*self._watched, strict=True))
        values = zip(rows.tolist(), losses.float().tolist(), strict=True)
        bad = [(row, value) for row, value in values if not abs(value) < float("inf")]
        listed = ", ".join(f"row {row}: {value}" for row, value in bad[:8]) or "in another process"
        spoiled = spoiled_weights(self._networks())
        if spoiled:
            advice = "Download the model again, or use another revision or precision of it."
            if step > 1:
                advice = "Resume from the last checkpoint with a lower learning rate, or use bf16 instead of fp16."
            raise FloatingPointError(
                f"Every pair's loss must be finite. At step {step}, {len(bad)} of {len(losses)} were not, because "
                f"{len(spoiled)} weights were not finite before the step: {', '.join(spoiled[:3])}. {advice}"
            )
        raise FloatingPointError(
            f"Every pair's loss must be finite. At step {step}, {len(bad)} of {len(losses)} were not ({listed}). The "
            "weights were not changed. Look at these rows, lower the learning rate, or use bf16 instead of fp16."
        )


class StepExchange:
    """Exchange of two flags between all processes in every step: a loss is not finite, and training shall stop.

    All processes read equal flags at the same step. The host waits for the step's forward passes only.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget all flags. Training calls this method when it begins."""
        self._several = several_processes()
        self._requested = False
        self._stops = False
        self._messages: list[HostCopy] = []

    def request_stop(self) -> None:
        """Ask all processes to stop. A request after [`StepExchange.send`] is sent in the next step."""
        self._requested = True

    def send(self, bad_loss: torch.Tensor) -> None:
        """Queue this step's all-reduce, if there are several processes. All of them must call this.

        Args:
            bad_loss (`torch.Tensor` of shape `()`): Whether a loss of this process was not finite, on the device.
        """
        flags = torch.stack([bad_loss, torch.full_like(bad_loss, self._requested)]).to(torch.int32)
        self._messages = [HostCopy(max_over_processes(flags) if self._several else flags)]

    def receive(self) -> bool:
        """Return whether a loss of any process was not finite. `False` if nothing was sent since the last call."""
        if not self._messages:
            return False
        bad_loss, stops = self._messages.pop().read()
        self._stops = bool(stops)
        return bool(bad_loss)

    @property
    def stops(self) -> bool:
        """Whether training stops after this step.

        One process stops if a stop was requested. Several processes stop if any of them has sent a request.
        """
        return self._stops if self._several else self._requested


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
