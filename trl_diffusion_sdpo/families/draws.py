"""Random numbers of pairs. They are drawn on the CPU, so that a seed means the same noise on every machine: CUDA's own
numbers depend on the card's number of multiprocessors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

WITHOUT_PINNED_MEMORY = ("cpu", "mps", "meta")  # types of devices to which a copy from the host is immediate


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator for each seed. A pair's draws depend on its own seed, and not on its batch."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def uniform(generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return one number in `[0, 1)` from each of N generators: `(N,)`, on the CPU."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators])


def standard_normal(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return standard normal noise on a device; the host does not wait for the device.

    Args:
        shape: `(N, ...)`.
        generators (of length N): Row i is drawn from generator i, which must be on the CPU.
    """
    noise = torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type not in WITHOUT_PINNED_MEMORY)
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    return noise.to(device, non_blocking=noise.is_pinned())


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small tensor of the CPU to a device, without waiting for the device."""
    if device.type in WITHOUT_PINNED_MEMORY:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
