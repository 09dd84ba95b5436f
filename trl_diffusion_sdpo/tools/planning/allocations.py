"""Counts the bytes of fake tensors that operations allocate and free. These are on the CPU, so it imitates how a GPU
rounds sizes of allocations and how autocast chooses dtypes there."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from ...utils._compat import TorchDispatchMode, autocast_rules, tree_leaves

CUDA_BLOCK = 512  # PyTorch's caching allocator for CUDA rounds up to multiples of this many bytes


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensor storages in use, and records the peak in each phase of a step.

    Enter it within a `FakeTensorMode`. A storage counts once, however many views it has, until autograd, modules and
    Python have all released it.

    Args:
        block (`int`): Sizes are rounded up to a multiple of this many bytes.
    """

    def __init__(self, block: int = 1):
        super().__init__()
        self.block = block
        self.live = 0
        self.peaks: dict[str, int] = {}  # phase -> peak of the bytes in use
        self._phase = "start"
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak of the bytes in use within the context as that of the phase `name`."""
        before = self._phase
        self._phase = name
        self._note(self.live)
        try:
            yield
        finally:
            self._phase = before

    def ignore(self, tensors: Any) -> None:
        """Stop counting tensors and their views. The caller adds their bytes itself."""
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
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), size)


def rounded(size: int, block: int) -> int:
    """Return the bytes that an allocator reserves for `size` bytes: rounded up to a multiple of `block`."""
    return -(-size // block) * block


# ---- The planned device ----------------------------------------------------------------------------------------------

# Operations in float32 under autocast on CUDA, but not on the CPU; only those in denoisers.
# Source: https://docs.pytorch.org/docs/stable/amp.html
_FLOAT32 = (
    "layer_norm",
    "native_layer_norm",
    "group_norm",
    "rms_norm",
    "cosine_similarity",
    "linalg_vector_norm",
    "exp",
    "log",
    "rsqrt",
    "reciprocal",
    "softplus",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
)
_FLOAT32_RESULT = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "cumprod")


def block_size(device: str) -> int:
    """Return `block` for [`Allocations`] on a `"cuda"` or `"cpu"` device."""
    return CUDA_BLOCK if device == "cuda" else 1


def autocast_like(device: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which autocast on the CPU chooses dtypes as on a `"cuda"` or `"cpu"` device."""
    return autocast_rules(_CUDA_RULES) if device == "cuda" else contextlib.nullcontext()


def _in_float32(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return operation(*(_float32(value) for value in args), **{name: _float32(value) for name, value in kwargs.items()})


def _to_float32(operation: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if dtype is None and args[0].is_floating_point():
        dtype = torch.float32
    return operation(*args, dtype=dtype, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


_CUDA_RULES = dict.fromkeys(_FLOAT32, _in_float32) | dict.fromkeys(_FLOAT32_RESULT, _to_float32)
