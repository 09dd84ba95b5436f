"""Gradient back ends, one for each engine: compute the gradients of winners and losers separately, average them over
processes, and set the one with which the optimizer steps. (`gradients.py` does arithmetic on them.)

Gradients are averaged over processes, never summed. With one process or DDP, `backward` returns the process's own, and
`all_reduced` averages those of all processes once per optimizer step. With FSDP2 and DeepSpeed, `backward` already
returns averaged gradients, as this process's shards.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from ..utils._compat import keeps_zero_gradients, zero_gradients
from ..utils.errors import UserError
from .gradients import Gradient, add

REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_HPU")
REDUCE_BUCKET = 1 << 25  # elements in one all-reduce


class GradientBackend(ABC):
    """Computes gradients for the parameter-space safeguard under one engine, averages them over processes, and passes
    the combined one to the optimizer.

    A gradient is a list with one tensor for each trained weight (or this process's shard of it), always in the same
    order, or `None` where the objective does not depend on the weight.
    """

    retains_graph = True  # whether the engine allows two backward passes after one forward pass
    splits_rows = False  # whether [`ReplicatedBackend.backward_at`] works, for gradients of parts of a batch

    @abstractmethod
    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        """Run the backward pass of the scalar `objective`, and return its gradient added to `into`. Under FSDP2 and
        DeepSpeed, it is already averaged over processes.

        Args:
            objective (`torch.Tensor` of shape `()`): Already divided by the number of micro-batches in the optimizer
                step.
            into (`list`, *optional*): Accumulated gradient of earlier micro-batches, which may be changed in place.
            retain_graph (`bool`): Whether another backward pass through the same graph follows.
        """

    @abstractmethod
    def set_gradient(self, gradient: Gradient) -> None:
        """Set the gradient that the Trainer or the engine clips, and with which the optimizer then steps."""

    def all_reduced(self, gradient: Gradient) -> Gradient:
        """Return the gradient averaged over the processes. Under FSDP2 and DeepSpeed, `backward` has already averaged
        it, and it is returned unchanged."""
        return gradient

    def sum_over_shards(self, products: torch.Tensor) -> torch.Tensor:
        """Return the inner products of whole gradients from those of this process's shards, `products`, which may be
        changed in place. Without sharding, they are returned unchanged."""
        return products

    def step(self) -> None:
        """Step the optimizer where the engine does (DeepSpeed). Elsewhere, do nothing: the Trainer steps it."""
        return None

    def accumulating(self) -> contextlib.AbstractContextManager:
        """Return the context in which to run the forward and backward passes of each micro-batch."""
        return contextlib.nullcontext()


class ReplicatedBackend(GradientBackend):
    """Back end for one process or DDP. Every process accumulates full gradients of its own pairs, which are averaged
    once per optimizer step, in `all_reduced`."""

    splits_rows = True

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self._model: Any = model
        self._accelerator = accelerator
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]

    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        return self.backward_at(self.weights, objective, into, retain_graph=retain_graph)

    def backward_at(
        self,
        leaves: Sequence[torch.Tensor],
        objective: torch.Tensor,
        into: Gradient | None,
        *,
        retain_graph: bool = False,
    ) -> Gradient:
        """Do what [`GradientBackend.backward`] does, with the gradient at any tensors that have no autograd graph."""
        # Autograd adds the new gradient to `.grad` in place.
        for leaf, gradient in zip(leaves, into or [None] * len(leaves), strict=True):
            leaf.grad = gradient
        scaler = self._accelerator.scaler
        scaled = objective if scaler is None else scaler.scale(objective)
        scaled.backward(retain_graph=retain_graph)
        return [self._take(leaf) for leaf in leaves]

    @staticmethod
    def _take(weight: torch.Tensor) -> torch.Tensor | None:
        gradient = weight.grad
        weight.grad = None
        return gradient

    def all_reduced(self, gradient: Gradient) -> Gradient:
        if self._accelerator.num_processes == 1:
            return gradient
        # Some processes may lack a weight's gradient, but all must all-reduce equally many elements.
        pairs = zip(gradient, self.weights, strict=True)
        full = [torch.zeros_like(weight) if tensor is None else tensor for tensor, weight in pairs]
        all_reduce_mean(full)
        return [*full]

    def set_gradient(self, gradient: Gradient) -> None:
        for weight, tensor in zip(self.weights, gradient, strict=True):
            weight.grad = tensor

    def accumulating(self) -> contextlib.AbstractContextManager:
        # DDP averages once per forward pass, and would leave out the gradient of the second backward pass.
        return self._accelerator.no_sync(self._model)


class Fsdp2Backend(ReplicatedBackend):
    """Back end for FSDP2. The backward pass itself averages gradients and leaves each process its shard."""

    splits_rows = False

    def accumulating(self) -> contextlib.AbstractContextManager:
        # Otherwise FSDP2 would add up the gradients of winners and losers, unsharded, until the last micro-batch.
        cast(Any, self._model).set_requires_gradient_sync(True)
        return contextlib.nullcontext()

    def all_reduced(self, gradient: Gradient) -> Gradient:
        return gradient

    def sum_over_shards(self, products: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(products)


class ZeroBackend(GradientBackend):
    """Back end for DeepSpeed. The backward pass itself averages gradients and puts this process's shards into
    DeepSpeed's optimizer."""

    def __init__(self, engine: Any):
        self._engine = engine

    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        # Otherwise DeepSpeed would add up the gradients of winners and losers until the last micro-batch, and count
        # each backward pass as one.
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(objective, retain_graph=retain_graph, scale_wrt_gas=False)
        gradient = self.take(into)
        self._engine.optimizer.zero_grad()  # the next backward pass must start from zero
        return gradient

    @abstractmethod
    def take(self, into: Gradient | None) -> Gradient:
        """Return this process's gradient shards of the latest backward pass, from DeepSpeed's optimizer, added to
        `into` if set."""

    def sum_over_shards(self, products: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(products)

    def step(self) -> None:
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()


class Zero12Backend(ZeroBackend):
    """Back end for ZeRO-1 and ZeRO-2, where the gradients are flat shards, one list per parameter group, in the
    optimizer's attribute `averaged_gradients`."""

    def __init__(self, engine: Any):
        super().__init__(engine)
        # DeepSpeed's gradient shards of the latest backward pass, by parameter group.
        self._groups: dict[int, list[torch.Tensor]] = {}

    def take(self, into: Gradient | None) -> Gradient:
        averaged = zero_gradients(self._engine.optimizer)
        for group in sorted(averaged):
            shards = averaged[group]
            assert shards is not None
            self._groups[group] = shards
            averaged[group] = None
        taken = [shard for shards in self._groups.values() for shard in shards]
        return [*taken] if into is None else add(into, taken)

    def set_gradient(self, gradient: Gradient) -> None:
        # Copy into DeepSpeed's tensors, which may be views of a flat tensor. They still hold the losers' gradient of
        # the latest pass, which is no longer needed.
        tensors: Iterator[Any] = iter(gradient)
        for group, shards in self._groups.items():
            for shard in shards:
                shard.copy_(next(tensors))
            zero_gradients(self._engine.optimizer)[group] = shards
        self._groups = {}


class Zero3Backend(ZeroBackend):
    """Back end for ZeRO-3. A gradient has this process's shard for each parameter."""

    retains_graph = False  # ZeRO-3 allows only one backward pass per forward pass

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


def gradient_backend(model: nn.Module, accelerator: Accelerator) -> GradientBackend:
    """Return the gradient back end for the engine that trains `model`. For the errors, see
    [`Engine.gradient_backend`]."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_backend(model)
    if accelerator.is_fsdp2:
        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            raise UserError(
                "`safeguard='parameter'` needs gradients on the device. FSDP's `offload_params` moves each gradient "
                "to the CPU during the backward pass. Leave `offload_params` off, or use `safeguard='output'`."
            )
        return Fsdp2Backend(model, accelerator)
    if accelerator.distributed_type.value not in REPLICATED:
        raise UserError(
            "`safeguard='parameter'` needs one device, DDP, FSDP2 or DeepSpeed ZeRO-1, 2 or 3. Got "
            f"{accelerator.distributed_type.value}. Train in one of these ways, or use `safeguard='output'`."
        )
    return ReplicatedBackend(model, accelerator)


def _deepspeed_backend(engine: Any) -> GradientBackend:
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2, 3):
        raise UserError(
            f"`safeguard='parameter'` needs DeepSpeed's ZeRO stage 1, 2 or 3. Got stage {stage}. Set `zero_stage` to "
            "1, or train without DeepSpeed: stage 0 saves no memory."
        )
    if engine.zero_use_cpu_optimizer():
        raise UserError(
            "`safeguard='parameter'` needs gradients on the device. With an offloaded optimizer, DeepSpeed moves "
            "gradients to the CPU during the backward pass, before the winners' and losers' gradients can be read. Set "
            "`offload_optimizer_device: none`, or use `safeguard='output'`."
        )
    if stage == 3:
        return Zero3Backend(engine)
    if not keeps_zero_gradients(engine.optimizer):
        raise UserError(
            "`safeguard='parameter'` needs DeepSpeed's usual ZeRO optimizer. ZeRO-1 with bf16 and "
            f"`data_types.grad_accum_dtype: fp32` uses {type(engine.optimizer).__name__}. Leave `grad_accum_dtype` "
            "out, or use ZeRO-2."
        )
    if "Muon" in type(engine.optimizer.optimizer).__name__:
        raise UserError(
            "`safeguard='parameter'` needs an optimizer that acts after both backward passes. Under ZeRO-1 and "
            "ZeRO-2, DeepSpeed applies Muon to the winners' and the losers' gradient separately, in each backward "
            "pass. Use ZeRO-3, another optimizer, or `safeguard='output'`."
        )
    return Zero12Backend(engine)


def all_reduce_mean(tensors: list[torch.Tensor]) -> None:
    """Average tensors over all processes, in place, with up to `REDUCE_BUCKET` elements in an all-reduce."""
    world = dist.get_world_size()
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in [*tensors, None]:
        if bucket and (tensor is None or size + tensor.numel() > REDUCE_BUCKET):
            flat = torch.cat([each.flatten() for each in bucket]).div_(world)
            dist.all_reduce(flat)
            for each, mean in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                each.copy_(mean.view_as(each))
            bucket = []
            size = 0
        if tensor is not None:
            bucket.append(tensor)
            size += tensor.numel()


def sum_over_processes(products: torch.Tensor) -> torch.Tensor:
    """Sum a small tensor over all processes, in place, and return it."""
    dist.all_reduce(products)
    return products


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside the wrappers of accelerate and DeepSpeed, each of which holds it in its
    attribute `optimizer`."""
    while not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
