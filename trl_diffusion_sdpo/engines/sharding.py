"""Reads, writes and shards weights that are distributed over processes, and keeps float32 copies of weights that
DeepSpeed rounds (`Float32Shards`)."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import pickle
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import FSDPModule


def full_tensor(value: Any) -> Any:
    """Return the full value of a DTensor as a plain tensor, and any other value unchanged. Call it in all processes."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a DTensor, and any other tensor unchanged."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(full: torch.Tensor, size: int) -> torch.Tensor:
    """Return this process's shard, `size` elements, of a full tensor.

    It is flattened, and padded with zeros so that all processes get equally many elements.
    """
    flat = full.flatten()
    padded = torch.nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)


@contextlib.contextmanager
def gathered(tensors: list[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Make ZeRO-3 weights complete in all processes within the context. With `write`, the first process's changes are
    sent to all at the end."""
    if not tensors:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(tensors, modifier_rank=0 if write else None):
        yield


def reshard(model: nn.Module) -> None:
    """See [`Engine.reshard`]."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def freeing_whole_weights(model: nn.Module) -> Iterator[None]:
    """Within the context, in which accelerate shards a model with FSDP2, let each block's whole weights go once its
    shards are there.

    accelerate keeps the model's `state_dict` meanwhile, and with it all whole weights. It needs only those that its
    first process sends to the others, and here every process has them; so `state_dict` is empty.
    """
    hook = model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.clear())
    try:
        yield
    finally:
        hook.remove()


def fsdp2_shard(module: nn.Module, accelerator: Accelerator, dtype: torch.dtype | None) -> nn.Module:
    """Shard a frozen module with FSDP2 as accelerate shards the policy, and then cast the shards of its weights to
    `dtype`. Cast before, the whole weights would be in memory once more, in each process."""
    with freeing_whole_weights(module):
        module = fsdp2_prepare_model(accelerator, module)
    if dtype is not None:
        shards = {name: weight.detach().to(dtype) for name, weight in module.named_parameters()}
        module.load_state_dict(shards, strict=False, assign=True)
    return module.eval()


def gather_float32(tensor: Any, zero_stage: int) -> torch.Tensor:
    """Return the full value of a weight; for those that DeepSpeed trains, the optimizer's float32 value. An unsharded
    weight is not copied."""
    if zero_stage == 0:
        return full_tensor(tensor)
    from deepspeed.utils import safe_get_full_fp32_param

    trained = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
    if trained is not None or zero_stage < 3:
        return tensor if trained is None else trained.view(tensor.shape if zero_stage < 3 else tensor.ds_shape)
    with gathered([tensor]):
        return tensor.detach().clone()


def scatter(value: torch.Tensor, into: torch.Tensor, zero_stage: int) -> None:
    """Copy a full tensor into the weight `into`, perhaps sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(into, DTensor):
        value = value.to(into.device_mesh.device_type, into.dtype)
        value = distribute_tensor(value, into.device_mesh, into.placements)
    with gathered([into] if zero_stage == 3 else [], write=True):
        into.detach().copy_(value)


def zero3_partition(
    module: nn.Module,
    accelerator: Accelerator,
    dtype: torch.dtype | None,
    unrounded: dict[nn.Parameter, torch.Tensor],
) -> None:
    """Shard the weights of a module under ZeRO-3, in place and one after the other.

    Each weight is cast, moved to the device, and replaced by this process's shard of the first process's values.
    (DeepSpeed's own engine would first move the whole module.) Buffers are moved but not sharded.

    Args:
        dtype (`torch.dtype`, *optional*): Dtype to cast weights to. By default, they keep theirs.
        unrounded (`dict[nn.Parameter, torch.Tensor]`): Values of weights before they are cast, which are replaced by
            this process's shards.
    """
    import deepspeed  # takes seconds

    class OneByOne(nn.Module):
        """Stand-in for `module` that passes one weight at a time to `zero.Init`, which shards each before it gets the
        next."""

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            for weight in module.parameters():
                if dtype is not None and weight.is_floating_point():
                    weight.data = weight.data.to(dtype)
                yield weight
                if weight in unrounded:
                    size = cast(Any, weight).ds_tensor.numel()
                    unrounded[weight] = shard_of(unrounded[weight], size).clone()

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
        config.pop(name, None)
    config["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed requires a number, without effect here
    deepspeed.zero.Init(module=OneByOne(), config_dict_or_path=config)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def return_freed_memory() -> None:
    """Make the C library give freed memory back to the machine, which it would keep for this process."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def zero3_engine(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Wrap a frozen module in a ZeRO-3 engine with the policy's configuration, but no optimizer."""
    import deepspeed  # takes seconds

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


def restore_unrounded(weights: dict[nn.Parameter, torch.Tensor]) -> None:
    """See [`Engine.restore_unrounded`]."""
    if not weights:
        return
    from deepspeed.runtime.zero.partition_parameters import is_zero_param
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    weight: Any  # its `ds_tensor` is DeepSpeed's
    while weights:
        weight, value = weights.popitem()
        if is_zero_param(weight):
            safe_set_local_fp32_param(weight, value.float())
        else:
            safe_set_full_fp32_param(weight, value.float())


class Float32Shards:
    """Float32 copies, sharded over processes, of weights that DeepSpeed rounds and of which no optimizer has float32
    values.

    For references and averaged weights that training updates: half precision would lose the small updates.

    Args:
        weights (`dict[str, torch.Tensor]`): Full weights by name, before they are rounded.
    """

    def __init__(self, weights: dict[str, torch.Tensor], accelerator: Accelerator, zero_stage: int):
        world = accelerator.num_processes
        self._zero_stage = zero_stage
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        self._shards = {
            name: shard_of(weight.detach().float(), -(-weight.numel() // world)).to(accelerator.device, copy=True)
            for name, weight in weights.items()
        }

    @property
    def names(self) -> list[str]:
        return list(self._shards)

    def full(self, name: str) -> torch.Tensor:
        """Return the full float32 value of the weight `name`. Call it in all processes."""
        shard = self._shards[name]
        shape = self._shapes[name]
        flat = shard.new_empty(len(shard) * dist.get_world_size())
        dist.all_gather_into_tensor(flat, shard)
        return flat[: shape.numel()].view(shape)

    def set(self, name: str, value: torch.Tensor) -> None:
        """Replace the copy of the weight `name` by a full tensor on any device."""
        shard = self._shards[name]
        shard.copy_(shard_of(value.to(shard.device).float(), len(shard)))

    @torch.no_grad()
    def mix(self, references: dict[str, torch.Tensor], policies: dict[str, torch.Tensor], alpha: float) -> None:
        """Update the copies with the optimizer's float32 weights of the policy: `copy = alpha * policy + (1 - alpha) *
        copy`. Write the rounded results into `references`."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, shard in self._shards.items():
            shard.lerp_(shard_of(safe_get_full_fp32_param(policies[name]), len(shard)), alpha)
            with gathered([references[name]] if self._zero_stage == 3 else [], write=True):
                references[name].detach().copy_(self.full(name))


class DenoiserView(nn.Module):
    """Stand-in for the denoiser, wrapped by an engine, in a pipeline that generates images during training.

    Calls go to the wrapped module, which alone gathers sharded weights, and all other attributes to the plain denoiser.
    """

    def __init__(self, denoiser: nn.Module, engine_model: nn.Module):
        super().__init__()
        # Not registered as submodules: `.to` and `state_dict` must not reach them.
        self.__dict__["_pair"] = (denoiser, engine_model)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self._pair[1](*args, **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_pair"][0], name)


@contextlib.contextmanager
def unwrapping_refused_pickles() -> Iterator[None]:
    """Within the context, raise the original `pickle.UnpicklingError` if a process refuses to read a sharded
    checkpoint, not torch's `CheckpointException`, which `except Exception` does not catch.
    """
    try:
        yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, pickle.UnpicklingError):
                raise cause from error
        raise
