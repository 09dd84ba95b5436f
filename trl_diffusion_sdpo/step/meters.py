"""Weighted means of a run's metrics, added on the device and read by the CPU only at each log."""

from __future__ import annotations

import torch
from accelerate import Accelerator


class MetricMeter:
    """Weighted means of named scalars. Reading them costs one transfer from the device to the CPU and one reduction
    over processes."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float | torch.Tensor] = {}

    def add(self, metrics: dict[str, torch.Tensor], weight: float | torch.Tensor) -> None:
        """Add the metrics of a batch, which are means over its pairs. `weight` is the number of pairs, or usually 1 for
        values that are measured once per step."""
        for name, value in metrics.items():
            weighted = value.detach().float() * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the weighted means over all processes since the last call, without metrics of total weight 0. Call it
        in all processes together."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        weights = torch.stack([_on_device(self._weights[name], sums.device) for name in names])
        totals = accelerator.reduce(torch.stack([sums, weights]), reduction="sum")
        self._sums = {}
        self._weights = {}
        means, weighed = torch.stack(
            [totals[0] / totals[1], totals[1]]
        ).tolist()  # the only place where the CPU waits for the device
        return {name: mean for name, mean, weight in zip(names, means, weighed, strict=True) if weight > 0}


def _on_device(weight: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a weight as a float32 scalar on the device. A Python number is filled in there: a copy would make the CPU
    wait."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device).float()
    return torch.full((), float(weight), dtype=torch.float32, device=device)
