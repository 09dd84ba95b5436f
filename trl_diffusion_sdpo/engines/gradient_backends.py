"""Gradient back ends: each engine's way to accumulate gradients of several backward passes separately.

A back end also averages gradients and steps with one of them. If the engine shards gradients, accumulators are shards.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from ..utils._compat import keeps_zero_gradients, zero_gradients, zero_weights
from .gradients import Gradient, add
from .sharding import local_tensor

REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_HPU")
REDUCE_BUCKET = 1 << 25  # elements per all-reduce


class GradientBackend(ABC):
    """Interface to compute, average and step with gradients under one engine.

    A gradient is a list with a tensor for each trained weight (or shard), always in the same order. Weights that are
    not in the graph have `None`.
    """

    retains_graph = True  # whether two backward passes may follow one forward pass

    @abstractmethod
    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        """Backpropagate a scalar and return its gradient added to `into`.

        Args:
            objective (`torch.Tensor` of shape `()`): Scalar, already divided by the accumulation steps.
            into (`list`, *optional*): Gradient of earlier micro-batches. It may be changed in place.
            retain_graph (`bool`): Whether another backward pass follows.
        """

    @abstractmethod
    def set_gradient(self, gradient: Gradient) -> None:
        """Set the gradient that is clipped and used by the optimizer's step."""

    def all_reduced(self, gradient: Gradient) -> Gradient:
        """Return the gradient averaged over the processes. If `backward` averages, return it unchanged."""
        return gradient

    def sum_over_shards(self, products: torch.Tensor) -> torch.Tensor:
        """Return inner products over all shards, from those over this process's shards. May change them in place."""
        return products

    def step(self) -> None:
        """Take the optimizer's step if the engine owns it."""
        return None

    def accumulating(self) -> contextlib.AbstractContextManager:
        """Return the context of the forward and backward passes of each micro-batch."""
        return contextlib.nullcontext()

    @abstractmethod
    def weights(self) -> list[torch.Tensor]:
        """Return the float32 weights, or shards, in a gradient's order."""

    @property
    def loss_scale(self) -> float:
        """Factor of gradients that prevents underflow in fp16 training."""
        return 1.0


class ReplicatedBackend(GradientBackend):
    """Back end for one process or DDP. Every process holds full gradients and averages them once per optimizer step."""

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self._model: Any = model
        self._accelerator = accelerator
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]

    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        # Autograd accumulates in place.
        for weight, gradient in zip(self._weights, into or [None] * len(self._weights), strict=True):
            weight.grad = gradient
        scaler = self._accelerator.scaler
        scaled = objective if scaler is None else scaler.scale(objective)
        scaled.backward(retain_graph=retain_graph)
        return [self._take(weight) for weight in self._weights]

    @staticmethod
    def _take(weight: nn.Parameter) -> torch.Tensor | None:
        gradient, weight.grad = weight.grad, None
        return gradient

    def all_reduced(self, gradient: Gradient) -> Gradient:
        if self._accelerator.num_processes == 1:
            return gradient
        # A weight may have a gradient in some processes only, but the all-reduce must have the same size in all.
        pairs = zip(gradient, self._weights, strict=True)
        full = [torch.zeros_like(weight) if tensor is None else tensor for tensor, weight in pairs]
        all_reduce_mean(full)
        return [*full]

    def set_gradient(self, gradient: Gradient) -> None:
        for weight, tensor in zip(self._weights, gradient, strict=True):
            weight.grad = tensor

    def accumulating(self) -> contextlib.AbstractContextManager:
        # DDP's reducer runs once per forward pass, so the second backward pass would never be all-reduced.
        return self._accelerator.no_sync(self._model)

    def weights(self) -> list[torch.Tensor]:
        return [weight.detach() for weight in self._weights]

    @property
    def loss_scale(self) -> float:
        return 1.0 if self._accelerator.scaler is None else self._accelerator.scaler.get_scale()


class Fsdp2Backend(ReplicatedBackend):
    """Back end for FSDP2. The backward pass reduce-scatters gradients."""

    def accumulating(self) -> contextlib.AbstractContextManager:
        # Otherwise FSDP2 adds up the branches' gradients outside of `.grad`, unsharded, until the last micro-batch.
        cast(Any, self._model).set_requires_gradient_sync(True)
        return contextlib.nullcontext()

    def all_reduced(self, gradient: Gradient) -> Gradient:
        return gradient

    def sum_over_shards(self, products: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(products)

    def weights(self) -> list[torch.Tensor]:
        return [local_tensor(weight.detach()) for weight in self._weights]


class ZeroBackend(GradientBackend):
    """Back end for DeepSpeed. The backward pass reduce-scatters gradients into the engine's optimizer."""

    def __init__(self, engine: Any):
        self._engine = engine

    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        # Otherwise the engine adds up the branches' unsharded gradients until the last micro-batch, and it counts each
        # backward pass as a micro-batch.
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(objective, retain_graph=retain_graph, scale_wrt_gas=False)
        gradient = self.take(into)
        self.clear()
        return gradient

    def clear(self) -> None:
        """Drop the engine's gradients, so that the next branch starts from zero."""
        self._engine.optimizer.zero_grad()

    @abstractmethod
    def take(self, into: Gradient | None) -> Gradient:
        """Take the gradient shards of the latest backward pass from the engine, added to `into` if it is set."""

    def sum_over_shards(self, products: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(products)

    def step(self) -> None:
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()

    @property
    def loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale)


class Zero12Backend(ZeroBackend):
    """Back end for ZeRO-1 and ZeRO-2. Gradients are flat shards of parameter groups in `averaged_gradients`."""

    def __init__(self, engine: Any):
        super().__init__(engine)
        self._groups: dict[int, list[torch.Tensor]] = {}  # DeepSpeed's lists of the latest backward pass
        self._sizes: dict[int, list[int]] = {}

    def take(self, into: Gradient | None) -> Gradient:
        averaged = zero_gradients(self._engine.optimizer)
        for group in sorted(averaged):
            shards = averaged[group]
            assert shards is not None
            self._groups[group], averaged[group] = shards, None
            self._sizes[group] = [shard.numel() for shard in shards]
        taken = [shard for shards in self._groups.values() for shard in shards]
        return [*taken] if into is None else add(into, taken)

    def set_gradient(self, gradient: Gradient) -> None:
        # Fill DeepSpeed's tensors and do not replace them, because they may be views of a flat tensor. They contain the
        # gradient of the latest pass, the loser's. It is no longer needed.
        tensors: Iterator[Any] = iter(gradient)
        for group, shards in self._groups.items():
            for shard in shards:
                shard.copy_(next(tensors))
            zero_gradients(self._engine.optimizer)[group] = shards
        self._groups = {}

    def weights(self) -> list[torch.Tensor]:
        shards: list[torch.Tensor] = []
        for group, flat in enumerate(zero_weights(self._engine.optimizer)):
            sizes = self._sizes[group]
            shards += flat.detach()[: sum(sizes)].split(sizes)
        return shards


class Zero3Backend(ZeroBackend):
    """Back end for ZeRO-3. Gradients are a shard of each parameter."""

    retains_graph = False  # ZeRO-3 gathers weights for only one backward pass per forward pass

    def __init__(self, engine: Any):
        super().__init__(engine)
        self._weights = [weight for weight in engine.module.parameters() if weight.requires_grad]

    def take(self, into: Gradient | None) -> Gradient:
        from deepspeed.utils import safe_get_local_grad

        if into is None:
            return [safe_get_local_grad(weight).clone() for weight in self._weights]
        return add(into, (safe_get_local_grad(weight) for weight in self._weights))

    def set_gradient(self, gradient: Gradient) -> None:
        from deepspeed.utils import safe_set_local_grad

        for weight, shard in zip(self._weights, gradient, strict=True):
            safe_set_local_grad(weight, shard)

    def weights(self) -> list[torch.Tensor]:
        from deepspeed.utils import safe_get_local_fp32_param

        return [safe_get_local_fp32_param(weight) for weight in self._weights]


def gradient_backend(model: nn.Module, accelerator: Accelerator) -> GradientBackend:
    """Return the back end of the engine that trains. See [`Engine.gradient_backend`]."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_backend(model)
    if accelerator.is_fsdp2:
        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            raise ValueError(
                "`safeguard='parameter'` needs gradients on the device. FSDP's `offload_params` moves each gradient to "
                "the CPU during the backward pass. Leave it off, or use `safeguard='output'`."
            )
        return Fsdp2Backend(model, accelerator)
    if accelerator.distributed_type.value not in REPLICATED:
        raise ValueError(
            "`safeguard='parameter'` needs one device, DDP, FSDP2 or DeepSpeed ZeRO-1, 2 or 3. Got "
            f"{accelerator.distributed_type.value}. Use one of these, or `safeguard='output'`."
        )
    return ReplicatedBackend(model, accelerator)


def _deepspeed_backend(engine: Any) -> GradientBackend:
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2, 3):
        raise ValueError(
            f"`safeguard='parameter'` needs DeepSpeed's ZeRO stage 1, 2 or 3. Got {stage}. Set `zero_stage` to 1, or "
            "train without DeepSpeed in the same memory."
        )
    if engine.zero_use_cpu_optimizer():
        raise ValueError(
            "`safeguard='parameter'` needs gradients on the device. With an offloaded optimizer, DeepSpeed moves each "
            "gradient away during the backward pass, before the branches can be separated. Set "
            "`offload_optimizer_device: none`, or use `safeguard='output'`."
        )
    if stage == 3:
        return Zero3Backend(engine)
    if not keeps_zero_gradients(engine.optimizer):
        raise ValueError(
            "`safeguard='parameter'` needs DeepSpeed's usual ZeRO optimizer. ZeRO-1 with bf16 and "
            f"`data_types.grad_accum_dtype: fp32` uses {type(engine.optimizer).__name__}. Leave that setting out, or "
            "use ZeRO-2."
        )
    if "Muon" in type(engine.optimizer.optimizer).__name__:
        raise ValueError(
            "`safeguard='parameter'` needs an optimizer that steps after both branches. Under ZeRO-1 and ZeRO-2, "
            "DeepSpeed applies Muon to each branch's gradient while it averages the gradient. Use ZeRO-3, another "
            "optimizer, or `safeguard='output'`."
        )
    return Zero12Backend(engine)


def all_reduce_mean(tensors: list[torch.Tensor]) -> None:
    """Average tensors over all processes, in place, in buckets."""
    world = dist.get_world_size()
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in [*tensors, None]:
        if bucket and (tensor is None or size + tensor.numel() > REDUCE_BUCKET):
            flat = torch.cat([each.flatten() for each in bucket]).div_(world)
            dist.all_reduce(flat)
            for each, mean in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                each.copy_(mean.view_as(each))
            bucket, size = [], 0
        if tensor is not None:
            bucket.append(tensor)
            size += tensor.numel()


def sum_over_processes(products: torch.Tensor) -> torch.Tensor:
    """Return the sum of a small tensor over all processes, in place."""
    dist.all_reduce(products)
    return products


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer without the wrappers of accelerate and DeepSpeed. All wrappers call it `optimizer`."""
    while not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
