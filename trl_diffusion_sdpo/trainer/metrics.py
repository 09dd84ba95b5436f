"""Averages of the step's detached scalars, kept on the device until they are logged."""

from __future__ import annotations

import torch
from accelerate import Accelerator


class MetricMeter:
    """Weighted sums of named scalars; one transfer to the host, and one reduction over processes, per log."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float | torch.Tensor] = {}

    def add(self, metrics: dict[str, torch.Tensor], weight: float | torch.Tensor) -> None:
        """Add a batch's means; `weight` is its size in pairs, or what a value that belongs to a step counts for."""
        for name, value in metrics.items():
            weighted = value.detach().float() * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all pairs of all processes since the last call, without what has weighed nothing; every process
        must call it together."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        weights = torch.stack([_on_device(self._weights[name], sums.device) for name in names])
        totals = accelerator.reduce(torch.stack([sums, weights]), reduction="sum")
        self._sums, self._weights = {}, {}
        means, weighed = torch.stack([totals[0] / totals[1], totals[1]]).tolist()  # one wait
        return {name: mean for name, mean, weight in zip(names, means, weighed, strict=True) if weight > 0}


def _on_device(weight: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A weight as a float32 scalar; a number is filled in there, since a copy from the host would wait."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device).float()
    return torch.full((), float(weight), dtype=torch.float32, device=device)
