"""Reads settings of DeepSpeed and FSDP from the training arguments, before there is an `Accelerator`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading, enable_fsdp_ram_efficient_loading
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..utils.errors import UserError
from .gradient_backends import REPLICATED


def runs_deepspeed(args: TrainingArguments) -> bool:
    """Return whether the training arguments or the launcher select DeepSpeed."""
    return args.deepspeed_plugin is not None


def by_engine(args: TrainingArguments) -> bool:
    """Return whether DeepSpeed or FSDP (engines that shard or round weights) will train, not one process or DDP."""
    return asked_engine(args) is not None


def asked_engine(args: TrainingArguments) -> str | None:
    """Return the name of the sharding engine that the training arguments or the launcher ask for, or `None`. accelerate
    may not run it, for example FSDP on CPUs or with one process."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if runs_deepspeed(args):
        return "DeepSpeed"
    return "FSDP" if args.fsdp_plugin_args is not None or launched else None


def shards_weights(args: TrainingArguments) -> bool:
    """Return whether ZeRO-3 or FSDP (which shard the weights themselves) will train."""
    return by_engine(args) and (args.deepspeed_plugin is None or args.deepspeed_plugin.zero_stage == 3)


def branch_gradient_obstacles(args: TrainingArguments) -> Iterator[tuple[str, str]]:
    """Yield each setting of the engine for which [`gradient_backend`] would refuse to compute winners' and losers'
    gradients separately: a reason, and how to change it, as two sentences without a full stop."""
    plugin = args.deepspeed_plugin
    if plugin is not None:
        config = plugin.hf_ds_config
        stage = plugin.zero_stage
        if stage not in (1, 2, 3):
            yield f"DeepSpeed's ZeRO stage is {stage}", "Set `zero_stage` to 1, 2 or 3"
        if config.get_value("zero_optimization.offload_optimizer.device") in ("cpu", "nvme"):
            yield "DeepSpeed keeps the optimizer on the CPU", "Set `offload_optimizer_device: none`"
        sums_in_float32 = config.get_value("data_types.grad_accum_dtype") == "fp32"
        bf16 = config.get_value("bf16.enabled")
        if stage == 1 and sums_in_float32 and (args.bf16 if bf16 == "auto" else bf16 is True):
            yield "ZeRO-1 with bf16 and `grad_accum_dtype: fp32` has another optimizer", "Leave `grad_accum_dtype` out"
        if stage in (1, 2) and "muon" in str(config.get_value("optimizer.type")).lower():
            yield f"Muon under ZeRO-{stage} changes each gradient during its backward pass", "Use ZeRO-3"
    elif asked_engine(args) == "FSDP":
        launched = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        if launched or (args.fsdp_plugin_args or {}).get("cpu_offload"):
            yield "FSDP keeps weights and gradients on the CPU", "Leave `offload_params` off"
    elif args.distributed_state is not None and args.distributed_state.distributed_type.value not in REPLICATED:
        kind = args.distributed_state.distributed_type.value
        yield f"it does not run on {kind}", "Train on one device, or with DDP, FSDP2 or DeepSpeed ZeRO"


def check_deepspeed_precision(args: TrainingArguments) -> None:
    """Raise `ValueError` if DeepSpeed's configuration turns on bf16 or fp16 and the training arguments do not."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    for name in ("bf16", "fp16"):
        if plugin.hf_ds_config.get_value(f"{name}.enabled") is True and not getattr(args, name):
            raise UserError(
                "DeepSpeed and the training arguments must have the same precision. DeepSpeed's configuration has "
                f"{name} (`mixed_precision: {name}` of the launcher), and the arguments have `{name}=False`. Set "
                f"`--{name} true`, or remove {name} from the configuration."
            )


def set_deepspeed_learning_rate(args: TrainingArguments) -> None:
    """Write the learning rate into DeepSpeed's configuration if that still has `"auto"`: `learning_rate` was unset when
    transformers replaced it."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    config = plugin.hf_ds_config
    for name in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"):
        node, key = config.find_config_node(name)
        if node is not None and key in node and node[key] is None:
            node[key] = args.learning_rate


@contextlib.contextmanager
def loading_unsharded(args: TrainingArguments) -> Iterator[None]:
    """Within the context, load models with complete weights in every process.

    Otherwise, transformers would load text encoders as shards under ZeRO-3, which only DeepSpeed's engine can run, and
    weights only in the first process under FSDP.
    """
    first_process_only = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
    if first_process_only:
        disable_fsdp_ram_efficient_loading()
    plugin = args.deepspeed_plugin
    if plugin is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if first_process_only:
            enable_fsdp_ram_efficient_loading()
        if plugin is not None:
            set_hf_deepspeed_config(plugin.hf_ds_config)


def check_unsharded(module: nn.Module, name: str) -> None:
    """Raise `ValueError` if a module was loaded in shards, as transformers does under ZeRO-3. The message calls it
    `name`."""
    if any(weight.numel() == 0 for weight in module.parameters()):
        raise UserError(
            f"The pipeline's {name} must have complete weights, but was loaded in shards of ZeRO-3. Pass the "
            "pipeline's Hub id or folder, or load the pipeline before you create the configuration with `deepspeed`."
        )


def training_autocast(args: TrainingArguments) -> contextlib.AbstractContextManager:
    """Return the autocast context in which training predicts. Under DeepSpeed, which rounds the weights instead, it
    does nothing."""
    if runs_deepspeed(args) or not (args.bf16 or args.fp16):
        return contextlib.nullcontext()
    return torch.autocast(args.device.type, dtype=torch.bfloat16 if args.bf16 else torch.float16)
