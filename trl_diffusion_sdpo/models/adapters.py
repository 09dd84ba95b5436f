"""Add, find, copy and check the LoRA of a denoiser."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, set_adapter
from torch import nn

from ..utils.errors import UserError

if TYPE_CHECKING:
    from trl import ModelConfig

logger = logging.getLogger(__name__)

POLICY_ADAPTER = "default"
TEXT_ENCODERS_ARE_FROZEN = "Text encoders cannot be trained, only the denoiser."
_OF_TEXT = re.compile(r"text_encoder|text_model|(lora_)?te[123]?_")
# Settings of a LoRA that PEFT matches as regular expressions, and the strings that match quickly: names of modules,
# also with one `.*`, or with the `^` that diffusers puts before those in `rank_pattern`.
_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
)
NAME = re.compile(r"\^?[\w.-]+(\*[\w.-]*)?")
# Values of `init_lora_weights` with which a new LoRA does not change the model's output.
ZERO_STARTS = (True, "gaussian")


def lora_config(model_args: ModelConfig) -> LoraConfig | None:
    """Return the LoRA that TRL's options describe, or `None` without `use_peft`.

    A single name in `lora_target_modules` stays a name. TRL makes it a regular expression for whole paths, which no
    module would match.
    """
    from trl import get_peft_config  # imported late because it takes seconds

    config: Any = get_peft_config(model_args)
    if (
        config is not None
        and isinstance(config.target_modules, str)
        and re.fullmatch(r"[\w.]+", config.target_modules)
    ):
        config.target_modules = {config.target_modules}
    return config


def unwrap_peft_model(model: nn.Module) -> nn.Module:
    """Return the denoiser inside a [`~peft.PeftModel`], with its adapters, or another module unchanged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers of a denoiser that have adapters, as PEFT layers."""
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def lora_configs(denoiser: nn.Module) -> dict[str, LoraConfig]:
    """Return the configuration of each adapter of a denoiser, by the adapter's name."""
    configs: Any = denoiser.peft_config
    return configs


def adapter_parts(denoiser: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Return the modules of the named adapters, such as the two linear layers of a LoRA."""
    parts = [getattr(layer, kind) for layer in adapter_layers(denoiser) for kind in layer.adapter_layer_names]
    return [part[name] for part in parts if isinstance(part, nn.ModuleDict) for name in names if name in part]


def base_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights and buffers of a denoiser without its adapters', under the names of a denoiser without
    adapters."""
    adapted = {name for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    tensors = {}
    for name, tensor in module.state_dict().items():
        owner = name.rsplit(".", 1)[0]
        if ".base_layer." in name:
            tensors[name.replace(".base_layer.", ".")] = tensor
        elif not any(owner == layer or owner.startswith(layer + ".") for layer in adapted):
            tensors[name] = tensor
    return tensors


def active_adapter(denoiser: Any) -> str | None:
    """Return the name of the active adapter, or `None` if the denoiser has none.

    Raises:
        `ValueError`: If several adapters are active, or the active adapter is not a LoRA.
    """
    layers = adapter_layers(denoiser)
    names = sorted({name for layer in layers for name in layer.active_adapters})
    if len(names) > 1:
        raise UserError(
            f"Only one adapter can be trained. Got {len(names)} active adapters: {', '.join(names)}. Activate only one."
        )
    if not names:
        return None
    _check_lora(lora_configs(denoiser)[names[0]])
    return names[0]


def check_adapter_weight(denoiser: Any, name: str) -> None:
    """Raise `ValueError` if the adapter `name` is switched off, or has another weight than 1, which a LoRA file cannot
    store."""
    rank_stabilized = lora_configs(denoiser)[name].use_rslora
    for layer in adapter_layers(denoiser):
        if not isinstance(layer, LoraLayer) or name not in layer.scaling:
            continue
        scaling = lora_scaling(layer.lora_alpha[name], layer.r[name], rank_stabilized=rank_stabilized)
        if not math.isclose(layer.scaling[name], scaling):
            raise UserError(
                f"The adapter {name!r} must have weight 1, got {layer.scaling[name] / scaling:g}. A LoRA file cannot "
                f"store another weight. Call `set_adapters([{name!r}], [1.0])` first."
            )
        if layer.disable_adapters:
            raise UserError(
                f"The adapter {name!r} must be switched on to train. Got a model whose adapters are off. Call "
                "`enable_adapters()` first."
            )


def add_lora(denoiser: nn.Module, peft_config: PeftConfig, default_targets: tuple[str, ...], seed: int) -> str:
    """Add a LoRA in float32 to a denoiser, and freeze the denoiser's own weights, which may have any dtype.

    Args:
        denoiser (`nn.Module`): Denoiser without adapters.
        peft_config ([`~peft.LoraConfig`]): Configuration of the LoRA; `target_modules` may be `None`. It is copied, not
            changed.
        default_targets (`tuple[str, ...]`): `target_modules` to use if the configuration has none.
        seed (`int`): Seed of the random initialization, equal in all processes.

    Returns:
        `str`: The adapter's name.

    Raises:
        `ValueError`: If the denoiser already has an adapter, or the configuration is not of a supported LoRA, or its
            `target_modules` match nothing or a text encoder.
    """
    if active_adapter(denoiser) is not None:
        raise UserError(
            "`peft_config` adds a LoRA to a model without one, but the model already has the adapter "
            f"{active_adapter(denoiser)!r}. Leave `peft_config` out to train it further, or fuse it into the model "
            "first."
        )
    config = copy.deepcopy(_check_lora(peft_config))
    if config.init_lora_weights not in ZERO_STARTS:
        raise UserError(
            f"`init_lora_weights` must be True or 'gaussian', got {config.init_lora_weights!r}. The reference is the "
            "model without its LoRA, so a new LoRA must not yet change the model's output. Use True."
        )
    config.task_type = None  # `task_type` is for language models
    if config.target_modules is None:
        config.target_modules = list(default_targets)
    else:
        _check_targets(denoiser, config.target_modules)
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(denoiser, PeftAdapterMixin):
            denoiser.add_adapter(config, adapter_name=POLICY_ADAPTER)
        else:  # a denoiser class for which diffusers has no LoRA loader
            inject_adapter_in_model(config, denoiser, POLICY_ADAPTER)
    cast_training_params(denoiser, dtype=torch.float32)
    return POLICY_ADAPTER


def train_only_adapter(denoiser: nn.Module, name: str) -> None:
    """Freeze all weights of a denoiser except those of the adapter `name`, and cast it to float32."""
    denoiser.requires_grad_(False)
    set_adapter(denoiser, name)
    cast_training_params(denoiser, dtype=torch.float32)


def copy_adapter(denoiser: Any, source: str, target: str) -> None:
    """Add a frozen copy of the adapter `source` under the name `target`. `source` stays active."""
    config = copy.deepcopy(lora_configs(denoiser)[source])
    inject_adapter_in_model(config, denoiser, target)
    state = adapter_state(denoiser, source)
    if not any(weight.is_meta for weight in state.values()):  # weights on the meta device have no values
        set_peft_model_state_dict(denoiser, state, adapter_name=target)
    train_only_adapter(denoiser, source)
    cast_adapter_like(denoiser, source, target)


def cast_adapter_like(denoiser: nn.Module, source: str, target: str) -> None:
    """Cast the adapter `target` to the dtypes of `source`, so that the two round equally."""
    for layer in adapter_layers(denoiser):
        for layer_name in layer.adapter_layer_names:
            modules = getattr(layer, layer_name)
            if source in modules and isinstance(modules[source], nn.Module):
                modules[target].to(dtype=next(modules[source].parameters()).dtype)


def adapter_state(denoiser: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Return an adapter's parameters by their PEFT names, which do not contain the adapter's name."""
    state = denoiser.state_dict(keep_vars=True)  # parameters, not copies: an engine may have sharded them
    return get_peft_model_state_dict(denoiser, state_dict=state, adapter_name=name)


def adapter_scalings(denoiser: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Return the factor by which each layer multiplies the product of the two matrices of the LoRA `name`."""
    layers = {path: layer for path, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    return {
        f"{path}.scaling": torch.tensor(layer.scaling[name]) for path, layer in layers.items() if name in layer.scaling
    }


def _check_lora(config: PeftConfig) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"`peft_config` must be a `peft.LoraConfig`, got {type(config).__name__}. Diffusers' `load_lora_weights` "
            "cannot read LoHa, LoKr (LyCORIS) or other adapters. Use a `LoraConfig`. If a LoRA is not expressive "
            "enough, increase `r` or set `use_dora=True`."
        )
    if config.modules_to_save:
        raise UserError(
            f"`modules_to_save={config.modules_to_save}` cannot be stored in a file that `load_lora_weights` reads. "
            "List these modules in `target_modules` instead, or train without `peft_config` (full tuning)."
        )
    if config.bias != "none":
        raise UserError(f"`bias` of the LoRA must be 'none', got {config.bias!r}. A LoRA file cannot store biases.")
    return config


def check_stored_lora(
    settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file: str | os.PathLike
) -> None:
    """Check the settings in a LoRA's file, which may come from a stranger, before PEFT uses them.

    Args:
        settings (`Mapping[str, Any]`): Settings of a [`~peft.LoraConfig`].
        shapes (`Mapping`): Shapes of the LoRA's tensors. No rank can be higher than the largest dimension.
        file (`str` or `os.PathLike`): File of the settings, for the error message.

    Raises:
        `ValueError`: If there are no tensors, or the settings name code to import, contain a regular expression, or
            have an impossible rank or alpha.
    """
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if not largest:
        raise UserError(f"A LoRA must have tensors, and that of {file} has none. Copy the file again.")
    if settings.get("megatron_config") is not None or settings.get("megatron_core") not in (None, "megatron.core"):
        raise UserError(
            f"The settings of a LoRA must not name code to import, and {file} has the `megatron_core` "
            f"{settings.get('megatron_core')!r}. Remove `megatron_core` and `megatron_config` from it."
        )
    for name in _PATTERNS:
        value = settings.get(name) or ()
        for pattern in [value] if isinstance(value, str) else value:
            if not isinstance(pattern, str) or not NAME.fullmatch(pattern):
                raise UserError(
                    f"`{name}` in a LoRA's file must list names of modules, with at most one `*`. Other regular "
                    f"expressions are not read from files, because matching some of them takes forever. {file} has "
                    f"{pattern!r}. Replace it by names."
                )
    for rank in (settings.get("r", 1), *(settings.get("rank_pattern") or {}).values()):
        if type(rank) is not int or not 0 < rank <= largest:
            raise UserError(
                f"A LoRA's rank must be a whole number from 1 to the largest dimension of its tensors, {largest}. "
                f"{file} has {rank!r}. Copy the file again, or use another LoRA."
            )
    for alpha in (settings.get("lora_alpha", 1), *(settings.get("alpha_pattern") or {}).values()):
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UserError(
                f"A LoRA's alpha must be a finite number, and {file} has {alpha!r}. Copy the file again, or use "
                "another LoRA."
            )


def _check_targets(denoiser: nn.Module, targets: str | Iterable[str]) -> None:
    """Raise `ValueError` if no target of a LoRA is a layer of the denoiser, or some are layers of a text encoder. Log a
    warning if others are no layers of the denoiser."""
    names = [name for name, _ in denoiser.named_modules()]
    if isinstance(targets, str):  # a regular expression
        listed = [targets]
        is_there = targets.lower() == "all-linear" or any(re.fullmatch(targets, name) for name in names)
        missing = [] if is_there else listed
    else:
        listed = sorted(targets)
        missing = [target for target in listed if not any(f".{name}".endswith(f".{target}") for name in names)]
    if not missing:
        return
    rule = (
        f"`target_modules` of the LoRA must be layers of the denoiser, a {type(denoiser).__name__}, which has no "
        f"{', '.join(missing)}."
    )
    if any(map(_OF_TEXT.match, missing)):
        raise UserError(f"{rule} {TEXT_ENCODERS_ARE_FROZEN} Leave the layers of text encoders out.")
    if len(missing) == len(listed):
        raise UserError(f"{rule} Correct the names, or leave `target_modules` out for those of the model family.")
    logger.warning("%s The LoRA is added to the others.", rule)


def freeze(name: str, component: nn.Module) -> None:
    """Freeze a component of a pipeline and put it into evaluation mode. Raise `ValueError` if it has an adapter with
    trainable weights."""
    parts = [getattr(layer, kind) for layer in adapter_layers(component) for kind in layer.adapter_layer_names]
    if any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        raise UserError(
            f"`{name}` must not have an adapter with trainable weights. {TEXT_ENCODERS_ARE_FROZEN} Merge or remove "
            "the adapter, or freeze it with `requires_grad_(False)`."
        )
    component.requires_grad_(False).eval()


def lora_scaling(alpha: float, rank: int, *, rank_stabilized: bool) -> float:
    """Return PEFT's scaling factor of a LoRA: alpha divided by the rank, or by the rank's square root (rsLoRA)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)
