"""Meters of training and evaluation. They sum values on the device until the values are logged or adjust beta."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import reduce

from ..engines.gradients import exact_dtype
from ..losses import BetaController, PreferenceLossOutput, noise_bin_changes, noise_bin_of

BETA_FILE = "auto_beta.json"


class NoiseBinMeter:
    """Collects the errors and noise bins of an evaluation's pairs. Processes exchange them once, in `drain`."""

    def __init__(self, num_noise_bins: int):
        self._bins = num_noise_bins
        self._rows: list[torch.Tensor] = []

    def add(self, noise_levels: torch.Tensor, errors: torch.Tensor, counts: bool) -> None:
        """Add B pairs at D draws of noise.

        Args:
            noise_levels (`torch.Tensor` of shape `(B, D)`): Noise levels.
            errors (`torch.Tensor` of shape `(B, D, 4)`): Errors of winner and loser, first the policy's, then the
                reference's.
            counts (`bool`): Whether the pairs count. If not, no row is added, but the process must still call `add`.
        """
        exact = errors.to(exact_dtype(errors.device))
        bins = noise_bin_of(noise_levels, self._bins).unsqueeze(2).to(exact.dtype)
        rows = torch.cat([bins, exact], 2)
        self._rows.append(rows if counts else rows[:0])

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics of [`~trl_diffusion_sdpo.losses.noise_bin_changes`], and clear the meter. All processes
        must call it together."""
        if not self._rows:
            return {}
        rows, self._rows = torch.cat(self._rows), []
        rows = accelerator.gather(accelerator.pad_across_processes(rows, pad_index=-1)).cpu()
        rows = rows[rows[:, 0, 0] >= 0]  # padding has bin -1
        return noise_bin_changes(rows[..., 0].long(), rows[..., 1:])


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


class AutoBeta:
    """Sums the sizes of an optimizer step's margins, and adjusts beta by their mean after the step.

    Args:
        controller ([`~trl_diffusion_sdpo.losses.BetaController`]): Controller of beta.
        meter ([`MetricMeter`]): Meter of training.
    """

    def __init__(self, controller: BetaController, meter: MetricMeter):
        self.controller, self._meter = controller, meter
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

    def save(self, folder: Path) -> None:
        """Write the controller's state."""
        (folder / BETA_FILE).write_text(json.dumps(self.controller.state()) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read the file that [`AutoBeta.save`] wrote. Raises `ValueError` if it is missing."""
        file = folder / BETA_FILE
        if not file.is_file():
            raise ValueError(
                f"A checkpoint with `auto_beta=True` must contain {BETA_FILE}. {folder} does not. Resume from a "
                "complete checkpoint of such a run, or leave `auto_beta` out."
            )
        self.controller.load_state(json.loads(file.read_text(encoding="utf-8")))


def _on_device(weight: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a weight as a float32 scalar. A number is filled in on the device, because a copy would wait."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device).float()
    return torch.full((), float(weight), dtype=torch.float32, device=device)
