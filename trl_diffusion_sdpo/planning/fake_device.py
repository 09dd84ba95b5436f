"""Differences between the planned device and the CPU in what operations allocate. Fake tensors are on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..utils._compat import CPU_ATTENTION_BACKWARD, autocast_rules
from .allocations import CUDA_BLOCK

CUDA_FUSED_ATTENTION_GRADIENT = 4  # bytes an element: FlashAttention 2 sums the gradient of the queries in float32

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
    """Properties of a device that a plan needs.

    Attributes:
        type (`str`): `"cuda"` or `"cpu"`.
        block (`int`): Bytes to which an allocation is rounded up.
        hidden (`dict[Any, int]`): See [`~trl_diffusion_sdpo.planning.allocations.Allocations`].
    """

    type: str
    block: int
    hidden: dict[Any, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make autocast round as on this device within the context."""
        with autocast_rules(_CUDA_RULES) if self.type == "cuda" else contextlib.nullcontext():
            yield


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
