"""Weights of which a process holds a part: gathered to be written, scattered when read, and a second module sharded as
the policy is."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    disable_fsdp_ram_efficient_loading,
    enable_fsdp_ram_efficient_loading,
    fsdp2_prepare_model,
    save_fsdp_optimizer,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    deepspeed_load_checkpoint,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)


def set_deepspeed_learning_rate(args: TrainingArguments) -> None:
    """Give DeepSpeed's configuration the learning rate if it was chosen after `"auto"` had been read."""
    if not runs_deepspeed(args):
        return
    config = args.deepspeed_plugin.hf_ds_config
    for name in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"):
        node, key = config.find_config_node(name)
        if node is not None and key in node and node[key] is None:
            node[key] = args.learning_rate


def runs_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed will train, by the arguments or by how the process was launched."""
    return args.deepspeed_plugin is not None


def by_engine(args: TrainingArguments) -> bool:
    """Whether an engine will hold the weights its own way, in shards or rounded: DeepSpeed or FSDP."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return runs_deepspeed(args) or args.fsdp_plugin_args is not None or launched


@contextlib.contextmanager
def loading_unsharded(args: TrainingArguments) -> Iterator[None]:
    """Load pipelines as they are. Under ZeRO-3, transformers would create text encoders as shards, which only the
    engine that owns them could run; under FSDP, it would read them in the first process only."""
    by_first_process = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
    if by_first_process:
        disable_fsdp_ram_efficient_loading()
    if runs_deepspeed(args):
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if by_first_process:
            enable_fsdp_ram_efficient_loading()
        if runs_deepspeed(args):
            set_hf_deepspeed_config(args.deepspeed_plugin.hf_ds_config)


def check_whole(module: nn.Module, name: str) -> None:
    """Raise `ValueError` where a module was loaded as ZeRO-3's shards."""
    if any(weight.numel() == 0 for weight in module.parameters()):
        raise ValueError(
            f"The pipeline's {name} must be whole, but it was loaded as shards of ZeRO-3. Pass the Hub id or folder, "
            "or load the pipeline before making the configuration with `deepspeed`."
        )


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return accelerator.state.deepspeed_plugin.zero_stage


def engine_name(accelerator: Accelerator) -> str:
    """What a checkpoint depends on: `"plain"`, one process or DDP, `"fsdp"`, or `"zero1, 8 processes"` and so on."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{zero_stage(accelerator)}, {accelerator.num_processes} processes"
    return "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "plain"


def check_engine(accelerator: Accelerator) -> None:
    """Raise `ValueError` where one image would be spread over several processes, or gradients be rounded on the way."""
    parallel = accelerator.parallelism_config
    spread = parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        spread = spread or config.get("tensor_parallel", {}).get("autotp_size", 0) > 1
        _check_plain_zero(config.get("zero_optimization", {}))
    if spread:
        raise ValueError(
            "Tensor, context and sequence parallelism spread one image over several processes, and the errors of this "
            "trainer are means over whole images. Use data parallelism: DDP, FSDP2 or ZeRO."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP must be version 2, got 1. Set `fsdp_version: 2` (`fsdp_config={'version': 2}`).")


def _check_plain_zero(config: dict[str, Any]) -> None:
    """ZeRO++ rounds gradients and keeps second shards of the weights."""
    changed = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False}
    given = {name: config[name] for name, off in changed.items() if config.get(name, off) != off}
    if given:
        raise ValueError(
            f"DeepSpeed's ZeRO++ cannot act here, got {given}: policy and reference would be rounded apart, and "
            "gradients are rounded before they are compared. Leave these settings out."
        )


def set_precision(accelerator: Accelerator, *, exact_gradients: bool) -> None:
    """Settle, before the engine takes the model, what it rounds to half precision.

    Args:
        accelerator (`Accelerator`): Its plugin's settings are completed.
        exact_gradients (`bool`): Whether gradients are averaged in float32: the difference of two branches loses what
            their sum would not.
    """
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        policy = plugin.mixed_precision_policy
        if policy is not None and policy.param_dtype is not None:
            # FSDP would round every input, timesteps too; autocast rounds what weights are multiplied with.
            settings = {"reduce_dtype": torch.float32} if exact_gradients else {}
            plugin.mixed_precision_policy = dataclasses.replace(policy, cast_forward_inputs=False, **settings)
    elif zero_stage(accelerator) >= 2 and exact_gradients:  # with them, ZeRO-1 becomes another optimizer
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        config.setdefault("communication_data_type", "fp32")


def rounds_weights(accelerator: Accelerator) -> bool:
    """Whether the engine turns all weights into half precision, as DeepSpeed does, and not copies of them."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and engine_dtype(accelerator) is not None


def unrounded(module: nn.Module, accelerator: Accelerator) -> dict[nn.Parameter, torch.Tensor]:
    """The trained weights as they are before DeepSpeed rounds them; none where it does not."""
    if not rounds_weights(accelerator):
        return {}
    return {weight: weight.data for weight in module.parameters() if weight.requires_grad}


def restore_unrounded(weights: dict[nn.Parameter, torch.Tensor]) -> None:
    """Let the optimizer start from them, and empty the dictionary. DeepSpeed makes its float32 weights of those that
    it has rounded already, and the rounding would be a larger change than many steps of training."""
    if not weights:
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    while weights:
        weight, value = weights.popitem()
        if is_zero_param(weight):
            safe_set_local_fp32_param(weight, shard_of(value.float(), weight.ds_tensor.numel()))
        else:
            safe_set_full_fp32_param(weight, value.float())


def is_zero_param(weight: torch.Tensor) -> bool:
    """Whether ZeRO-3 holds a weight in parts."""
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    return is_zero_param(weight)


def shard_of(whole: torch.Tensor, size: int) -> torch.Tensor:
    """This process's `size` elements of a flat tensor, which is filled up with zeros to be divided evenly."""
    flat = whole.flatten()
    padded = torch.nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
    return padded.narrow(0, size * dist.get_rank(), size)


def shard_like_policy(module: nn.Module, accelerator: Accelerator, *, moves: bool) -> nn.Module:
    """A frozen module held as the engine holds the policy's weights: sharded under ZeRO-3 and FSDP2, whole elsewhere;
    in the precision in which the policy runs.

    Args:
        module (`nn.Module`): In evaluation mode; changed in place.
        accelerator (`Accelerator`): After it has prepared the policy.
        moves (`bool`): Whether the module will follow the policy, in steps that half precision would lose.

    Returns:
        `nn.Module`: To be called in place of `module`.
    """
    dtype = engine_dtype(accelerator)
    if accelerator.is_fsdp2:
        for weight in module.parameters() if dtype is not None and not moves else ():
            weight.data = weight.data.to(dtype)  # FSDP rounds them to it at every use
        return fsdp2_prepare_model(accelerator, module).eval()
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return module
    if zero_stage(accelerator) < 3:
        return module if dtype is None else module.to(dtype)
    import deepspeed  # seconds

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


def engine_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The half precision in which the engine has all weights act; `None` where it leaves that to autocast."""
    if accelerator.is_fsdp2:
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        return None if policy is None else policy.param_dtype
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(name, {}).get("enabled") is True:
            return dtype
    return None


def shard_again(engine_model: nn.Module) -> None:
    """Put away what FSDP2 has left gathered after a forward pass without gradients, so that a module's weights are
    those that count."""
    for module in engine_model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(tensors: dict[str, torch.Tensor], accelerator: Accelerator, *, keep: bool) -> dict[str, torch.Tensor]:
    """Named weights whole and on the CPU, one after the other; all processes take part.

    Args:
        tensors (`dict[str, torch.Tensor]`): The module's own parameters and buffers, not detached.
        accelerator (`Accelerator`): Tells how they are sharded.
        keep (`bool`): Whether this process wants them; the others give their parts and get nothing.

    Returns:
        `dict[str, torch.Tensor]`: Trained weights in float32, as the optimizer holds them.
    """
    whole = {}
    for name, tensor in tensors.items():
        value = _gather_one(tensor, accelerator)
        if keep:
            whole[name] = value.detach().to("cpu", copy=True).contiguous()
    return whole


def _gather_one(tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    stage = zero_stage(accelerator)
    if stage == 0:
        return tensor
    from deepspeed.utils import safe_get_full_fp32_param

    trained = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
    if trained is not None or stage < 3:
        return tensor if trained is None else trained.view(tensor.shape if stage < 3 else tensor.ds_shape)
    with _gathered([tensor]):
        return tensor.detach().clone()


@torch.no_grad()
def scatter(values: dict[str, torch.Tensor], into: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Copy whole tensors into named weights, of which each process may hold a part; all processes take part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, tensor in into.items():
        value = values[name]
        if isinstance(tensor, DTensor):
            device = tensor.device_mesh.device_type
            value = distribute_tensor(value.to(device, tensor.dtype), tensor.device_mesh, tensor.placements)
        with _gathered([tensor] if zero_stage(accelerator) == 3 else [], write=True):
            tensor.detach().copy_(value)


@torch.no_grad()
def mix(
    references: Iterable[torch.Tensor], policies: Iterable[torch.Tensor], alpha: float, accelerator: Accelerator
) -> None:
    """`ref = alpha * policy + (1 - alpha) * ref`, weight by weight; all processes take part."""
    stage3 = zero_stage(accelerator) == 3
    for reference, policy in zip(references, policies, strict=True):
        with _gathered([reference, policy] if stage3 else [], write=True):
            reference.lerp_(policy.to(reference.dtype), alpha)


class Float32Parts:
    """The float32 form of weights that DeepSpeed rounds and no optimizer holds, each process a part: a reference that
    follows the policy in small moves would not move at all in half precision.

    Args:
        weights (`dict[str, torch.Tensor]`): Whole, before they are rounded.
        accelerator (`Accelerator`): Its device holds the parts.
    """

    def __init__(self, weights: dict[str, torch.Tensor], accelerator: Accelerator):
        world = accelerator.num_processes
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.parts = {
            name: shard_of(weight.detach().float(), -(-weight.numel() // world)).to(accelerator.device, copy=True)
            for name, weight in weights.items()
        }

    def whole(self, name: str) -> torch.Tensor:
        """One of the weights; all processes take part."""
        part, shape = self.parts[name], self.shapes[name]
        flat = part.new_empty(len(part) * dist.get_world_size())
        dist.all_gather_into_tensor(flat, part)
        return flat[: shape.numel()].view(shape)

    def set(self, name: str, value: torch.Tensor) -> None:
        """Replace one of the weights by a whole tensor."""
        part = self.parts[name]
        part.copy_(shard_of(value.float(), len(part)))

    @torch.no_grad()
    def mix(
        self, references: dict[str, torch.Tensor], policies: dict[str, torch.Tensor], alpha: float, stage3: bool
    ) -> None:
        """Move the parts towards the optimizer's float32 weights, and round the result into `references`."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, part in self.parts.items():
            part.lerp_(shard_of(safe_get_full_fp32_param(policies[name]), len(part)), alpha)
            with _gathered([references[name]] if stage3 else [], write=True):
                references[name].detach().copy_(self.whole(name))


@contextlib.contextmanager
def _gathered(tensors: list[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """ZeRO-3 weights whole for a moment, and if `write` with what the first process has made of them."""
    if not tensors:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(tensors, modifier_rank=0 if write else None):
        yield


def save_engine_state(
    engine_model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, folder: str
) -> None:
    """Write what a resumed run needs of DeepSpeed or FSDP2 beside the tuned weights: the optimizer's state."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine_model.save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, engine_model, folder)


def pickled_types(accelerator: Accelerator) -> list[type]:
    """The engine's own classes in the files of its checkpoints; none of them runs anything when it is read."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load_deepspeed_state(engine_model: nn.Module, folder: str) -> None:
    """Read weights and optimizer from DeepSpeed's own parts. What is frozen is not in them, which transformers would
    miss."""
    deepspeed_load_checkpoint(engine_model, folder, load_module_strict=False)


class DenoiserView(nn.Module):
    """The denoiser for a pipeline that draws during training: calls go through the engine's module, which gathers what
    is sharded; everything else is the denoiser's own.

    Args:
        denoiser (`nn.Module`): The one that trains.
        engine_model (`nn.Module`): It as the engine wrapped it.
    """

    def __init__(self, denoiser: nn.Module, engine_model: nn.Module):
        super().__init__()
        self.__dict__["_pair"] = (denoiser, engine_model)  # not as children: they are not this view's to move or save

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self._pair[1](*args, **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_pair"][0], name)


def whole(value: Any) -> Any:
    """A distributed tensor as a plain one, the same on all processes, which all take part; anything else as it is."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds; all of one that is not distributed."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
