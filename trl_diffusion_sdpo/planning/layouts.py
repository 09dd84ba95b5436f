"""What an engine divides over processes, and the buffers that it adds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..utils._compat import block_names
from .allocations import rounded


@dataclass(frozen=True)
class Layout:
    """How `processes` share a model.

    Attributes:
        name (`str`): One of [`ENGINES`].
        half (`bool`): Whether the engine computes in half precision.
        offloads_optimizer (`bool`): Whether the optimizer's states, and the gradients that it reads, are on the CPU.
        offloads_weights (`bool`): Whether shards of weights are on the CPU.
        units (`tuple[str, ...]`, *optional*): Names of the classes of blocks that FSDP2 gathers one at a time; `None`
            for those that the denoiser says are not to be split.
        reshards (`bool`): Whether FSDP2 frees gathered blocks after the forward pass.
        bucket, live (`int`): Elements that DeepSpeed reduces at once, and that ZeRO-3 holds gathered at most.
            Source: https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training
        prefetch (`int`): Elements that ZeRO-3 gathers at once, in a buffer from which it copies each weight.
        overlaps (`bool`): Whether ZeRO-1 and 2 reduce a bucket while the next one fills.
    """

    name: str = "single"
    processes: int = 1
    half: bool = False
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    units: tuple[str, ...] | None = None
    reshards: bool = True
    bucket: int = 500_000_000
    live: int = 1_000_000_000
    prefetch: int = 50_000_000
    overlaps: bool = False

    @property
    def rounds(self) -> bool:
        """Whether passes compute with weights in half precision."""
        return self.half and self.name not in ("single", "ddp")

    @property
    def shards_gradients(self) -> bool:
        """Whether gradients become shards while the backward pass runs."""
        return self.name in ("fsdp2", "zero2", "zero3")

    @property
    def _is_zero(self) -> bool:
        return self.name.startswith("zero")

    def held(self, weight: torch.Tensor, block: int, *, rounded_copy: bool = False) -> int:
        """Bytes of a weight or buffer on the device of one process.

        Args:
            rounded_copy (`bool`): Whether it is of a frozen copy, which FSDP2 holds as it computes.
        """
        size = weight.numel()
        if self.name in ("fsdp2", "zero3") and isinstance(weight, nn.Parameter):
            size = 0 if self.offloads_weights else self._shard(size)
        return rounded(size * self._width(weight, rounded_copy), block)

    def share(self, size: int) -> int:
        """Bytes on one process of what the optimizer's step needs."""
        if self.offloads_optimizer:
            return 0
        return size if self.name in ("single", "ddp") else self._shard(size)

    def gradient_dtype(self, *, by_branch: bool) -> torch.dtype | None:
        """The dtype of the shards that the backward pass leaves; `None` where they are in a buffer that stays, or on
        the CPU. `by_branch`: with the safeguard in parameter space, which reads the gradients of two branches."""
        if not by_branch and (self.name == "zero3" or self.offloads_optimizer):
            return None
        return torch.float32 if self._is_exact(by_branch) else torch.bfloat16

    def trained_state(self, trained: int, states: int, *, by_branch: bool) -> dict[str, int]:
        """Bytes of what stays for `trained` weights whose optimizer has `states` bytes, by name."""
        width = 4 if self._is_exact(by_branch) else 2
        found = {
            "optimizer": self.share(states),
            # DeepSpeed clones the shard that it steps, also where weights are in float32.
            "float32 weights": self.share(4 * trained) if self._is_zero else 0,
            "gradients": 0,
            "DDP's buckets": 4 * trained if self.name == "ddp" else 0,
        }
        if self.name == "zero3":
            # With the optimizer offloaded, the buffer of the gradients is on the CPU too.
            gradients = 0 if self.offloads_optimizer else self._shard(trained) * width
            found |= {"gradients": gradients, "DeepSpeed's bucket": self.bucket * width}
        return {name: size for name, size in found.items() if size}

    def rounded_in_place(self, weights: int) -> int:
        """Bytes of the float32 form, shared by all processes, of `weights` that the engine rounds in place: of those
        that change, and of the gradients at the optimizer's step."""
        return 4 * weights if self._is_zero and self.half else 0

    def gathered(self, denoiser: nn.Module) -> int:
        """Bytes of whole weights that a pass has gathered at once."""
        everything = sum(weight.numel() * self._computed(weight) for weight in denoiser.parameters())
        if self.name == "zero3":
            # The buffer stays until the last weight that was gathered with it is used.
            width = 2 if self.half else 4
            return min(everything, self.live * width) + min(everything, self.prefetch * width)
        if self.name != "fsdp2":
            return 0
        if not self.reshards:
            return everything
        # The block that runs, within the blocks around it, and the next one; what is in no block stays gathered.
        units = self._units_of(denoiser, trained=False)
        return max(chain for chain, _ in units) + max((own for _, own in units[1:]), default=0)

    def left_gathered(self, second: nn.Module) -> int:
        """Bytes of a second denoiser's weights that FSDP2 leaves gathered after a pass without gradients."""
        return self._units_of(second, trained=False)[0][1] if self.name == "fsdp2" else 0

    def reducing(self, denoiser: nn.Module) -> int:
        """Bytes of buffers from which gradients are reduced in the backward pass and which do not stay."""
        if self.name in ("zero1", "zero2"):
            return self.bucket * (2 if self.half else 4) * (2 if self.overlaps else 1)
        if self.name != "fsdp2":
            return 0
        # The gradients of a block, and their copy as it is reduced while those of the next one are computed.
        return 2 * max(own for _, own in self._units_of(denoiser, trained=True))

    def _units_of(self, denoiser: Any, *, trained: bool) -> list[tuple[int, int]]:
        """For each unit of FSDP2, the outermost first, its bytes with those of the units around it, and its own."""
        names = block_names(denoiser) if self.units is None else self.units
        found: list[tuple[int, int]] = []
        open_units = [(denoiser, 0)]
        while open_units:
            unit, above = open_units.pop()
            modules, inner = _without_inner_units(unit, names)
            weights = (weight for module in modules for weight in module.parameters(recurse=False))
            own = sum(
                weight.numel() * self._computed(weight) for weight in weights if weight.requires_grad or not trained
            )
            found.append((above + own, own))
            open_units += [(child, above + own) for child in inner]
        return found

    def _computed(self, weight: torch.Tensor) -> int:
        """Bytes of an element in a pass."""
        return 2 if self.half and weight.is_floating_point() else weight.element_size()

    def _width(self, weight: torch.Tensor, rounded_copy: bool) -> int:
        if not weight.is_floating_point():
            return weight.element_size()
        if self._is_zero:  # the module is cast as a whole
            return 2 if self.half else 4
        return 2 if rounded_copy and self.name == "fsdp2" and self.half else weight.element_size()

    def _is_exact(self, by_branch: bool) -> bool:
        """Whether gradients are kept in float32: DeepSpeed does so where the two branches are compared."""
        return not (self._is_zero and self.half) or (by_branch and self.name != "zero1")

    def _shard(self, size: int) -> int:
        return -(-size // self.processes)


def _without_inner_units(unit: nn.Module, names: Collection[str]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules of a unit, and the units within it."""
    own: list[nn.Module] = []
    inner: list[nn.Module] = []
    open_modules = [unit]
    while open_modules:
        module = open_modules.pop()
        own.append(module)
        for child in module.children():
            (inner if type(child).__name__ in names else open_modules).append(child)
    return own, inner


ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
