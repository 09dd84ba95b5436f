"""The device of `gpu_speed.py`: its peak of arithmetic by its maker, and peaks of memory within parts of a step."""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30
# TFLOP/s of dense matrix products in bf16 with sums in float32, by a part of the name that PyTorch reports; the first
# that occurs counts. NVIDIA states the double where half of the weights are zeros. Sources: data sheets of B200, H100
# (H200 has the same die), A100, L40S, L4 and A10; white papers of GA102 (RTX 3090, A6000), AD102 (RTX 4090) and GB202
# (RTX 5090).
PEAK_TERAFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "A6000": 154.8,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s that the maker states for a device; `None` for one that is not in the table."""
    found = (peak for part, peak in PEAK_TERAFLOPS.items() if re.search(rf"\b{part}\b", device_name))
    return next((1e12 * peak for peak in found), None)


class Memory:
    """What PyTorch has allocated on a CUDA device, or the largest memory that this process ever had on the CPU, where a
    part can only be seen if it exceeds all before.

    Attributes:
        name (`str`): Of the device.
        total (`int`): Bytes of the device.
        peaks (`dict[str, float]`): GiB by part.
    """

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self.name = torch.cuda.get_device_name() if self._cuda else "CPU"
        self.total = torch.cuda.mem_get_info()[1] if self._cuda else 0
        self.peaks: dict[str, float] = {}
        self._highest = 0

    def now(self) -> float:
        """Seconds, after all queued work."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def note(self, name: str) -> None:
        """Note what is allocated now."""
        self.peaks[name] = (torch.cuda.memory_allocated() if self._cuda else self._peak()) / GIB

    def begin(self) -> None:
        """Begin a step, whose peak `end` notes."""
        self.note("between steps")
        self._highest = 0
        self._reset()

    def end(self) -> None:
        self._highest = max(self._highest, self._peak())
        self.peaks["step"] = self._highest / GIB
        self.peaks["policy and backward pass"] = self._peak() / GIB

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note the peak of a part of the step; parts do not overlap."""
        self._highest = max(self._highest, self._peak())
        self._reset()
        try:
            yield
        finally:
            peak = self._peak()
            self.peaks[name] = max(self.peaks.get(name, 0), peak / GIB)
            self._highest = max(self._highest, peak)
            self._reset()

    def _peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
