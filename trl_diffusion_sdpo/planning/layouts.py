"""What an engine divides over processes, and the buffers that it adds."""

from __future__ import annotations

from dataclasses import dataclass

# Elements that DeepSpeed gathers or reduces at once, as its defaults, which the packaged configurations leave.
# Source: https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training
_BUCKET = 500_000_000
_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Layout:
    """How `processes` share a model.

    Attributes:
        name (`str`): `"single"`, `"ddp"`, `"fsdp2"`, `"zero1"`, `"zero2"` or `"zero3"`.
        half (`bool`): Whether the engine computes in half precision.
        units (`int`): Blocks that are gathered one at a time.
        offloads_optimizer (`bool`): Whether the optimizer is on the CPU.
    """

    name: str = "single"
    processes: int = 1
    half: bool = False
    units: int = 1
    offloads_optimizer: bool = False

    @property
    def shards_weights(self) -> bool:
        return self.name in ("fsdp2", "zero3")

    @property
    def keeps_gradients(self) -> bool:
        """Whether every process holds whole gradients until the optimizer steps."""
        return self.name in ("single", "ddp", "zero1")

    @property
    def rounds(self) -> bool:
        """Whether passes compute with weights in half precision."""
        return self.half and self.name not in ("single", "ddp")

    @property
    def _rounds(self) -> bool:
        """DeepSpeed holds half precision weights, and float32 ones in the optimizer."""
        return self.name.startswith("zero") and self.half

    def share_weights(self, size: int) -> int:
        """Bytes of a network's weights on one process."""
        return size // self.processes if self.shards_weights else size

    def share(self, size: int) -> int:
        """Bytes of what the optimizer's step needs on one process."""
        return size if self.name in ("single", "ddp") else size // self.processes

    def trained_state(self, trained: int, states: int, block: int) -> dict[str, int]:
        """Optimizer, float32 weights beside rounded ones, and gradients that stay as shards; by name."""
        found = {"optimizer": 0 if self.offloads_optimizer else self.share(states)}
        if self._rounds and not self.offloads_optimizer:
            found["float32 weights"] = 4 * trained // self.processes
        if not self.keeps_gradients:
            found["gradients"] = (2 if self._rounds else 4) * trained // self.processes
        if self.name == "ddp":
            found["DDP's buckets"] = 4 * trained
        return {name: size for name, size in found.items() if size}

    def gathered(self, weights: int) -> int:
        """Bytes of whole weights that a pass has gathered, of `weights` bytes in all."""
        if self.name == "fsdp2":
            return 2 * weights // max(self.units, 1) // (2 if self.half else 1)  # the block that runs, and the next
        if self.name == "zero3":
            return min(weights, _LIVE * (2 if self.half else 4))
        return 0

    def buckets(self, trained: int) -> int:
        """Bytes of gradients that are reduced at once."""
        if not self.name.startswith("zero"):
            return 0
        return 2 * min(_BUCKET, trained) * (2 if self.half else 4)  # overlapped: one fills, one is reduced


ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
