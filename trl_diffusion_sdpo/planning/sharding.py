"""What an engine divides over its processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..utils._compat import block_names

# What each engine divides: weights, gradients, and the optimizer's states.
DIVIDED: dict[str, tuple[str, ...]] = {
    "single": (),
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights"),
}
ZERO_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once, if its configuration does not say otherwise


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


def engine_of(settings: dict[str, Any], processes: int | str | None) -> Engine:
    """Return the engine of a configuration of accelerate.

    Args:
        settings (`dict[str, Any]`): Accelerate's file, with `distributed_type` and ZeRO's stage; empty for one device.
        processes (`int` or `str`, *optional*): Their number, instead of the file's.

    Raises:
        ValueError: If the number of processes is unknown.
    """
    kind = str(settings.get("distributed_type", "NO"))
    deepspeed = settings.get("deepspeed_config") or {}
    names = {"NO": "single", "FSDP": "fsdp2", "DEEPSPEED": f"zero{deepspeed.get('zero_stage', 2)}"}
    name = names.get(kind, "ddp")
    given = settings.get("num_processes") if processes is None else processes
    count = int(given) if str(given).isdigit() else 1 if given is None and name == "single" else 0
    if name not in DIVIDED or count < 1:
        raise ValueError(
            f"A plan of several processes needs an engine ({', '.join(DIVIDED)}) and the number of processes, got "
            f"{name} and {given}. Pass `--num_processes`."
        )
    if name == "single" and count > 1:
        name = "ddp"
    return Engine(name, count)


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
