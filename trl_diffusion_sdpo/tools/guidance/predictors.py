"""Compute the predictions of policy and reference, in two forward passes or in one batch.

The reference is the pipeline's denoiser with its LoRA switched off, the same denoiser with another LoRA, or another
denoiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ...models.adapters import adapter_layers, lora_configs, unwrap_peft_model
from ...models.reference import architecture_difference
from ...models.weight_copies import using_adapter
from .denoiser_call import DenoiserCall, prediction_in, without_lora_scale

BASE = "__base__"  # PEFT's name for the model without adapters in a mixed batch

Predictions = tuple[torch.Tensor | None, torch.Tensor | None, Any]


class Predictor(ABC):
    """Computes the predictions of policy and reference for rows of a denoiser call."""

    @abstractmethod
    def predict(
        self, denoiser: Callable[..., Any], call: DenoiserCall, policy: slice | None, reference: slice | None
    ) -> Predictions:
        """Return the policy's prediction, the reference's prediction, and one complete output of a denoiser. In this
        output, the caller replaces the prediction by the combined prediction.

        Args:
            denoiser (`Callable`): The unguided denoiser.
            call (`DenoiserCall`): Arguments with which the pipeline called the denoiser.
            policy, reference (`slice`, *optional*): Rows of the batch that policy and reference predict. If a slice is
                `None`, this model does not predict, and `None` is returned as its prediction.
        """

    def close(self) -> None:
        """Remove all hooks that this object has added to the denoiser."""
        return None


class TwoPasses(Predictor):
    """Predicts with the reference, and then with the policy.

    If the policy predicts all rows, it gets the pipeline's arguments unchanged.
    """

    def predict(
        self, denoiser: Callable[..., Any], call: DenoiserCall, policy: slice | None, reference: slice | None
    ) -> Predictions:
        predicted, referred, output = None, None, None
        if reference is not None:
            inputs = call.inputs if reference == call.everything else call.take(reference)
            output = self.refer(denoiser, without_lora_scale(inputs))
            # Clone, because with CUDA graphs the next forward pass overwrites this memory.
            referred = prediction_in(output).clone()
        if policy is not None:
            full = policy == call.everything
            output = denoiser(*call.args, **call.kwargs) if full else denoiser(**call.take(policy))
            predicted = prediction_in(output)
        return predicted, referred, output

    @abstractmethod
    def refer(self, denoiser: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Run the reference on `inputs`, and return its output."""


class AdapterReference(TwoPasses):
    """Uses the policy's denoiser as the reference, with its adapters switched off or with another adapter active."""

    def __init__(self, layers: list[Any], name: str | None):
        self._layers = layers
        self._name = name

    def refer(self, denoiser: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        with using_adapter(self._layers, self._name):
            return denoiser(**inputs)


class DenoiserReference(TwoPasses):
    """Uses a separate denoiser as the reference."""

    def __init__(self, module: nn.Module):
        self._module = module

    def refer(self, denoiser: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        return self._module(**inputs)


class OnePass(Predictor):
    """Predicts with policy and reference in one batch. PEFT can apply a different adapter to each row."""

    def __init__(self, layers: list[Any], policy: str, reference: str | None):
        self._policy = policy
        self._reference = BASE if reference is None else reference
        self._names: list[str] | None = None
        lora_layers = [layer for layer in layers if isinstance(layer, LoraLayer)]
        self._handles = [layer.register_forward_pre_hook(self._name_rows, with_kwargs=True) for layer in lora_layers]

    def predict(
        self, denoiser: Callable[..., Any], call: DenoiserCall, policy: slice | None, reference: slice | None
    ) -> Predictions:
        branches = [(rows, name) for rows, name in ((policy, self._policy), (reference, self._reference)) if rows]
        counts = [rows.stop - rows.start for rows, _ in branches]
        self._names = [name for (_, name), count in zip(branches, counts, strict=True) for _ in range(count)]
        try:
            output = denoiser(**call.take(*(rows for rows, _ in branches)))
        except ValueError as error:
            if "adapter_names" not in str(error):
                raise
            raise ValueError(
                "`batched` needs one row per image in every layer with a LoRA. A layer of this denoiser has another "
                f"number of rows, for example an embedding of image sizes. Leave `batched` out. ({error})"
            ) from error
        finally:
            self._names = None
        predictions = iter(prediction_in(output).split(counts))
        predicted = None if policy is None else next(predictions)
        referred = None if reference is None else next(predictions)
        return predicted, referred, output

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _name_rows(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if self._names is None else (args, {**kwargs, "adapter_names": self._names})


def predictor_of(denoiser: nn.Module, reference: nn.Module | str | None, *, batched: bool) -> Predictor:
    """Return the predictor for a denoiser and the argument `reference` of [`preference_guidance`].

    Raises:
        `ValueError`: If the reference does not fit this denoiser, or policy and reference cannot predict in one batch
            although `batched` is set.
    """
    if isinstance(reference, nn.Module):
        _check_denoiser(denoiser, reference)
        if batched:
            raise ValueError(
                "With `batched`, the reference must be another adapter on the pipeline's denoiser, or this denoiser "
                "with its LoRA switched off. Got another denoiser as `reference`. Leave `batched` out."
            )
        return DenoiserReference(reference)
    if reference is not None and not isinstance(reference, str):
        raise ValueError(
            "`reference` must be None (the LoRA switched off), the name of an adapter, or a denoiser. Got a "
            f"{type(reference).__name__}. To use a pipeline's denoiser, pass the pipeline's `unet` or `transformer`."
        )
    layers: list[Any] = adapter_layers(denoiser)
    acting = _acting(layers)
    _check_adapters(denoiser, layers, acting, reference)
    if not batched:
        return AdapterReference(layers, reference)
    _check_one_batch(lora_configs(_plain(denoiser)), acting, reference)
    return OnePass(layers, acting[0], reference)


def _plain(denoiser: nn.Module) -> nn.Module:
    """Return a denoiser without the wrappers of torch.compile and PEFT."""
    return unwrap_peft_model(unwrap_module(denoiser))


def _acting(layers: list[Any]) -> list[str]:
    """Return the names of the active adapters in layers whose adapters PEFT has not disabled."""
    return sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})


def _check_adapters(denoiser: nn.Module, layers: list[Any], acting: list[str], name: str | None) -> None:
    loaded = sorted(lora_configs(_plain(denoiser))) if layers else []
    if name is not None and name not in loaded:
        raise ValueError(
            f"`reference` must name a loaded adapter of the denoiser ({', '.join(loaded) or 'none is loaded'}). Got "
            f"{name!r}. Load it first: `pipeline.load_lora_weights(..., adapter_name={name!r})`."
        )
    if name is None and not acting:
        raise ValueError(
            "Without `reference`, the reference is the denoiser with its LoRA switched off, so a LoRA must be active. "
            f"No LoRA is active (loaded: {', '.join(loaded) or 'none'}). Load or activate a LoRA with "
            "`load_lora_weights`, `set_adapters` or `enable_lora`. If the LoRA is merged or all weights were tuned, "
            "pass the base model's denoiser as `reference`."
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "The LoRA must not be merged into the weights, because it must be switched off for the reference. This "
            "LoRA is merged. Call `unfuse_lora()` first."
        )
    if acting == [name]:
        raise ValueError(
            f"`reference` must differ from the active adapter. Got {name!r} for both. Activate the tuned adapter with "
            "`set_adapters`."
        )


def _check_one_batch(configs: Mapping[str, PeftConfig], acting: list[str], reference: str | None) -> None:
    used = {name: configs[name] for name in (*acting, reference) if name is not None}
    plain = [isinstance(config, LoraConfig) and not config.use_dora for config in used.values()]
    if len(acting) != 1 or not all(plain):
        kinds = [f"{name} ({type(config).__name__})" for name, config in used.items()]
        raise ValueError(
            "`batched` needs exactly one active LoRA for the policy, and no DoRA or other kinds of adapters. Got "
            f"{', '.join(kinds) or 'none'}. Leave `batched` out."
        )


def _check_denoiser(denoiser: nn.Module, reference: nn.Module) -> None:
    policy, other = _plain(denoiser), _plain(reference)
    if policy is other:
        raise ValueError(
            "`reference` must not be the pipeline's denoiser itself. Got the same module. Leave `reference` out to "
            "use the denoiser with its LoRA switched off."
        )
    difference = architecture_difference(policy, other)
    if difference is not None:
        raise ValueError(
            f"`reference` must have the architecture of the pipeline's denoiser. They differ: {difference}. Use the "
            "denoiser from which training started."
        )
    ours, theirs = (next(iter(module.parameters())).dtype for module in (policy, other))
    if ours != theirs:
        raise ValueError(
            f"`reference` must have the dtype of the pipeline's denoiser, {ours}. Got {theirs}. Load it with "
            f"`dtype={ours}`."
        )
