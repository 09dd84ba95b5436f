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
        weights = torch.stack([torch.as_tensor(self._weights[name], device=sums.device).float() for name in names])
        totals = accelerator.reduce(torch.stack([sums, weights]), reduction="sum")
        self._sums, self._weights = {}, {}
        means, weighed = (totals[0] / totals[1]).tolist(), totals[1].tolist()
        return {name: mean for name, mean, weight in zip(names, means, weighed, strict=True) if weight > 0}
