"""LoRA on a denoiser: put on, found again, switched, written and read."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
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
from peft.tuners.tuners_utils import BaseTunerLayer, set_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from .._compat import LORA_ADAPTER_METADATA_KEY, loads_lora
from ..artifacts.lora_scale import folded, public_settings

PEFT_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
POLICY_ADAPTER = "default"
REFERENCE_ADAPTER = "ref"
ZERO_STARTS = (True, "gaussian")  # of `init_lora_weights`: the LoRA begins as nothing, and the base stays as it is


def unwrap_peft_model(model: nn.Module) -> nn.Module:
    """The denoiser within a [`~peft.PeftModel`], its adapters in place; any other module as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    """The layers that carry adapters."""
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def adapter_parts(denoiser: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The modules that adapters of these names consist of, such as the two linear layers of a LoRA."""
    holders = [getattr(layer, kind) for layer in adapter_layers(denoiser) for kind in layer.adapter_layer_names]
    return [
        holder[name] for holder in holders if isinstance(holder, nn.ModuleDict) for name in names if name in holder
    ]


def base_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A denoiser's own tensors under their own names, whatever adapters it carries."""
    adapted = {name for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    tensors = {}
    for name, tensor in module.state_dict().items():
        owner = name.rsplit(".", 1)[0]
        if ".base_layer." in name:
            tensors[name.replace(".base_layer.", ".")] = tensor
        elif not any(owner == layer or owner.startswith(layer + ".") for layer in adapted):
            tensors[name] = tensor
    return tensors


def active_adapter(denoiser: nn.Module) -> str | None:
    """Name of the one adapter that acts in the denoiser; `None` if it has none.

    Raises:
        `ValueError`: If several act at once, or one that is no LoRA.
    """
    layers = adapter_layers(denoiser)
    names = sorted({name for layer in layers for name in layer.active_adapters})
    if len(names) > 1:
        raise ValueError(f"One adapter can be trained, got {len(names)} active ones: {', '.join(names)}. Choose one.")
    if not names:
        return None
    _check_lora(denoiser.peft_config[names[0]])
    return names[0]


def check_adapter_weight(denoiser: nn.Module, name: str) -> None:
    """Raise `ValueError` where an adapter acts with a weight that a saved LoRA cannot hold."""
    rank_stabilised = denoiser.peft_config[name].use_rslora
    for layer in adapter_layers(denoiser):
        if name not in layer.scaling:
            continue
        own = layer.lora_alpha[name] / (layer.r[name] ** 0.5 if rank_stabilised else layer.r[name])
        if not math.isclose(layer.scaling[name], own):
            raise ValueError(
                f"The adapter {name!r} must act with weight 1, got {layer.scaling[name] / own:g}, which a saved LoRA "
                f"cannot hold. Call `set_adapters([{name!r}], [1.0])` first."
            )
        if layer.disable_adapters:
            raise ValueError(f"The adapter {name!r} must act, but adapters are off. Call `enable_adapters()` first.")


def add_lora(denoiser: nn.Module, peft_config: PeftConfig, default_targets: tuple[str, ...], seed: int) -> str:
    """Put a fresh LoRA on a frozen denoiser, in float32 whatever the base is held in.

    Args:
        denoiser (`nn.Module`): Without adapters.
        peft_config ([`~peft.LoraConfig`]): Its `target_modules` may be `None`; left as it is, a copy is used.
        default_targets (`tuple[str, ...]`): What the family's own scripts train.
        seed (`int`): Of the LoRA's random half, the same in all processes.

    Returns:
        `str`: The adapter's name.

    Raises:
        `ValueError`: If the denoiser has an adapter already, the configuration is no LoRA, or its targets match
            nothing.
    """
    if active_adapter(denoiser) is not None:
        raise ValueError(
            "`peft_config` adds a LoRA to a model without one, but the model already has the adapter "
            f"{active_adapter(denoiser)!r}. Leave `peft_config` out to go on training it, or fuse it first."
        )
    _check_lora(peft_config)
    if peft_config.init_lora_weights not in ZERO_STARTS:
        raise ValueError(
            f"`init_lora_weights` must be True or 'gaussian', got {peft_config.init_lora_weights!r}: with another "
            "start the base without its LoRA is not the policy before training. Use True."
        )
    config = copy.deepcopy(peft_config)
    config.task_type = None  # a task's head belongs to language models
    if config.target_modules is None:
        config.target_modules = list(default_targets)
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(denoiser, PeftAdapterMixin):
            denoiser.add_adapter(config, adapter_name=POLICY_ADAPTER)
        else:  # transformers of models for which diffusers has no LoRA; PEFT does not mind
            inject_adapter_in_model(config, denoiser, POLICY_ADAPTER)
    cast_training_params(denoiser, dtype=torch.float32)
    return POLICY_ADAPTER


def train_only_adapter(denoiser: nn.Module, name: str) -> None:
    """Freeze all but one adapter, which is held in float32."""
    denoiser.requires_grad_(False)
    set_adapter(denoiser, name)
    cast_training_params(denoiser, dtype=torch.float32)


def copy_adapter(denoiser: nn.Module, source: str, target: str) -> None:
    """Add an adapter with the same weights under another name, frozen; `source` stays the active one."""
    config = copy.deepcopy(denoiser.peft_config[source])
    inject_adapter_in_model(config, denoiser, target)
    set_peft_model_state_dict(denoiser, adapter_state(denoiser, source), adapter_name=target)
    train_only_adapter(denoiser, source)
    cast_adapter_like(denoiser, source, target)


def cast_adapter_like(denoiser: nn.Module, source: str, target: str) -> None:
    """Hold `target` in the dtype of `source`, so that both take the same arithmetic."""
    for layer in adapter_layers(denoiser):
        for layer_name in layer.adapter_layer_names:
            modules = getattr(layer, layer_name)
            if source in modules and isinstance(modules[source], nn.Module):
                modules[target].to(dtype=next(modules[source].parameters()).dtype)


@contextlib.contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Run the base model alone, then give the active adapter back."""
    layers = adapter_layers(denoiser)
    with _trained_kept(denoiser):
        for layer in layers:
            layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextlib.contextmanager
def adapter_on(denoiser: nn.Module, name: str, back: str) -> Iterator[None]:
    """Run under the frozen adapter `name`, then train `back` again."""
    with _trained_kept(denoiser):
        set_adapter(denoiser, name, inference_mode=True)
    try:
        yield
    finally:
        set_adapter(denoiser, back)


@contextlib.contextmanager
def _trained_kept(denoiser: nn.Module) -> Iterator[None]:
    """Leave marked as trained what is, though PEFT freezes adapters that it switches off: FSDP2 settles for good, in
    the first forward pass, in which precision it keeps the gradients of what is trained."""
    trained = [weight for weight in denoiser.parameters() if weight.requires_grad]
    yield
    for weight in trained:
        weight.requires_grad_(True)


def adapter_state(denoiser: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """An adapter's own parameters under their PEFT names, without the adapter's name in them."""
    state = denoiser.state_dict(keep_vars=True)  # parameters, not copies: an engine may hold a part of each only
    return get_peft_model_state_dict(denoiser, state_dict=state, adapter_name=name)


def save_adapter(
    weights: dict[str, torch.Tensor],
    config: LoraConfig,
    pipeline_class: type[DiffusionPipeline],
    denoiser_name: str,
    folder: Path,
) -> None:
    """Write an adapter's weights for both `pipeline.load_lora_weights`, where the pipeline has it, and
    [`~peft.PeftModel.from_pretrained`].

    PEFT's file has the weights as they train, and their scale beside them. In the other file the scale is multiplied
    into the weights: tools that know neither diffusers' metadata nor PEFT's configuration take it for 1. The PEFT names
    are kept as they are: the renaming of older diffusers formats knows attention layers only and would drop the rest.
    """
    weights = {key: value.detach().contiguous().cpu() for key, value in weights.items()}
    if loads_lora(pipeline_class):
        scaled, plain = folded(weights, config)
        settings = {f"{denoiser_name}.{name}": value for name, value in public_settings(plain).items()}

        def write(tensors: dict[str, torch.Tensor], file: str) -> None:
            # One entry: safetensors writes several in a random order, and equal files would be uploaded again.
            save_file(tensors, file, {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)})

        layers = {f"{denoiser_name}_lora_layers": scaled}
        pipeline_class.save_lora_weights(folder, **layers, save_function=write)
    save_file({PEFT_PREFIX + key: value for key, value in weights.items()}, folder / PEFT_FILE, {"format": "pt"})
    text = json.dumps(public_settings(config), indent=2, sort_keys=True)
    (folder / PEFT_CONFIG_FILE).write_text(text, encoding="utf-8")


def read_adapter(shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, torch.Tensor]:
    """Read what [`save_adapter`] wrote for an adapter with tensors of these shapes.

    Raises:
        `ValueError`: If the file is missing or its tensors are not the adapter's.
    """
    file = folder / PEFT_FILE
    if not file.is_file():
        raise ValueError(f"A LoRA checkpoint must hold {PEFT_FILE}; {folder} does not. Was it tuned in full?")
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}
    stored = {key: tuple(value.shape) for key, value in state.items()}
    if shapes != stored:
        differing = sorted(set(shapes.items()) ^ set(stored.items()))[:4]
        raise ValueError(
            f"{file} holds a LoRA of another set-up: {len(stored)} tensors for {len(shapes)}, such as {differing}. "
            "Resume with the `peft_config` of the run that wrote it."
        )
    return state


def _check_lora(config: PeftConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"`peft_config` must be a `peft.LoraConfig`, got {type(config).__name__}.")
    if config.modules_to_save:
        raise ValueError(
            f"`modules_to_save={config.modules_to_save}` cannot be stored in a file that `load_lora_weights` reads. "
            "Target these modules with LoRA, or tune in full."
        )
    if config.bias != "none":
        raise ValueError(f"`bias` of the LoRA must be 'none', got {config.bias!r}: a LoRA file holds no biases.")
