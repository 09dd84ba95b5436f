"""The reference of preference guidance: the pipeline's denoiser with its LoRA off or with another LoRA, or another
denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ...models.adapters import adapter_layers, lora_configs, unwrap_peft_model
from ...models.reference import architecture_difference
from ...models.weight_copies import using_adapter
from ...utils.errors import UserError


def reference_of(denoiser: nn.Module, reference: nn.Module | str | None) -> Callable[[dict[str, Any]], Any]:
    """Return a function that runs the reference on a denoiser's inputs and returns its output.

    Args:
        denoiser (`nn.Module`): The pipeline's denoiser.
        reference (`nn.Module` or `str`, *optional*): See [`preference_guidance`].

    Raises:
        `ValueError`: If the denoiser cannot have this reference.
    """
    if isinstance(reference, nn.Module):
        _check_denoiser(denoiser, reference)
        return lambda inputs: reference(**inputs)
    if reference is not None and not isinstance(reference, str):
        raise UserError(
            "`reference` must be None (the LoRA switched off), the name of an adapter, or a denoiser. Got a "
            f"{type(reference).__name__}. To use a pipeline's denoiser, pass the pipeline's `unet` or `transformer`."
        )
    layers: list[Any] = adapter_layers(denoiser)
    _check_adapters(denoiser, layers, reference)

    def refer(inputs: dict[str, Any]) -> Any:
        with using_adapter(layers, reference):
            return denoiser(**inputs)

    return refer


def _plain(denoiser: nn.Module) -> nn.Module:
    """Return a denoiser without the wrappers of torch.compile and PEFT."""
    return unwrap_peft_model(unwrap_module(denoiser))


def _check_adapters(denoiser: nn.Module, layers: list[Any], name: str | None) -> None:
    acting = sorted({active for layer in layers if not layer.disable_adapters for active in layer.active_adapters})
    loaded = sorted(lora_configs(_plain(denoiser))) if layers else []
    if name is not None and name not in loaded:
        raise UserError(
            f"`reference` must name a loaded adapter of the denoiser ({', '.join(loaded) or 'none is loaded'}). Got "
            f"{name!r}. Load it first: `pipeline.load_lora_weights(..., adapter_name={name!r})`."
        )
    if name is None and not acting:
        raise UserError(
            "Without `reference`, the reference is the denoiser with its LoRA switched off, so one must be active. No "
            f"LoRA is active (loaded: {', '.join(loaded) or 'none'}). Load or activate one with `load_lora_weights`, "
            "`set_adapters` or `enable_lora`. If the LoRA is merged or all weights were tuned, pass the base model's "
            "denoiser as `reference`."
        )
    if any(layer.merged for layer in layers):
        raise UserError(
            "The LoRA must be switched off for the reference, but it is merged into the weights. Call `unfuse_lora()` "
            "first."
        )
    if acting == [name]:
        raise UserError(
            f"`reference` must differ from the active adapter, got {name!r} for both. Activate the tuned adapter with "
            "`set_adapters`."
        )


def _check_denoiser(denoiser: nn.Module, reference: nn.Module) -> None:
    policy = _plain(denoiser)
    other = _plain(reference)
    if policy is other:
        raise UserError(
            "`reference` must not be the pipeline's denoiser itself. Leave it out to use the denoiser with its LoRA "
            "switched off."
        )
    difference = architecture_difference(policy, other)
    if difference is not None:
        raise UserError(
            f"`reference` must have the architecture of the pipeline's denoiser. They differ: {difference}. Use the "
            "denoiser from which training started."
        )
    ours, theirs = (next(iter(module.parameters())).dtype for module in (policy, other))
    if ours != theirs:
        raise UserError(
            f"`reference` must have the dtype of the pipeline's denoiser, {ours}. Got {theirs}. Load it with "
            f"`dtype={ours}`."
        )
