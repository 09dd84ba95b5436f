"""Second weights of the policy, for a reference or an average.

They are a second adapter, the base without an adapter, or a second denoiser. The engine shards and rounds them like the
policy.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from ..engines.engine import Engine
from ..engines.sharding import Float32Shards
from ..utils._compat import ACTIVE_ADAPTER, ADAPTERS_OFF
from .adapters import adapter_layers, adapter_parts, adapter_state, copy_adapter, lora_configs
from .denoiser_wrapper import DenoiserWrapper
from .kernels import compile_blocks
from .numerics import halve_autocast_weights, read_contiguous


def second_copy(module: nn.Module, *, shared: bool) -> nn.Module:
    """Copy a module. Buffers are always copied.

    If `shared`, the copy's parameters use the memory of the original ones. This is for engines that shard both
    modules, because sharding gives each its own memory.
    """
    memo: dict[int, Any] = {}
    for weight in module.parameters() if shared else ():
        if type(weight) is nn.Parameter:
            memo[id(weight)] = nn.Parameter(weight.data, requires_grad=weight.requires_grad)
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def using_adapter(layers: Sequence[BaseTunerLayer], name: str | None) -> Iterator[None]:
    """Activate one adapter of `layers` within the context, or switch all adapters off if `name` is `None`. No weight's
    `requires_grad` changes."""
    before = [(getattr(layer, ACTIVE_ADAPTER), layer.disable_adapters) for layer in layers]
    for layer in layers:
        setattr(layer, ADAPTERS_OFF, name is None)
        if name is not None:
            setattr(layer, ACTIVE_ADAPTER, [name])
        used = None if layer.disable_adapters else layer.active_adapters
        assert used == (None if name is None else [name]), "PEFT no longer reads the attributes that switch adapters."
    try:
        yield
    finally:
        for layer, (active, off) in zip(layers, before, strict=True):
            setattr(layer, ACTIVE_ADAPTER, active)
            setattr(layer, ADAPTERS_OFF, off)


class AdaptersOff:
    """The base under the policy's LoRA. It takes no memory, and has no weights besides the policy's."""

    def __init__(self, denoiser: nn.Module):
        self._layers = adapter_layers(denoiser)  # searched once, because a search takes milliseconds

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield `model` with its adapters off. `model` is the policy as the engine wrapped it."""
        with using_adapter(self._layers, None):
            yield model


class SecondAdapter:
    """Second, frozen LoRA on the policy's denoiser. It starts with the current weights of the trained LoRA.

    Args:
        policy_adapter (`str`): Name of the trained LoRA.
        name (`str`): Name of the second LoRA.
        engine ([`Engine`]): Engine that trains the policy.

    Raises:
        `ValueError`: If the denoiser already has an adapter called `name`.
    """

    def __init__(self, denoiser: nn.Module, policy_adapter: str, name: str, engine: Engine):
        if name in lora_configs(denoiser):
            raise ValueError(
                f"The adapter name {name!r} is reserved for the trainer's reference or average, but the model already "
                "has an adapter of this name. Rename or delete it."
            )
        self.engine = engine
        self._denoiser, self._policy, self._name = denoiser, policy_adapter, name
        copy_adapter(denoiser, policy_adapter, name)
        self._layers = adapter_layers(denoiser)
        read_contiguous(adapter_parts(denoiser, (policy_adapter, name)))

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield `model` with the second adapter active. `model` is the policy as the engine wrapped it."""
        with using_adapter(self._layers, self._name):
            yield model

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the second adapter without copying them."""
        return adapter_state(self._denoiser, self._name)

    def policy_weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the trained LoRA under equal names. Updates mix the two LoRAs factor by factor,
        because a mixture of their products would have a higher rank."""
        return adapter_state(self._denoiser, self._policy)


class SecondDenoiser:
    """A second denoiser that is never trained.

    Args:
        module (`nn.Module`): The second denoiser. The constructor freezes it and puts it into evaluation mode.
        engine ([`Engine`]): Engine that trains the policy.
        half_dtype (`torch.dtype`, *optional*): The dtype of autocast. Weights that autocast would cast at every use are
            cast once to this dtype. This saves memory, and results are equal.
    """

    def __init__(self, module: nn.Module, policy: nn.Module, engine: Engine, *, half_dtype: torch.dtype | None = None):
        if not adapter_layers(policy):  # under a LoRA, the policy's base is frozen too, so both round equally
            read_contiguous((*policy.modules(), *module.modules()))
        self.module = module.requires_grad_(False).eval()
        self.engine = engine
        self.engine_model = self.module
        self._policy = policy
        if half_dtype is not None:
            halve_autocast_weights(self.module, half_dtype)

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the second denoiser as the engine wrapped it, instead of `model`."""
        yield self.engine_model

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the second denoiser's parameters and buffers without copying them."""
        return self.module.state_dict(keep_vars=True)

    def policy_weights(self) -> dict[str, torch.Tensor]:
        """Return the policy's parameters and buffers under equal names."""
        return self._policy.state_dict(keep_vars=True)

    def shard(self, *, moves: bool) -> None:
        """Shard the second denoiser like the policy."""
        if self.engine_model is self.module:
            self.engine_model = self.engine.shard_like_policy(DenoiserWrapper(self.module).eval(), moves=moves)


class WeightCopy:
    """A second copy of the policy's weights. It can be prepared, updated, gathered, saved and loaded under every
    engine.

    Args:
        second (`AdaptersOff`, `SecondAdapter` or `SecondDenoiser`, *optional*): The module that predicts with these
            weights. `None` if the policy itself or nothing predicts.
        file (`str`): Name of the weights' file in checkpoints.
        stored (`bool`): Whether checkpoints contain the weights. They must if the weights are updated or cannot be
            computed again.
    """

    def __init__(self, second: AdaptersOff | SecondAdapter | SecondDenoiser | None, file: str, *, stored: bool):
        self.second, self.file, self.stored = second, file, stored
        self.float32_shards: Float32Shards | None = None  # float32 copies of stored weights that the engine rounds
        # (weights of this copy, weights of the policy)
        self._mixed: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None

    def to(self, device: torch.device) -> None:
        """Move a second denoiser to the device. An adapter moves with the policy."""
        if isinstance(self.second, SecondDenoiser):
            self.second.module.to(device)

    def compile(self, backend: str | None, mode: str | None, *, regional: bool) -> None:
        """Compile a second denoiser or, if `regional`, its blocks. An adapter is compiled with the policy."""
        if isinstance(self.second, SecondDenoiser):
            if regional:
                compile_blocks(cast(Any, self.second.module), backend, mode)
            else:
                self.second.module.compile(backend=backend, mode=mode)

    def stop_sharing(self) -> None:
        """Copy the weights of a shared [`second_copy`] into their own memory, if the engine does not shard them."""
        for weight in self.second.module.parameters() if isinstance(self.second, SecondDenoiser) else ():
            weight.data = weight.data.clone()

    def keep_unrounded(self) -> None:
        """Copy the weights that the engine will round, in float32. Call this before the engine prepares the policy."""
        second = self._stored_weights()
        if second is not None and self.float32_shards is None and second.engine.rounds_weights:
            self.float32_shards = second.engine.float32_shards(_parameters(second.weights()))

    def prepare(self) -> None:
        """Shard a second denoiser as the engine has sharded the policy."""
        self._mixed = None
        if isinstance(self.second, SecondDenoiser):
            self.second.shard(moves=self.stored)

    def active(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module | None]:
        """Return a context that yields the module that predicts with these weights. `model` is the policy as the engine
        wrapped it."""
        return contextlib.nullcontext() if self.second is None else self.second.active(model)

    @torch.no_grad()
    def update(self, alpha: float) -> None:
        """Move the weights towards the policy: `w = alpha * policy + (1 - alpha) * w`. All processes must call it."""
        second = self._stored_weights()
        assert second is not None, "These weights are never updated."
        second.engine.reshard()
        if self._mixed is None:  # cached, because listing all weights takes longer than mixing those of a LoRA
            weights, policy = _parameters(second.weights()), second.policy_weights()
            self._mixed = weights, {name: policy[name] for name in weights}
        weights, policy = self._mixed
        if self.float32_shards is None:
            second.engine.mix(weights.values(), policy.values(), alpha)
        else:
            self.float32_shards.mix(weights, policy, alpha)

    def gather(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """Gather the weights for a checkpoint, under the policy's names. For `keep` see [`Engine.gather`]."""
        second = self._stored_weights()
        if second is None:
            return {}
        second.engine.reshard()
        if self.float32_shards is None:
            return second.engine.gather(second.weights(), keep=keep)
        exact = {name: self.float32_shards.full(name).cpu() for name in self.float32_shards.names}
        buffers = {name: weight for name, weight in second.weights().items() if name not in exact}
        return {**second.engine.gather(buffers, keep=keep), **exact}

    def save(self, folder: Path, *, write: bool) -> None:
        """Save the weights for a resumed run. All processes must call it; processes with `write` write the file."""
        weights = self.gather(keep=write)
        if write and weights:
            save_file(weights, folder / self.file)

    def load(self, folder: Path) -> None:
        """Load the weights that [`WeightCopy.save`] wrote. Raise `ValueError` if the file is missing or contains other
        weights."""
        second = self._stored_weights()
        if second is None:
            return
        second.engine.reshard()
        weights = second.weights()
        stored = _read(weights, folder / self.file)
        second.engine.scatter(stored, weights)
        if self.float32_shards is not None:
            for name in self.float32_shards.names:
                self.float32_shards.set(name, stored[name])

    def _stored_weights(self) -> SecondAdapter | SecondDenoiser | None:
        """Return the second weights if checkpoints contain them."""
        return self.second if self.stored and not isinstance(self.second, AdaptersOff) else None


def _parameters(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters among the weights, without buffers."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}


def _read(weights: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ValueError(
            f"A checkpoint of a run with an average or a synchronised reference must contain {file.name}, and "
            f"{file.parent} does not. Resume with the settings that wrote the checkpoint."
        )
    stored = load_file(file)
    if stored.keys() != weights.keys():
        raise ValueError(
            f"{file} contains other weights than this run trains. Resume with the settings that wrote the checkpoint."
        )
    return stored
