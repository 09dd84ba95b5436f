"""Every private upstream name that the package uses, with the reason and when it can go."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import torch
from diffusers import DiffusionPipeline, ModelMixin

# The common base of all mixins that give pipelines `load_lora_weights` and `save_lora_weights`, and where they keep a
# LoRA's settings in a file's metadata; exported by their module only. Can go when `diffusers.loaders` exports them.
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin

# For models in one file; exported by their module only. Can go when `diffusers.loaders` exports them.
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config

# The error of a lost connection to the Hub comes from its client's HTTP library, httpx or httpx2 by version; this is
# the common base of both. Can go when huggingface_hub has an error class for it.
from huggingface_hub.errors import HTTPError as HubConnectionError
from peft.tuners.tuners_utils import BaseTunerLayer

# How PEFT finds the rank or alpha of one module among the patterns of a LoRA's configuration. Can go when `peft.utils`
# exports it, or a configuration has a method for it.
from peft.utils.other import get_pattern_key as pattern_key
from transformers import TrainingArguments

# The callbacks of trackers that take images. Public, and here because their package is also that of DeepSpeed and FSDP,
# which only `engines` may ask for.
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

# numpy's classes without which `torch.load(weights_only=True)` reads no random states of a checkpoint; exported by its
# module only. Can go when transformers exports it.
from transformers.trainer_pt_utils import safe_globals as numpy_safe_globals

# The arguments that transformers 5.23 renamed. Can go when the lowest supported transformers has the new names.
_RENAMED = "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"

__all__ = [  # re-exported
    "LORA_ADAPTER_METADATA_KEY",
    "HubConnectionError",
    "SingleFileComponentError",
    "numpy_safe_globals",
    "pattern_key",
]
__all__ += ["TensorBoardCallback", "TrackioCallback", "WandbCallback"]


# The fused attention of the CPU, forward and backward, as operations: torch's FLOP counter has no formula for them. Can
# go when it has.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def block_names(denoiser: ModelMixin) -> list[str]:
    """Class names of a diffusers model's blocks, as units for FSDP.

    `_no_split_modules`, which accelerate reads, has no public spelling; can go when there is one, or when accelerate
    also looks for it in submodules.
    """
    return list(denoiser._no_split_modules or ())


def activation_checkpointing(args: TrainingArguments) -> tuple[bool, dict[str, Any]]:
    """Whether activations are checkpointed, and the arguments for it, under either of transformers' two names."""
    return bool(getattr(args, CHECKPOINTING)), getattr(args, f"{CHECKPOINTING}_kwargs") or {}


def checkpoints_activations(denoiser: ModelMixin) -> bool:
    """Whether a diffusers model supports activation checkpointing.

    `_supports_gradient_checkpointing` has no public spelling; can go when there is one.
    """
    return denoiser._supports_gradient_checkpointing


def repeated_blocks(denoiser: ModelMixin) -> list[str]:
    """Class names of the blocks that `compile_repeated_blocks` compiles.

    `_repeated_blocks` has no public spelling; can go when there is one.
    """
    return list(denoiser._repeated_blocks or ())


def attention_backends() -> tuple[str, ...]:
    """diffusers' names of attention back ends; exported by their module only. Can go when diffusers exports them."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return tuple(sorted(backend.value for backend in AttentionBackendName))


def has_attention_backends(denoiser: torch.nn.Module) -> bool:
    """Whether a denoiser's attention goes through diffusers' back ends, which that of older models does not.

    `_attention_backend` of attention processors has no public spelling; can go when there is one.
    """
    processors = (vars(module).get("processor") for module in denoiser.modules())
    return any("_attention_backend" in dir(processor) for processor in processors)


def loads_lora(pipeline_class: type[DiffusionPipeline]) -> bool:
    """Whether a pipeline has `load_lora_weights` and `save_lora_weights`."""
    return issubclass(pipeline_class, LoraBaseMixin)


def switch_adapters(layers: Iterable[BaseTunerLayer], *, on: bool) -> None:
    """Switch the adapters of PEFT's layers on or off, and leave `requires_grad` of their weights as it is.

    PEFT's `enable_adapters` clears and sets it for every weight, which takes as long as hundreds of layers' forward
    passes need in Python, and FSDP2 decides by it, in the first forward pass and once for all, in which precision
    gradients are kept. `_disable_adapters` has no public spelling; can go when there is one.
    """
    for layer in layers:
        layer._disable_adapters = not on
        assert layer.disable_adapters is not on, f"PEFT's {type(layer).__name__} no longer reads `_disable_adapters`."


def activate_adapter(layers: Iterable[BaseTunerLayer], name: str) -> None:
    """Make an adapter the active one of PEFT's layers, and leave `requires_grad` of all weights as it is.

    PEFT's `set_adapter` sets it for every weight of every adapter, with the costs of [`switch_adapters`].
    `_active_adapter` has no public spelling; can go when there is one.
    """
    for layer in layers:
        layer._active_adapter = [name]
        assert layer.active_adapters == [name], f"PEFT's {type(layer).__name__} no longer reads `_active_adapter`."


@contextlib.contextmanager
def adapters_as_they_were(layers: Iterable[BaseTunerLayer]) -> Iterator[None]:
    """Undo [`switch_adapters`] and [`activate_adapter`] at the end, whatever was active before.

    `_active_adapter` and `_disable_adapters` have no public spelling; can go when those two have one.
    """
    states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        yield
    finally:
        for layer, active, disabled in states:
            layer._active_adapter, layer._disable_adapters = active, disabled


def modules_of(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A module and all below it, in any order; one that is in several places comes several times.

    `modules()` also makes their names, which takes several times as long. `_modules` has no public spelling; can go
    when torch's own walk is as fast.
    """
    pending = [module]
    while pending:
        found = pending.pop()
        yield found
        pending += [child for child in found._modules.values() if child is not None]


def forward_pre_hooks(module: torch.nn.Module) -> list[Any]:
    """A module's forward pre-hooks, so that none is registered twice.

    `_forward_pre_hooks` has no public spelling; can go when there is one.
    """
    return list(module._forward_pre_hooks.values())


def start_method(args: TrainingArguments) -> str | None:
    """Start method of DataLoader workers, an argument that transformers 5.14 does not have. Can go when the lowest
    supported transformers has it."""
    return getattr(args, "dataloader_multiprocessing_context", None)


def keeps_order(args: TrainingArguments) -> bool:
    """`in_order` of DataLoader; see [`start_method`]."""
    return getattr(args, "dataloader_in_order", True)


def dataset_fingerprint(dataset: datasets.Dataset) -> str:
    """The hash by which `datasets` names cached results of a data set.

    `_fingerprint` has no public spelling; can go when there is one.
    """
    return dataset._fingerprint


def is_split_by_node(stream: datasets.IterableDataset) -> bool:
    """Whether `datasets.distributed.split_dataset_by_node` has given each process a part of a stream.

    `_distributed` has no public spelling; can go when there is one.
    """
    return stream._distributed is not None


def compile_with_eager_rounding() -> None:
    """Make inductor round where eager PyTorch rounds, in the whole process.

    Fused kernels keep intermediate values in float32, and policy and reference fuse differently: under bf16 they then
    differ before the first step. `emulate_precision_casts` is a setting of inductor without a public spelling; can go
    when `torch.compile` has one.
    """
    from torch._inductor import config  # seconds, and only where something is compiled

    config.emulate_precision_casts = True


# DeepSpeed's public functions return full gradients, and no shards under ZeRO-1 and 2: the optimizer's lists are read
# and written. The next three functions can go when `deepspeed.utils.safe_get_local_grad` supports these stages.


def keeps_zero_gradients(optimizer: Any) -> bool:
    """Whether DeepSpeed's optimizer is that of ZeRO-1 and 2, with the lists of the next two functions."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return isinstance(optimizer, DeepSpeedZeroOptimizer)


def zero_gradients(optimizer: Any) -> dict[int, list[torch.Tensor] | None]:
    """This process's shard of the averaged gradients, a list of tensors for each group of parameters."""
    return optimizer.averaged_gradients


def zero_weights(optimizer: Any) -> list[torch.Tensor]:
    """This process's shard of the float32 weights, flat, for each group of parameters."""
    return optimizer.single_partition_of_fp32_groups


def set_last_rates(schedule: Any, rates: list[Any]) -> None:
    """Set the return value of a schedule's `get_last_lr`, after a checkpoint's state has overwritten it.

    Can go when torch's schedules have a setter.
    """
    if "_last_lr" in vars(schedule):
        schedule._last_lr = rates


@contextlib.contextmanager
def autocast_rules(rules: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Further operations of the CPU's autocast, by their names in `aten`, within the context. A rule is called outside
    autocast, with the operation and its arguments.

    torch has a public way to add kernels, but none to remove them or to leave autocast out; can go when it has, or when
    fake tensors of an accelerator that is not built in can be differentiated.
    """
    library = torch.library.Library("aten", "IMPL")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(operation: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                return rule(operation, *args, **kwargs)

        return run

    try:
        for name, rule in rules.items():
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, kernel(operation, rule), "AutocastCPU")
        yield
    finally:
        library._destroy()


def default_configuration(tensors: dict[str, torch.Tensor]) -> str:
    """The Hub id whose configuration diffusers gives a checkpoint in one file. diffusers has it as a function of its
    own loader only; `from_single_file` reads the file first, and there names no id where it is offline."""
    return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])
