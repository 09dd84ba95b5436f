"""Tensors that each engine shards over its processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..utils._compat import block_names
from ..utils.hints import did_you_mean

# Engine -> what it shards: weights, gradients, and the optimizer's states.
DIVIDED: dict[str, tuple[str, ...]] = {
    "single": (),
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights"),
}
# The packaged configurations of accelerate.
CONFIGS = {"single_gpu": "single", "multi_gpu": "ddp", **{name: name for name in ("zero1", "zero2", "zero3", "fsdp2")}}
ZERO_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once by default


@dataclass(frozen=True)
class Engine:
    """An engine and its number of processes."""

    name: str = "single"
    processes: int = 1

    def share(self, kind: str, size: int) -> int:
        """Return the bytes on one process of `"weights"`, `"gradients"` or states of the `"optimizer"`."""
        return -(-size // self.processes) if kind in DIVIDED[self.name] else size

    @property
    def divides_weights(self) -> bool:
        return "weights" in DIVIDED[self.name]

    @property
    def divides_gradients(self) -> bool:
        return "gradients" in DIVIDED[self.name]

    @property
    def rounds_weights(self) -> bool:
        """Whether the passes read weights in half precision, instead of copies that autocast makes."""
        return self.name not in ("single", "ddp")

    @property
    def is_zero(self) -> bool:
        return self.name.startswith("zero")


def engine_of(config: str | None, processes: int | str | None) -> Engine:
    """Return the engine of a packaged configuration of accelerate.

    Args:
        config (`str`, *optional*): Its name.
        processes (`int` or `str`, *optional*): Number of processes; one without a configuration.

    Raises:
        ValueError: If the name is unknown, or the number of processes is missing.
    """
    if config is None and processes is None:
        return Engine()
    name = CONFIGS.get(config or "multi_gpu")
    if name is None:
        near = did_you_mean(str(config), CONFIGS)
        raise ValueError(
            f"A plan needs a packaged `--accelerate_config`: {', '.join(CONFIGS)}; got {config!r}. Use the one that "
            f"shards the same.{near}"
        )
    if name == "single":
        return Engine()
    if not str(processes).isdigit() or int(str(processes)) < 1:
        raise ValueError(
            f"A plan with `--accelerate_config {config}` needs the number of processes, got {processes}. Pass "
            "`--num_processes`."
        )
    return Engine(name, int(str(processes)))


def largest_block(denoiser: nn.Module, element: int | None) -> tuple[int, int]:
    """Return the bytes of the largest block, and of the weights outside of blocks.

    Args:
        element (`int`, *optional*): Bytes of a weight in a pass; `None` for those of its dtype.
    """

    def size(weights: Any) -> int:
        return sum(weight.numel() * (element or weight.element_size()) for weight in weights)

    names = block_names(denoiser)
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    inside = {weight for block in blocks for weight in block.parameters()}
    outside = size(weight for weight in denoiser.parameters() if weight not in inside)
    return max((size(block.parameters()) for block in blocks), default=0), outside
