"""Counts the bytes of fake tensors that operations allocate and free. Fake tensors are on the CPU, so the differences
of a planned GPU are added here."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..utils._compat import CPU_ATTENTION, CPU_ATTENTION_BACKWARD, autocast_rules

CUDA_BLOCK = 512  # bytes, to which CUDA's caching allocator rounds
CUDA_FUSED_ATTENTION_GRADIENT = 4  # bytes an element: FlashAttention 2 sums the gradient of the queries in float32


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
        self.flops = 0  # operations of matrix products, convolutions and attention
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


# ---- The planned device ----------------------------------------------------------------------------------------------

# Operations of denoisers that run in float32 under CUDA's autocast, but not under the CPU's.
# Source: https://docs.pytorch.org/docs/stable/amp.html
_FLOAT32 = (
    *("layer_norm", "native_layer_norm", "group_norm", "rms_norm", "cosine_similarity", "linalg_vector_norm"),
    *("exp", "log", "rsqrt", "reciprocal", "softplus", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
)
_FLOAT32_RESULT = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "cumprod")


@dataclass(frozen=True)
class FakeDevice:
    """Properties of a device that a plan needs."""

    type: str  # "cuda" or "cpu"
    block: int  # see `Allocations`
    hidden: dict[Any, int] = field(default_factory=dict)  # see `Allocations`

    def autocast_rules(self) -> contextlib.AbstractContextManager[None]:
        """Make autocast round as on this device within the context."""
        return autocast_rules(_CUDA_RULES) if self.type == "cuda" else contextlib.nullcontext()


def fake_device(kind: str) -> FakeDevice:
    """Return the properties of a device, `"cuda"` or `"cpu"`."""
    if kind == "cpu":
        return FakeDevice("cpu", 1)
    # The CPU's fused attention stands for the GPU's. Both save the result and one float32 number for each query.
    return FakeDevice("cuda", CUDA_BLOCK, {CPU_ATTENTION_BACKWARD: CUDA_FUSED_ATTENTION_GRADIENT})


def _in_float32(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return operation(*(_float32(value) for value in args), **{name: _float32(value) for name, value in kwargs.items()})


def _to_float32(operation: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if dtype is None and args[0].is_floating_point():
        dtype = torch.float32
    return operation(*args, dtype=dtype, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


_CUDA_RULES = dict.fromkeys(_FLOAT32, _in_float32) | dict.fromkeys(_FLOAT32_RESULT, _to_float32)
