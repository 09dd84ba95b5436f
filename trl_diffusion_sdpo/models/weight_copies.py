"""Second copies of the policy's weights, for the reference or the moving average.

A second copy is a second LoRA, a second denoiser, or the base weights under the policy's LoRA. The engine shards and
rounds it as it does the policy.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from ..engines.engine import Engine
from ..engines.sharding import Float32Shards
from ..utils._compat import ACTIVE_ADAPTER, ADAPTERS_OFF
from ..utils.errors import UserError
from .adapters import adapter_layers, adapter_parts, adapter_state, copy_adapter, lora_configs
from .denoiser_wrapper import DenoiserWrapper
from .numerics import halve_autocast_weights, read_contiguous


def second_copy(module: nn.Module, *, shared: bool) -> nn.Module:
    """Return a copy of a module.

    If `shared`, its parameters use the memory of the original's, and only buffers are copied. That saves memory with
    engines that shard both modules later, each into memory of its own.
    """
    memo: dict[int, Any] = {}
    for weight in module.parameters() if shared else ():
        if type(weight) is nn.Parameter:
            memo[id(weight)] = nn.Parameter(weight.data, requires_grad=weight.requires_grad)
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def using_adapter(layers: Sequence[BaseTunerLayer], name: str | None) -> Iterator[None]:
    """Within the context, activate only the adapter `name` in `layers`, or none if `name` is `None`. Unlike PEFT's own
    functions, it leaves `requires_grad` alone."""
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
    """The policy's denoiser with its LoRA switched off. It takes no memory."""

    def __init__(self, denoiser: nn.Module):
        self._layers = adapter_layers(denoiser)  # searched once: a search takes milliseconds

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context, switch the adapters off and yield `model`, which is the policy as the engine wrapped
        it."""
        with using_adapter(self._layers, None):
            yield model


class SecondAdapter:
    """A second, frozen LoRA on the policy's denoiser. It starts with the weights of the LoRA that trains.

    Raises:
        `ValueError`: If the denoiser already has an adapter called `name`.
    """

    def __init__(self, denoiser: nn.Module, policy_adapter: str, name: str, engine: Engine):
        if name in lora_configs(denoiser):
            raise UserError(
                f"The adapter name {name!r} is reserved for the trainer's reference or averaged weights, and the model "
                "already has an adapter of this name. Rename or delete it."
            )
        self.engine = engine
        self._denoiser = denoiser
        self._policy = policy_adapter
        self._name = name
        copy_adapter(denoiser, policy_adapter, name)
        self._layers = adapter_layers(denoiser)
        read_contiguous(adapter_parts(denoiser, (policy_adapter, name)))

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context, activate the second LoRA and yield `model`, which is the policy as the engine wrapped
        it."""
        with using_adapter(self._layers, self._name):
            yield model

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters themselves (not copies) of the second LoRA, by name."""
        return adapter_state(self._denoiser, self._name)

    def policy_weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the LoRA that trains, by the names that `weights` uses. `WeightCopy.update` mixes
        the matrices of the two LoRAs, not their products: a mixture of products has a higher rank than a LoRA can
        store."""
        return adapter_state(self._denoiser, self._policy)


class SecondDenoiser:
    """A second denoiser that is never trained.

    Args:
        module (`nn.Module`): The second denoiser. It is frozen and put into evaluation mode.
        half_dtype (`torch.dtype`, *optional*): The dtype of autocast. Weights that autocast would cast at every use are
            cast once, which saves memory and does not change results.
    """

    module: Any  # a diffusers model

    def __init__(self, module: nn.Module, policy: nn.Module, engine: Engine, *, half_dtype: torch.dtype | None = None):
        if not adapter_layers(policy):  # under a LoRA, the policy's base weights are frozen too and round equally
            read_contiguous((*policy.modules(), *module.modules()))
        self.module = module.requires_grad_(False).eval()
        self.engine = engine
        self.engine_model = self.module
        self._policy = policy
        if half_dtype is not None:
            halve_autocast_weights(self.module, half_dtype)

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the second denoiser as the engine wrapped it. `model` is not used."""
        yield self.engine_model

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers themselves (not copies) of the second denoiser, by name."""
        return self.module.state_dict(keep_vars=True)

    def policy_weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers of the policy, by the names that `weights` uses."""
        return self._policy.state_dict(keep_vars=True)

    def shard(self, *, moves: bool) -> None:
        """Shard the second denoiser as the engine shards the policy. `moves` says whether training updates it."""
        if self.engine_model is self.module:
            self.engine_model = self.engine.shard_like_policy(DenoiserWrapper(self.module).eval(), moves=moves)


class WeightCopy:
    """Base class of the reference and the moving average: a second copy of the policy's weights, with methods to
    prepare, update, save and load it under every engine.

    The trainer makes a copy ready in this order, each step if the run needs it:

    1. `compile`, before the policy is compiled;
    2. `to`, once images are encoded, because encoding needs the device's memory;
    3. `stop_sharing`, if the accelerator says that no engine shards weights after all;
    4. `keep_unrounded`, in `train`, before the engine prepares and rounds the policy;
    5. `prepare`, after that. Then it can be loaded from a checkpoint, and used.

    Args:
        second (`AdaptersOff`, `SecondAdapter` or `SecondDenoiser`, *optional*): What predicts with these weights, or
            `None` if the policy itself or no reference predicts.
        file (`str`): Name of the file with these weights in checkpoints.
        stored (`bool`): Whether checkpoints contain these weights. They must if training updates them, or they cannot
            be loaded again from elsewhere.
    """

    def __init__(self, second: AdaptersOff | SecondAdapter | SecondDenoiser | None, file: str, *, stored: bool):
        self.second = second
        self.file = file
        self.stored = stored
        self.float32_shards: Float32Shards | None = None  # float32 copies if the engine rounds these weights
        # Parameters that `update` mixes, by name: those of this copy, and those of the policy.
        self._mixed: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None

    def to(self, device: torch.device) -> None:
        """Move a second denoiser to the device. (A second LoRA moves with the policy.)"""
        if isinstance(self.second, SecondDenoiser):
            self.second.module.to(device)

    def compile(self, backend: str | None, mode: str | None, *, by_block: bool) -> None:
        """Compile a second denoiser or, if `by_block`, its repeated blocks. (A second LoRA is compiled with the
        policy.)"""
        if not isinstance(self.second, SecondDenoiser):
            return
        if by_block:
            self.second.module.compile_repeated_blocks(backend=backend, mode=mode)
        else:
            self.second.module.compile(backend=backend, mode=mode)

    def stop_sharing(self) -> None:
        """Give a second denoiser its own memory if it shares the policy's (see [`second_copy`])."""
        for weight in self.second.module.parameters() if isinstance(self.second, SecondDenoiser) else ():
            weight.data = weight.data.clone()

    def keep_unrounded(self) -> None:
        """Make float32 copies of these weights if the engine will round them."""
        second = self._stored_weights()
        if second is not None and self.float32_shards is None and second.engine.rounds_weights:
            self.float32_shards = second.engine.float32_shards(_parameters(second.weights()))

    def prepare(self) -> None:
        """Shard a second denoiser as the engine has sharded the policy."""
        self._mixed = None
        if isinstance(self.second, SecondDenoiser):
            self.second.shard(moves=self.stored)

    def active(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module | None]:
        """Return a context that yields the module that predicts with these weights, or `None`. `model` is the policy as
        the engine wrapped it."""
        return contextlib.nullcontext() if self.second is None else self.second.active(model)

    @torch.no_grad()
    def update(self, alpha: float) -> None:
        """Update these weights: `weights = alpha * policy + (1 - alpha) * weights`. Call it in all processes."""
        second = self._stored_weights()
        assert second is not None, "These weights are never updated."
        second.engine.reshard()
        if self._mixed is None:  # cached, because listing all weights takes longer than mixing a LoRA's weights
            weights = _parameters(second.weights())
            policy = second.policy_weights()
            self._mixed = weights, {name: policy[name] for name in weights}
        weights, policy = self._mixed
        if self.float32_shards is None:
            second.engine.mix(weights.values(), policy.values(), alpha)
        else:
            self.float32_shards.mix(weights, policy, alpha)

    def gather(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """Return the full weights for a checkpoint, by the names that they have in the policy. For `keep` see
        [`Engine.gather`]."""
        second = self._stored_weights()
        if second is None:
            return {}
        second.engine.reshard()
        if self.float32_shards is None:
            return second.engine.gather(second.weights(), keep=keep)
        names = self.float32_shards.names
        buffers = {name: weight for name, weight in second.weights().items() if name not in names}
        gathered = second.engine.gather(buffers, keep=keep)
        for name in names:
            value = self.float32_shards.full(name)  # a collective, so all processes call it
            if keep:
                gathered[name] = value.cpu()
        return gathered

    def save(self, folder: Path, *, write: bool) -> None:
        """Save the weights in the folder of a checkpoint. Call it in all processes; one with `write=True` writes the
        file."""
        weights = self.gather(keep=write)
        if write and weights:
            save_file(weights, folder / self.file)

    def load(self, folder: Path) -> None:
        """Load the weights that [`WeightCopy.save`] wrote. Raise `ValueError` if the file is missing or its weights
        have other names."""
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
        """Return the second LoRA or denoiser if checkpoints contain its weights, else `None`."""
        return self.second if self.stored and not isinstance(self.second, AdaptersOff) else None


def _parameters(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters among `weights`, without buffers."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}


def _read(weights: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise UserError(
            "A run with averaged weights (`ema_decay`) or a stored reference (`sync_ref_model`, or a LoRA that was "
            f"trained before) can resume only from a checkpoint that contains {file.name}, and {file.parent} does not. "
            "Resume with the settings of the checkpoint."
        )
    stored = load_file(file)
    if stored.keys() != weights.keys():
        raise UserError(
            f"{file} does not contain the weights that this run trains. Resume with the settings of the checkpoint."
        )
    return stored
