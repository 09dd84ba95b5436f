"""The predictions of policy and reference for rows of a call: the LoRA switched off, another adapter, or another
denoiser; in two passes or in one."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ..models.adapters import adapter_layers, lora_configs, unwrap_peft_model
from ..models.reference import architecture_difference
from ..utils._compat import activate_adapter, adapters_as_they_were, switch_adapters
from .denoiser_call import DenoiserCall, prediction_in, without_lora_scale

BASE = "__base__"  # PEFT's name, in a mixed batch, of the model without adapters

Predictions = tuple[torch.Tensor | None, torch.Tensor | None, Any]


class Predictor(ABC):
    """Predicts some rows of a call with the policy, and some with the reference."""

    @abstractmethod
    def predict(
        self, denoiser: Callable[..., Any], call: DenoiserCall, policy: slice | None, reference: slice | None
    ) -> Predictions:
        """The predictions of both for their rows, `None` for none, and an output of the denoiser."""

    def close(self) -> None:
        """Remove what it added to the denoiser."""
        return None


class TwoPasses(Predictor):
    """A pass of the policy, as the pipeline asked for it if it has all rows, then one of the reference."""

    def predict(
        self, denoiser: Callable[..., Any], call: DenoiserCall, policy: slice | None, reference: slice | None
    ) -> Predictions:
        predicted, referred, output = None, None, None
        if reference is not None:
            inputs = call.inputs if reference == call.everything else call.take(reference)
            output = self.refer(denoiser, without_lora_scale(inputs))
            # Compiled with CUDA graphs, the next pass writes to the same memory.
            referred = prediction_in(output).clone()
        if policy is not None:
            full = policy == call.everything
            output = denoiser(*call.args, **call.kwargs) if full else denoiser(**call.take(policy))
            predicted = prediction_in(output)
        return predicted, referred, output

    @abstractmethod
    def refer(self, denoiser: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """The reference's output."""


class AdapterReference(TwoPasses):
    """The same denoiser with its adapters switched off, or with another one active."""

    def __init__(self, layers: list[Any], name: str | None):
        self._layers, self._name = layers, name

    def refer(self, denoiser: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        with self._active():
            return denoiser(**inputs)

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        with adapters_as_they_were(self._layers):
            switch_adapters(self._layers, on=self._name is not None)
            if self._name is not None:
                activate_adapter(self._layers, self._name)
            yield


class DenoiserReference(TwoPasses):
    """A denoiser of its own."""

    def __init__(self, module: nn.Module):
        self._module = module

    def refer(self, denoiser: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        return self._module(**inputs)


class OnePass(Predictor):
    """Both in one batch, in which every row has its own adapter: PEFT's inference with mixed batches."""

    def __init__(self, layers: list[Any], policy: str, reference: str | None):
        self._policy, self._reference = policy, BASE if reference is None else reference
        self._names: list[str] | None = None
        found = [layer for layer in layers if isinstance(layer, LoraLayer)]
        self._handles = [layer.register_forward_pre_hook(self._name_rows, with_kwargs=True) for layer in found]

    def predict(
        self, denoiser: Callable[..., Any], call: DenoiserCall, policy: slice | None, reference: slice | None
    ) -> Predictions:
        parts = [(part, name) for part, name in ((policy, self._policy), (reference, self._reference)) if part]
        counts = [part.stop - part.start for part, _ in parts]
        self._names = [name for (_, name), count in zip(parts, counts, strict=True) for _ in range(count)]
        try:
            output = denoiser(**call.take(*(part for part, _ in parts)))
        except ValueError as error:
            if "adapter_names" not in str(error):
                raise
            raise ValueError(
                "In one batch every layer with a LoRA must have a row for each image, and one of this denoiser has "
                f"others, such as an embedding of sizes. Leave `batched` out. ({error})"
            ) from error
        finally:
            self._names = None
        found = iter(prediction_in(output).split(counts))
        return (None if policy is None else next(found)), (None if reference is None else next(found)), output

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _name_rows(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if self._names is None else (args, {**kwargs, "adapter_names": self._names})


def predictor_of(denoiser: nn.Module, reference: nn.Module | str | None, *, batched: bool) -> Predictor:
    """What predicts with a denoiser and a reference as [`preference_guidance`] takes it.

    Raises:
        `ValueError`: If the reference cannot be used, or not in one batch.
    """
    if isinstance(reference, nn.Module):
        _check_denoiser(denoiser, reference)
        if batched:
            raise ValueError(
                "One batch holds adapters of one denoiser, and `reference` is another denoiser. Leave `batched` out."
            )
        return DenoiserReference(reference)
    if reference is not None and not isinstance(reference, str):
        raise ValueError(
            "`reference` must be None (the LoRA switched off), the name of an adapter or a denoiser, got a "
            f"{type(reference).__name__}. Of a pipeline, pass its `unet` or `transformer`."
        )
    layers: list[Any] = adapter_layers(denoiser)
    acting = _acting(layers)
    _check_adapters(denoiser, layers, acting, reference)
    if not batched:
        return AdapterReference(layers, reference)
    _check_one_batch(lora_configs(_plain(denoiser)), acting, reference)
    return OnePass(layers, acting[0], reference)


def _plain(denoiser: nn.Module) -> nn.Module:
    """The denoiser within the wrappers of torch.compile and PEFT."""
    return unwrap_peft_model(unwrap_module(denoiser))


def _acting(layers: list[Any]) -> list[str]:
    """Names of the adapters that change the denoiser's prediction."""
    return sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})


def _check_adapters(denoiser: nn.Module, layers: list[Any], acting: list[str], name: str | None) -> None:
    loaded = sorted(lora_configs(_plain(denoiser))) if layers else []
    if name is not None and name not in loaded:
        raise ValueError(
            f"`reference` must name an adapter of the denoiser, got {name!r}; loaded: {', '.join(loaded) or 'none'}. "
            f"Load it first: `pipeline.load_lora_weights(..., adapter_name={name!r})`."
        )
    if name is None and not acting:
        raise ValueError(
            "Without `reference`, the reference is the denoiser with its LoRA switched off, and no LoRA is active"
            f"; loaded: {', '.join(loaded) or 'none'}. Load one with `load_lora_weights`, activate it with "
            "`set_adapters` or `enable_lora`, or pass the base's denoiser as `reference`: after a merge, or after "
            "tuning all weights."
        )
    if any(layer.merged for layer in layers):
        raise ValueError("The LoRA is merged into the weights and cannot be switched off. Call `unfuse_lora()` first.")
    if acting == [name]:
        raise ValueError(
            f"`reference` must be another adapter than the active one, got {name!r}. Activate the tuned one with "
            "`set_adapters`."
        )


def _check_one_batch(configs: Mapping[str, PeftConfig], acting: list[str], reference: str | None) -> None:
    used = {name: configs[name] for name in (*acting, reference) if name is not None}
    plain = [isinstance(config, LoraConfig) and not config.use_dora for config in used.values()]
    if len(acting) != 1 or not all(plain):
        kinds = [f"{name} ({type(config).__name__})" for name, config in used.items()]
        raise ValueError(
            "In one batch, PEFT needs exactly one active LoRA for the policy, and neither DoRA nor adapters of another "
            f"kind; got {', '.join(kinds) or 'none'}. Leave `batched` out."
        )


def _check_denoiser(denoiser: nn.Module, reference: nn.Module) -> None:
    policy, other = _plain(denoiser), _plain(reference)
    if policy is other:
        raise ValueError(
            "`reference` must be another denoiser than the pipeline's. Leave it out to switch the LoRA off."
        )
    difference = architecture_difference(policy, other)
    if difference is not None:
        raise ValueError(
            f"`reference` must have the architecture of the pipeline's denoiser, {difference}. Use the denoiser that "
            "training began with."
        )
    ours, theirs = (next(iter(module.parameters())).dtype for module in (policy, other))
    if ours != theirs:
        raise ValueError(
            f"`reference` must have the dtype of the pipeline's denoiser, {ours}, got {theirs}. Load it with that "
            "`dtype`."
        )
