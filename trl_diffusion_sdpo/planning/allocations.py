"""Bytes of the tensors that operations allocate and free, counted without data, under PyTorch's fake tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..utils._compat import CPU_ATTENTION, CPU_ATTENTION_BACKWARD

CUDA_BLOCK = 512  # bytes, to which CUDA's caching allocator rounds


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# FLOP formulas by operation. torch has none for the CPU's fused attention. torch's own counting mode is not used,
# because it holds tensors that activation checkpointing would free.
FLOP_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    CPU_ATTENTION: _attention_flops,
    CPU_ATTENTION_BACKWARD: _attention_backward_flops,
}


class Allocations(TorchDispatchMode):
    """Counter of the bytes of live storages, with a peak for each moment of a step.

    Enter it within a `FakeTensorMode`. A storage counts once, even if it has several views. It counts until autograd,
    modules and Python have all released it. Weak references report the release.

    Args:
        block (`int`): Bytes to which an allocation is rounded up.
        hidden (`dict[Any, int]`): Operation -> bytes for each element of its first input that its kernel allocates and
            frees by itself.
    """

    def __init__(self, block: int = 1, hidden: dict[Any, int] | None = None):
        super().__init__()
        self.block, self.hidden = block, hidden or {}
        self.live = 0
        self.peaks: dict[str, int] = {}  # by moment
        self.flops = 0  # of matrix products, convolutions and attention
        self._moment = "start"
        self._storages: dict[int, Any] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        packet = func.overloadpacket
        if packet in FLOP_FORMULAS:
            self.flops += FLOP_FORMULAS[packet](*args, **(kwargs or {}), out_val=result)
        extra = self.hidden.get(packet)
        if extra is not None:
            self._note(self.live + extra * _first_tensor(args).numel())
        return result

    @contextlib.contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """Record peaks under this name within the context."""
        before, self._moment = self._moment, name
        self._note(self.live)
        try:
            yield
        finally:
            self._moment = before

    def ignore(self, tensors: Any) -> None:
        """Leave tensors and their views out of the count from now on. The caller counts them elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) in self._storages:
                self._free(id(storage))
            self._storages[id(storage)] = (weakref.ref(storage), 0)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        size = rounded(storage.nbytes(), self.block)
        self._storages[key] = (weakref.ref(storage, lambda _: self._free(key)), size)
        self.live += size
        self._note(self.live)

    def _free(self, key: int) -> None:
        self.live -= self._storages.pop(key)[1]

    def _note(self, size: int) -> None:
        self.peaks[self._moment] = max(self.peaks.get(self._moment, 0), size)


def rounded(size: int, block: int) -> int:
    """Return the bytes that an allocator reserves for `size` bytes."""
    return -(-size // block) * block


def _first_tensor(args: Any) -> torch.Tensor:
    return next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
