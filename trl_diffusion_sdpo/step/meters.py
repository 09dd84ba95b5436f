"""Sums of a step's or an evaluation's detached scalars, kept on the device until they are logged."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..engines.gradients import exact_dtype
from ..losses import error_moments, noise_bin_changes, noise_bin_of


class NoiseBinMeter:
    """Sums of errors by noise bin over an evaluation; one reduction over processes when they are read."""

    def __init__(self, num_noise_bins: int):
        self._bins = num_noise_bins
        self._sums: torch.Tensor | None = None

    def add(self, noise_levels: torch.Tensor, errors: torch.Tensor, counts: bool) -> None:
        """Add B pairs: noise levels `(B,)` and errors `(B, 4)`, of winner and loser, policy then reference. Pairs that
        do not count add zeros, so that all processes have the same names."""
        rows = error_moments(errors.to(exact_dtype(errors.device))) * float(counts)
        sums = torch.zeros(self._bins, rows.shape[1], device=rows.device, dtype=rows.dtype)
        sums.index_add_(0, noise_bin_of(noise_levels, self._bins), rows)
        self._sums = sums if self._sums is None else self._sums + sums

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of [`~trl_diffusion_sdpo.losses.noise_bin_changes`]; all processes must call it together."""
        if self._sums is None:
            return {}
        sums, self._sums = accelerator.reduce(self._sums, reduction="sum").tolist(), None
        return noise_bin_changes(sums)


class MetricMeter:
    """Weighted sums of named scalars; one transfer to the host, and one reduction over processes, per log."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float | torch.Tensor] = {}

    def add(self, metrics: dict[str, torch.Tensor], weight: float | torch.Tensor) -> None:
        """Add a batch's means; `weight` is its size in pairs, or the weight of a value that is measured once a step."""
        for name, value in metrics.items():
            weighted = value.detach().float() * weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all pairs of all processes since the last call, without those of weight 0; all processes must call
        it together."""
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
    """A weight as a float32 scalar; a number by a fill on the device, since a copy from the host would wait."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device).float()
    return torch.full((), float(weight), dtype=torch.float32, device=device)
