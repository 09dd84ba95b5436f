"""Tensors that each distributed engine shards over its processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...utils._compat import block_names
from ...utils.errors import UserError
from ...utils.hints import did_you_mean

# Our configuration of accelerate -> the kinds of tensors that its engine shards.
DIVIDED: dict[str, tuple[str, ...]] = {
    "single_gpu": (),
    "multi_gpu": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights"),
}
ZERO_BUCKET = 500_000_000  # gradient elements that DeepSpeed reduces at once by default


@dataclass(frozen=True)
class PlannedEngine:
    """Distributed engine of a planned run, and its processes."""

    name: str = "single_gpu"
    processes: int = 1

    def share(self, kind: str, size: int) -> int:
        """Return how many of `size` bytes one process holds. `kind` is `"weights"`, `"gradients"` or `"optimizer"`
        (its states)."""
        return -(-size // self.processes) if self.divides(kind) else size

    def divides(self, kind: str) -> bool:
        """Return whether the engine shards a kind of tensors, such as `"gradients"`."""
        return kind in DIVIDED[self.name]

    @property
    def rounds_weights(self) -> bool:
        """Whether the engine itself keeps half precision weights for the forward pass, where otherwise autocast casts
        them."""
        return self.name not in ("single_gpu", "multi_gpu")

    @property
    def is_zero(self) -> bool:
        return self.name.startswith("zero")


def planned_engine(config: str | None, processes: int | str | None) -> PlannedEngine:
    """Return the engine of a configuration of accelerate.

    Args:
        config (`str`, *optional*): Name of one of our configurations of accelerate, such as `"zero2"`.
        processes (`int` or `str`, *optional*): Number of processes. If `config` is `None` too, the plan is for one.

    Raises:
        ValueError: If we have no configuration `config`, or `processes` is missing.
    """
    name = config or ("single_gpu" if processes is None else "multi_gpu")
    if name not in DIVIDED:
        raise UserError(
            f"A plan needs an `--accelerate_config` of this package: {', '.join(DIVIDED)}. Got {config!r}. Use the "
            f"packaged configuration with the same sharding as yours.{did_you_mean(name, DIVIDED)}"
        )
    if name == "single_gpu":
        return PlannedEngine()
    if not str(processes).isdigit() or int(str(processes)) < 1:
        raise UserError(
            f"A plan with `--accelerate_config {config}` needs the number of processes, got {processes}. Pass "
            "`--num_processes`."
        )
    return PlannedEngine(name, int(str(processes)))


def largest_block(denoiser: nn.Module, element: int | None) -> tuple[int, int]:
    """Return the bytes of the denoiser's largest block, and of all weights outside of blocks.

    Args:
        element (`int`, *optional*): Bytes per weight in a forward pass, by default of the weight's dtype.
    """

    def size(weights: Any) -> int:
        return sum(weight.numel() * (element or weight.element_size()) for weight in weights)

    names = block_names(denoiser)
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    inside = {weight for block in blocks for weight in block.parameters()}
    outside = size(weight for weight in denoiser.parameters() if weight not in inside)
    return max((size(block.parameters()) for block in blocks), default=0), outside
