"""How each engine accumulates, reduces and receives the gradient of one backward pass.

Where the engine shards gradients, an accumulator is a shard: nothing of full size is held.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from .._compat import keeps_zero_gradients, zero3_adam_state, zero_gradients, zero_weights
from .adamw_preconditioner import AdamWState
from .gradients import Gradient, add
from .sharding import local

REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_HPU")
REDUCE_BUCKET = 1 << 25  # elements that one all-reduce takes


class GradientBackend(ABC):
    """How one engine accumulates, reduces and receives gradients.

    A gradient is a list with one tensor for each trained weight (or shard of it), `None` for a weight that took no
    part. Lists of one engine always have the same order.
    """

    retains_graph = True  # whether one forward pass may be walked back twice

    @abstractmethod
    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        """Add the gradient of `objective` to `into`, which may be changed in place; a new one where it is `None`."""

    @abstractmethod
    def put(self, gradient: Gradient) -> None:
        """Make this the gradient that is clipped and stepped with."""

    def reduced(self, gradient: Gradient) -> Gradient:
        """The gradient averaged over the processes, where `backward` has not done so."""
        return gradient

    def total(self, products: torch.Tensor) -> torch.Tensor:
        """Inner products over all shards, from those of this process."""
        return products

    def step(self) -> None:
        """Take the optimizer's step, where the engine does it by itself."""
        return None

    def accumulating(self) -> contextlib.AbstractContextManager:
        """Entered around the forward and backward passes of a micro-batch."""
        return contextlib.nullcontext()

    @abstractmethod
    def weights(self) -> list[torch.Tensor]:
        """The float32 weights, or shards of them, that a gradient belongs to, in its order."""

    @abstractmethod
    def adam_states(self, optimizer: torch.optim.Optimizer) -> list[AdamWState]:
        """AdamW's state of the weights, or shards, in a gradient's order; `optimizer` is the one without wrappers."""

    @property
    def loss_scale(self) -> float:
        """By which gradients are multiplied, against underflow in fp16."""
        return 1.0


class ReplicatedBackend(GradientBackend):
    """One process, or DDP: every process holds whole gradients, and averages them once an optimizer step."""

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self._model, self._accelerator = model, accelerator
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]

    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        # Autograd adds to the gradient that it finds, in place.
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

    def reduced(self, gradient: Gradient) -> Gradient:
        if self._accelerator.num_processes == 1:
            return gradient
        # A weight may have taken part in some processes only; all send the same message.
        pairs = zip(gradient, self._weights, strict=True)
        whole = [torch.zeros_like(weight) if part is None else part for part, weight in pairs]
        all_reduce_mean(whole)
        return whole

    def put(self, gradient: Gradient) -> None:
        for weight, part in zip(self._weights, gradient, strict=True):
            weight.grad = part

    def accumulating(self) -> contextlib.AbstractContextManager:
        # DDP would average one branch's gradient and then, its work done, leave the other's as it is.
        return self._accelerator.no_sync(self._model)

    def weights(self) -> list[torch.Tensor]:
        return [weight.detach() for weight in self._weights]

    def adam_states(self, optimizer: torch.optim.Optimizer) -> list[AdamWState]:
        groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
        return [AdamWState.of(optimizer.state[weight], groups[id(weight)]) for weight in self._weights]

    @property
    def loss_scale(self) -> float:
        return 1.0 if self._accelerator.scaler is None else self._accelerator.scaler.get_scale()


class Fsdp2Backend(ReplicatedBackend):
    """FSDP2: the backward pass itself averages gradients and leaves this process its shard."""

    def accumulating(self) -> contextlib.AbstractContextManager:
        # Without this, gradients of all but the last micro-batch wait whole, outside of `.grad`, branches mixed.
        self._model.set_requires_gradient_sync(True)
        return contextlib.nullcontext()

    def reduced(self, gradient: Gradient) -> Gradient:
        return gradient

    def total(self, products: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(products)

    def weights(self) -> list[torch.Tensor]:
        return [local(weight.detach()) for weight in self._weights]


class ZeroBackend(GradientBackend):
    """DeepSpeed: the engine's optimizer averages gradients into shards during the backward pass."""

    def __init__(self, engine: Any):
        self._engine = engine

    def backward(self, objective: torch.Tensor, into: Gradient | None, *, retain_graph: bool) -> Gradient:
        # Without the flag, the engine keeps whole gradients until the last micro-batch, branches mixed, and counts
        # backward passes where it should count micro-batches.
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(objective, retain_graph=retain_graph, scale_wrt_gas=False)
        gradient = self.take(into)
        self.clear()
        return gradient

    @abstractmethod
    def take(self, into: Gradient | None) -> Gradient:
        """The shards of the latest backward pass, no longer the engine's; added to `into` if there is one."""

    def clear(self) -> None:
        """Leave nothing of one branch for the other."""
        self._engine.optimizer.zero_grad()

    def total(self, products: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(products)

    def step(self) -> None:
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()

    @property
    def loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale)


class Zero12Backend(ZeroBackend):
    """ZeRO-1 and ZeRO-2: a flat shard for each group of parameters, in `averaged_gradients`."""

    def __init__(self, engine: Any):
        super().__init__(engine)
        self._groups: dict[int, list[torch.Tensor]] = {}  # DeepSpeed's own lists, those of the latest pass
        self._sizes: dict[int, list[int]] = {}

    def take(self, into: Gradient | None) -> Gradient:
        averaged = zero_gradients(self._engine.optimizer)
        for group in sorted(averaged):
            self._groups[group], averaged[group] = averaged[group], None
            self._sizes[group] = [part.numel() for part in self._groups[group]]
        taken = [part for group in self._groups.values() for part in group]
        return taken if into is None else add(into, taken)

    def put(self, gradient: Gradient) -> None:
        # A list may carry the flat tensor that its parts are views of, so the parts are filled and not replaced. The
        # latest pass was the loser's, which is not needed any more.
        parts = iter(gradient)
        for group, own in self._groups.items():
            for part in own:
                part.copy_(next(parts))
            zero_gradients(self._engine.optimizer)[group] = own
        self._groups = {}

    def weights(self) -> list[torch.Tensor]:
        shards: list[torch.Tensor] = []
        for group, flat in enumerate(zero_weights(self._engine.optimizer)):
            sizes = self._sizes[group]
            shards += flat.detach()[: sum(sizes)].split(sizes)
        return shards

    def adam_states(self, optimizer: torch.optim.Optimizer) -> list[AdamWState]:
        states = []
        for index, flat in enumerate(zero_weights(self._engine.optimizer)):
            state, sizes = AdamWState.of(optimizer.state[flat], optimizer.param_groups[index]), self._sizes[index]
            states += state.split(sizes)
        return states


class Zero3Backend(ZeroBackend):
    """ZeRO-3: a shard of each parameter."""

    retains_graph = False  # weights are gathered for one backward pass a forward pass, and gone in the next

    def __init__(self, engine: Any):
        super().__init__(engine)
        self._weights = [weight for weight in engine.module.parameters() if weight.requires_grad]

    def take(self, into: Gradient | None) -> Gradient:
        from deepspeed.utils import safe_get_local_grad

        if into is None:
            return [safe_get_local_grad(weight).clone() for weight in self._weights]
        return add(into, (safe_get_local_grad(weight) for weight in self._weights))

    def put(self, gradient: Gradient) -> None:
        from deepspeed.utils import safe_set_local_grad

        for weight, part in zip(self._weights, gradient, strict=True):
            safe_set_local_grad(weight, part)

    def weights(self) -> list[torch.Tensor]:
        from deepspeed.utils import safe_get_local_fp32_param

        return [safe_get_local_fp32_param(weight) for weight in self._weights]

    def adam_states(self, optimizer: torch.optim.Optimizer) -> list[AdamWState]:
        return [AdamWState.of(*zero3_adam_state(self._engine.optimizer, weight)) for weight in self._weights]


def gradient_backend(model: nn.Module, accelerator: Accelerator) -> GradientBackend:
    """The engine that `accelerator` trains `model` with; both as they are after `accelerator.prepare`.

    Raises:
        `ValueError`: If gradients of two branches cannot be kept apart under it.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_backend(model)
    if accelerator.is_fsdp2:
        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            raise ValueError(
                "`safeguard='parameter'` cannot act with FSDP's `offload_params`, which moves each gradient to the CPU "
                "while the backward pass runs. Leave it off, or use `safeguard='output'`."
            )
        return Fsdp2Backend(model, accelerator)
    if accelerator.distributed_type.value not in REPLICATED:
        raise ValueError(
            "`safeguard='parameter'` trains on one device, or with DDP, FSDP2 or DeepSpeed ZeRO-1, 2 and 3; got "
            f"{accelerator.distributed_type.value}. Use one of these, or `safeguard='output'`."
        )
    return ReplicatedBackend(model, accelerator)


def _deepspeed_backend(engine: Any) -> GradientBackend:
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2, 3):
        raise ValueError(
            f"`safeguard='parameter'` needs DeepSpeed's ZeRO stage 1, 2 or 3, got {stage}. Set `zero_stage` to 1, or "
            "train without DeepSpeed, which costs the same memory."
        )
    if engine.zero_use_cpu_optimizer():
        raise ValueError(
            "`safeguard='parameter'` cannot act with the optimizer offloaded: DeepSpeed then moves each gradient away "
            "while the backward pass runs, before the two branches can be told apart. Set `offload_optimizer_device: "
            "none`, or use `safeguard='output'`."
        )
    if stage == 3:
        return Zero3Backend(engine)
    if not keeps_zero_gradients(engine.optimizer):
        raise ValueError(
            f"`safeguard='parameter'` cannot act with DeepSpeed's {type(engine.optimizer).__name__}, which bf16 with "
            "`data_types.grad_accum_dtype: fp32` makes of ZeRO-1. Leave that setting out, or use ZeRO-2."
        )
    if "Muon" in type(engine.optimizer.optimizer).__name__:
        raise ValueError(
            "`safeguard='parameter'` cannot act with Muon under ZeRO-1 and 2: DeepSpeed makes its update of each "
            "branch's gradient while it is averaged. Use ZeRO-3, another optimizer, or `safeguard='output'`."
        )
    return Zero12Backend(engine)


def all_reduce_mean(tensors: list[torch.Tensor]) -> None:
    """Average tensors over all processes, in place, some at a time as one message."""
    world = dist.get_world_size()
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in [*tensors, None]:
        if bucket and (tensor is None or size + tensor.numel() > REDUCE_BUCKET):
            flat = torch.cat([part.flatten() for part in bucket]).div_(world)
            dist.all_reduce(flat)
            for part, piece in zip(bucket, flat.split([part.numel() for part in bucket]), strict=True):
                part.copy_(piece.view_as(part))
            bucket, size = [], 0
        if tensor is not None:
            bucket.append(tensor)
            size += tensor.numel()


def sum_over_processes(products: torch.Tensor) -> torch.Tensor:
    """The sum of a small tensor over all processes."""
    dist.all_reduce(products)
    return products
