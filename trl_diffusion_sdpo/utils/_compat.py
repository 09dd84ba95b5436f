"""All private names of other libraries that this package uses, and why. One can go when its library offers a public
name, unless its comment says otherwise."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin

# `LoraBaseMixin`: base class of all pipelines with `load_lora_weights` and `save_lora_weights`.
# `LORA_ADAPTER_METADATA_KEY`: key of a LoRA's settings in the metadata of its file.
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin

# Load checkpoints that are a single file.
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config

# Knows the attention back end that diffusers uses for models whose back end is not set.
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

# A lost connection to the Hub raises an error of httpx or httpx2, by the version of huggingface_hub. `HTTPError` is
# their common base class.
from huggingface_hub.errors import HTTPError as HubConnectionError

# Finds a repository's folder in the local cache. `scan_cache_dir`, which is public, reads the whole cache.
from huggingface_hub.file_download import repo_folder_name
from packaging.version import Version

# Finds the key of a LoRA's `rank_pattern` or `alpha_pattern` that matches a module.
from peft.utils.other import get_pattern_key as pattern_key
from PIL import Image

# Tensors without data, and a hook that sees every operation on them, with which `plan` computes a run's memory. There
# is nothing public for either.
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments

# Callbacks of the trackers that accept images. Their names are public, but `transformers.integrations` also contains
# DeepSpeed and FSDP, and only the package `engines` may import those.
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

# Lets `torch.load(weights_only=True)` read numpy's random states in a checkpoint.
from transformers.trainer_pt_utils import safe_globals as numpy_safe_globals

from .errors import UserError

# transformers 5.23 renamed these arguments. The old names can go when no supported transformers has them.
_RENAMED = "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"

__all__ = [  # re-exported
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensorMode",
    "HubConnectionError",
    "LORA_ADAPTER_METADATA_KEY",
    "SingleFileComponentError",
    "TensorBoardCallback",
    "TorchDispatchMode",
    "TrackioCallback",
    "WandbCallback",
    "numpy_safe_globals",
    "pattern_key",
    "repo_folder_name",
    "tree_leaves",
]

# The supported versions of transformers, as in pyproject.toml. `make test-all PART=newest` tests versions above them.
TRANSFORMERS = ">=5.14.1,<5.25"

# Private methods and attributes of transformers' Trainer that `DiffusionSDPOTrainer` overrides or uses, and what for.
# There are no public hooks for them. If transformers renamed a method, its override would silently never be called.
TRAINER_NAMES = {
    # Overridden:
    "_finalize_training": "evaluates and checks weights after the last step, before the best weights are loaded",
    "_get_grad_norm": "makes the norm whole under FSDP2, and sees a first gradient that is zero",
    "_load_best_model": "reads the weights in our files, and their average",
    "_load_from_checkpoint": "reads the weights in our files, and all other states",
    "_load_rng_state": "refuses pickles that run code, and is the last call before a resumed run's first step",
    "_prepare_for_training": "prepares the reference and the average with the policy, before a checkpoint is read",
    "_prepare_inputs": "moves a batch to the device without rounding it, as transformers does under DeepSpeed",
    "_run_epoch": "starts at the position in a stream, and takes no step in a run that is complete",
    "_save_checkpoint": "writes into a temporary folder, which is renamed when it is complete",
    "_save_optimizer_and_scheduler": "leaves out frozen weights under DeepSpeed and FSDP2",
    # Called or read:
    "_load_optimizer_and_scheduler": "reads the optimizer's state after engine, reference and average are ready",
    "_load_scaler": "reads the loss scaler's state at the same time",
    "_maybe_log_save_evaluate": "makes up for an evaluation that an interrupt has cancelled",
    "_train_batch_size": "is the batch size that `auto_find_batch_size` has found",
}


class UnsupportedVersionError(ImportError, UserError):
    """An installed library lacks what this package needs."""


def check_trainer(trainer: type) -> None:
    """Raise an `UnsupportedVersionError` if `trainer`, transformers' Trainer, lacks one of the [`TRAINER_NAMES`]."""
    set_by_constructor = inspect.unwrap(vars(trainer)["__init__"]).__code__.co_names
    missing = [name for name in TRAINER_NAMES if name not in (*dir(trainer), *set_by_constructor)]
    if missing:
        raise UnsupportedVersionError(
            f"`DiffusionSDPOTrainer` extends private parts of transformers' Trainer, and in transformers "
            f"{transformers.__version__} there is no {', '.join(missing)}. Install a supported version: "
            f"pip install 'transformers{TRANSFORMERS}'"
        )


# Attributes of PEFT's layers: whether their adapters are off, and the names of the active adapters. PEFT's
# `enable_adapters` and `set_adapter` also change `requires_grad` of every weight, which is slow in models with hundreds
# of layers and misleads FSDP2: it reads `requires_grad` only in the first forward pass, to choose the precision of
# gradients.
ADAPTERS_OFF = "_disable_adapters"
ACTIVE_ADAPTER = "_active_adapter"


def block_names(denoiser: ModelMixin) -> list[str]:
    """Return the class names of a diffusers model's blocks, which FSDP wraps as units. accelerate reads only the
    outermost module's."""
    return list(denoiser._no_split_modules or ())


def activation_checkpointing(args: TrainingArguments) -> tuple[bool, dict[str, Any]]:
    """Return whether activation checkpointing is on, and its arguments."""
    return bool(getattr(args, CHECKPOINTING)), getattr(args, f"{CHECKPOINTING}_kwargs") or {}


def checkpoints_activations(denoiser: ModelMixin) -> bool:
    """Return whether a diffusers model supports activation checkpointing."""
    return denoiser._supports_gradient_checkpointing


def repeated_blocks(denoiser: ModelMixin) -> list[str]:
    """Return the class names of the blocks that `compile_repeated_blocks` compiles."""
    return list(denoiser._repeated_blocks or ())


def attention_backends(denoiser: torch.nn.Module) -> list[str]:
    """Return the names of the attention back ends that a denoiser uses, usually one, or none for older models, whose
    attention calls PyTorch directly."""
    active, _ = _AttentionBackendRegistry.get_active_backend()
    processors: list[Any] = [vars(module).get("processor") for module in denoiser.modules()]
    chosen = {each._attention_backend for each in processors if "_attention_backend" in dir(each)}
    return sorted((active if backend is None else backend).value for backend in chosen)


def loads_lora(pipeline_class: type[DiffusionPipeline]) -> bool:
    """Return whether a pipeline has `load_lora_weights` and `save_lora_weights`."""
    return issubclass(pipeline_class, LoraBaseMixin)


def longcat_prompt_embeds(pipeline: DiffusionPipeline, parts: Any, *inputs: Any) -> torch.Tensor:
    """Return prompts as LongCat's pipelines encode them, with the components and the device of `parts`. Their public
    `encode_prompt` uses the device of the pipeline's first component, which may not be that of the text encoder."""
    return type(pipeline)._encode_prompt(parts, *inputs)


def resized_to_area(processor: Any, image: Image.Image, area: int) -> Image.Image:
    """Return an image resized to about `area` pixels, as FLUX.2's pipelines do with source images in their call."""
    return processor._resize_to_target_area(image, area)


def dictionary_settings(*names: str) -> list[str]:
    """Return the settings that a command line may give as JSON: those of transformers, and `names`."""
    return [*TrainingArguments._VALID_DICT_FIELDS, *names]


def forward_pre_hooks(module: torch.nn.Module) -> list[Any]:
    """Return the forward pre-hooks of a module, so that none is registered twice."""
    return list(module._forward_pre_hooks.values())


@contextlib.contextmanager
def hooked(
    module: torch.nn.Module,
    before: Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]],
    after: Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any], Any],
) -> Iterator[None]:
    """Within the context, run a forward pre-hook and a forward hook with every call of a module.

    PyTorch would compile registered hooks together with a module that was compiled in place (`module.compile()`), and
    with `fullgraph=True` stop at the first one that reads a value. These run around the compiled call.
    """
    compiled = module._compiled_call_impl
    if compiled is None:
        with (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ):
            yield
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = before(module, args, kwargs)
        return after(module, args, kwargs, compiled(*args, **kwargs))

    module._compiled_call_impl = call
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def start_method(args: TrainingArguments) -> str | None:
    """Return the start method of DataLoader workers, an argument of `TrainingArguments` that transformers 5.14 lacks.
    Remove this function when no supported transformers does."""
    return getattr(args, "dataloader_multiprocessing_context", None)


def keeps_order(args: TrainingArguments) -> bool:
    """Return the DataLoader's argument `in_order`. Remove it together with [`start_method`]."""
    return getattr(args, "dataloader_in_order", True)


def dataset_fingerprint(dataset: datasets.Dataset) -> str:
    """Return the hash from which `datasets` builds the names of a data set's cache files."""
    return dataset._fingerprint


def is_split_by_node(stream: datasets.IterableDataset) -> bool:
    """Return whether `datasets.distributed.split_dataset_by_node` has split a stream over the processes."""
    return stream._distributed is not None


def stream_parts(stream: datasets.IterableDataset) -> list[Any]:
    """Return what a stream reads: names of files, and data sets in memory, from arguments of the innermost iterables,
    which have no public name. Other sources, such as generators, have no parts."""
    parts: list[Any] = []
    iterables = [stream._ex_iterable]
    while iterables:
        arguments = vars(iterables.pop())
        iterables += [arguments["ex_iterable"]] if "ex_iterable" in arguments else arguments.get("ex_iterables", [])
        lists = [value for value in arguments.get("kwargs", {}).values() if isinstance(value, list)]
        parts += [part for value in lists for part in value if isinstance(part, str | datasets.Dataset)]
    return parts


def compile_with_eager_rounding() -> None:
    """Make inductor round where eager PyTorch rounds, in the whole process.

    Fused kernels do not round intermediate values to bf16, and the policy's fuse other operations than the
    reference's. Under bf16, their predictions would differ before the first step.
    """
    from torch._inductor import config  # takes seconds

    config.emulate_precision_casts = True


# Under ZeRO-1 and 2, DeepSpeed's public functions return full gradients, not shards, so the next two functions read a
# private dictionary of its optimizer. They can go when `deepspeed.utils.safe_get_local_grad` supports ZeRO-1 and 2.


def keeps_zero_gradients(optimizer: Any) -> bool:
    """Return whether an optimizer is DeepSpeed's for ZeRO-1 and 2, which `zero_gradients` needs."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return isinstance(optimizer, DeepSpeedZeroOptimizer)


def zero_gradients(optimizer: Any) -> dict[int, list[torch.Tensor] | None]:
    """Return this process's shard of the averaged gradients: a list of tensors for each parameter group."""
    return optimizer.averaged_gradients


def float32_precision() -> dict[str, str]:
    """Return the precision in which torch computes float32 networks, such as `{"matmul": "tf32", ...}`. torch below 2.9
    has other names for it. Remove this function when no supported torch is below 2.9."""
    backends: Any = torch.backends
    if Version(torch.__version__) < Version("2.9"):
        return {"matmul": torch.get_float32_matmul_precision(), "convolution": str(backends.cudnn.allow_tf32)}
    kinds = {"matmul": backends.cuda.matmul, "convolution": backends.cudnn.conv, "cpu": backends.mkldnn.matmul}
    return {kind: backend.fp32_precision.replace("none", "ieee") for kind, backend in kinds.items()}


def set_last_rates(schedule: Any, rates: list[Any]) -> None:
    """Set the learning rates that a schedule's `get_last_lr` returns, which loading a checkpoint has overwritten."""
    if "_last_lr" in vars(schedule):
        schedule._last_lr = rates


@contextlib.contextmanager
def autocast_rules(rules: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Add rules to the CPU's autocast within the context, by the names of `aten` operations. A rule is called outside
    autocast with the operation and its arguments. torch has no public way to remove kernels or to leave autocast."""
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
    """Return the Hub id of the configuration that diffusers uses for a single-file checkpoint, for error messages: the
    one that `from_single_file` raises offline does not name it."""
    return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])
