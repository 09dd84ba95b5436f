"""How the old policy is recovered: a frozen copy, the adapter switched off, a second adapter, or not at all."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from ..engines import sharding
from .adapters import (
    REFERENCE_ADAPTER,
    adapter_layers,
    adapter_on,
    adapter_parts,
    adapter_state,
    adapters_off,
    base_tensors,
    copy_adapter,
)
from .denoiser_wrapper import DenoiserWrapper
from .memory_layout import read_contiguous

REFERENCE_FILE = "reference.safetensors"


class Reference(ABC):
    """The old policy, in arithmetic identical to the policy's. What a kind does not need stays as it is here."""

    kind: str
    file = REFERENCE_FILE  # in checkpoints
    has_state = False  # whether it moves during training, so that a checkpoint must hold it
    accelerator: Accelerator  # given by the trainer as soon as there is one
    engine_models: tuple[nn.Module, ...] = ()  # what the engine wrapped: the policy, and the reference if it is whole
    _moving: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None  # its weights, and the policy's
    exact: sharding.Float32Parts | None = None  # of a reference that moves in weights that the engine rounds

    @abstractmethod
    def active(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module | None]:
        """Lend the module that predicts as the old policy; `model` is the policy as the engine wrapped it."""

    def keep_exact(self) -> None:
        """Before the engine takes the policy: keep what it will round, if the reference is to move."""
        weights = self.weights()
        if weights and self.exact is None and sharding.rounds_weights(self.accelerator):
            moving = {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
            self.exact = sharding.Float32Parts(moving, self.accelerator)

    def prepare(self, engine_model: nn.Module) -> None:
        """Live as the policy does under the engine, which has just made `engine_model` of it."""
        self.engine_models = (engine_model,)
        self._moving = None

    def _mix(self, policy_weights: Callable[[], dict[str, torch.Tensor]], alpha: float) -> None:
        self.settle()
        if self._moving is None:  # naming all weights takes longer than moving those of a LoRA
            weights = {name: weight for name, weight in self.weights().items() if isinstance(weight, nn.Parameter)}
            found = policy_weights()
            self._moving = weights, {name: found[name] for name in weights}
        weights, policy = self._moving
        if self.exact is None:
            sharding.mix(weights.values(), policy.values(), alpha, self.accelerator)
        else:
            self.exact.mix(weights, policy, alpha, stage3=sharding.zero_stage(self.accelerator) == 3)

    def settle(self) -> None:
        """Before weights are read or written outside of a forward pass."""
        for model in self.engine_models:
            sharding.shard_again(model)

    def sync(self, alpha: float) -> None:
        """Move the reference towards the policy, `ref = alpha * policy + (1 - alpha) * ref`."""
        raise ValueError(f"A reference of the kind {self.kind!r} cannot follow the policy.")

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it, not copied; nothing where the reference stands still."""
        return {}

    def save(self, folder: Path, *, write: bool) -> None:
        """Write what a resumed run needs. All processes take part, and those with `write` write."""
        whole = self.whole(keep=write)
        if write and whole:
            save_file(whole, folder / self.file)

    def whole(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, gathered and on the host, in processes with `keep`; all processes take part."""
        self.settle()
        if self.exact is None:
            return sharding.gather(self.weights(), self.accelerator, keep=keep)
        exact = {name: self.exact.whole(name).cpu() for name in self.exact.parts}
        rest = {name: weight for name, weight in self.weights().items() if name not in exact}  # buffers, not trained
        return {**sharding.gather(rest, self.accelerator, keep=keep), **exact}

    def load(self, folder: Path) -> None:
        """Read what [`Reference.save`] wrote."""
        self.settle()
        weights = self.weights()
        if weights:
            stored = _read(weights, folder / self.file)
            sharding.scatter(stored, weights, self.accelerator)
            for name in self.exact.parts if self.exact is not None else ():
                self.exact.set(name, stored[name].to(self.accelerator.device))

    def to(self, device: torch.device) -> None:
        """Move what the policy does not carry along."""
        return None

    def compile(self, backend: str, mode: str | None) -> None:
        """Compile, as the policy will be, what the policy does not carry along."""
        return None


class NoReference(Reference):
    """For losses that read none."""

    kind = "none"

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        yield None


class AdapterOffReference(Reference):
    """The base model under a LoRA that started at zero. Costs no memory."""

    kind = "adapter_off"

    def __init__(self, denoiser: nn.Module):
        self._denoiser = denoiser

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        with adapters_off(self._denoiser):
            yield model


class AdapterReference(Reference):
    """A second, frozen adapter, "ref" unless named otherwise: the LoRA as it was when training began, or as it was last
    synchronised.

    Synchronising mixes the two LoRAs factor by factor, as their product cannot be mixed at the same rank.
    """

    kind = "ref_adapter"

    def __init__(
        self, denoiser: nn.Module, policy_adapter: str, *, follows: bool = False, name: str = REFERENCE_ADAPTER
    ):
        self._denoiser, self._policy, self._name = denoiser, policy_adapter, name
        self.has_state = True  # the start may have been a trained adapter that the checkpoint alone remembers
        self.follows = follows
        if name in denoiser.peft_config:
            raise ValueError(
                f"The adapter name {name!r} is kept for weights beside the policy's, but the model has one. Rename or "
                "delete it."
            )
        copy_adapter(denoiser, policy_adapter, name)
        read_contiguous(adapter_parts(denoiser, (policy_adapter, name)))

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        with adapter_on(self._denoiser, self._name, back=self._policy):
            yield model

    def sync(self, alpha: float) -> None:
        self._mix(lambda: adapter_state(self._denoiser, self._policy), alpha)

    def weights(self) -> dict[str, torch.Tensor]:
        return adapter_state(self._denoiser, self._name)


class FrozenReference(Reference):
    """A whole second denoiser that never trains.

    Args:
        module (`nn.Module`): Frozen and put into evaluation mode here.
        policy (`nn.Module`): The denoiser that trains; the reference must have its architecture.
        half_dtype (`torch.dtype`, *optional*): Precision of autocast, in which the weights of linear and convolution
            layers are then held. Autocast rounds just these to it at every use, so nothing changes but the memory.
        follows (`bool`): Whether the reference will be synchronised.
    """

    kind = "frozen"

    def __init__(
        self,
        module: nn.Module,
        policy: nn.Module,
        *,
        half_dtype: torch.dtype | None = None,
        follows: bool = False,
    ):
        check_same_architecture(policy, module)
        if not adapter_layers(policy):  # under a LoRA the base is as frozen as the reference
            read_contiguous((*policy.modules(), *module.modules()))
        self.module = module.requires_grad_(False).eval()
        self._running = self.module
        self._policy = policy
        self.has_state = self.follows = follows
        if half_dtype is not None and not follows:
            halve_autocast_weights(self.module, half_dtype)

    def prepare(self, engine_model: nn.Module) -> None:
        if self._running is self.module:
            model = DenoiserWrapper(self.module).eval()
            self._running = sharding.shard_like_policy(model, self.accelerator, moves=self.has_state)
        self.engine_models = (engine_model, self._running)
        self._moving = None

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self._running

    def sync(self, alpha: float) -> None:
        self._mix(lambda: self._policy.state_dict(keep_vars=True), alpha)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict(keep_vars=True) if self.has_state else {}

    def to(self, device: torch.device) -> None:
        self.module.to(device)

    def compile(self, backend: str, mode: str | None) -> None:
        self.module.compile(backend=backend, mode=mode)


def build_reference(
    denoiser: nn.Module,
    *,
    needed: bool,
    given: nn.Module | None,
    may_modify_given: bool,
    changed_by_engine: bool = False,
    fresh_adapter: str | None,
    started_adapter: str | None,
    follows: bool,
    half_dtype: torch.dtype | None,
) -> Reference:
    """Choose how the old policy is recovered.

    Args:
        denoiser (`nn.Module`): The policy's, before training.
        needed (`bool`): Whether the loss reads a reference. One that is given anyway serves the metrics.
        given (`nn.Module`, *optional*): The user's own reference.
        may_modify_given (`bool`): Whether it was loaded here, so that it may be rounded or moved in place.
        changed_by_engine (`bool`): Whether an engine will round or shard it in place.
        fresh_adapter (`str`, *optional*): Name of a LoRA that was just added, which starts at zero.
        started_adapter (`str`, *optional*): Name of a LoRA that the policy came with.
        follows (`bool`): Whether the reference will be synchronised with the policy.
        half_dtype (`torch.dtype`, *optional*): Precision for the large weights of a whole second model.
    """
    if given is not None:
        if follows and adapter_layers(denoiser):
            raise ValueError(
                "`sync_ref_model` moves the reference towards an adapter, but a whole `ref_model` was given. Leave "
                "`ref_model` out: the reference then is a second adapter."
            )
        if (half_dtype is not None or follows or changed_by_engine) and not may_modify_given:
            given = copy.deepcopy(given)
        return FrozenReference(given, denoiser, half_dtype=half_dtype, follows=follows)
    if not needed:
        return NoReference()
    if fresh_adapter is not None and not follows:
        return AdapterOffReference(denoiser)
    adapter = fresh_adapter or started_adapter
    if adapter is not None:
        return AdapterReference(denoiser, adapter, follows=follows)
    return FrozenReference(copy.deepcopy(denoiser), denoiser, half_dtype=half_dtype, follows=follows)


def check_same_architecture(policy: nn.Module, reference: nn.Module) -> None:
    """Raise `ValueError` where a reference cannot stand for the policy."""
    if reference is policy:
        raise ValueError(
            "`model` and `ref_model` must be two objects: a reference that trains along keeps every margin at 0. "
            "Leave `ref_model` out, or pass a copy."
        )
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in base_tensors(module).items()} for module in (policy, reference)
    )
    if type(policy) is not type(reference) or ours != theirs:
        differing = sorted(name for name, _ in set(ours.items()) ^ set(theirs.items()))[:3]
        raise ValueError(
            f"`ref_model` must have the architecture of `model`, a {type(policy).__name__} with {len(ours)} tensors; "
            f"got a {type(reference).__name__} with {len(theirs)}, differing in {differing}. Use the checkpoint that "
            "the policy started from."
        )


def halve_autocast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights that autocast rounds at every use, those of linear and convolution layers, in its precision.

    Norms and embeddings keep theirs: autocast leaves them alone, so rounding them would change the arithmetic.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            layer.to(dtype)


def _read(weights: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ValueError(
            f"A checkpoint with weights that move beside the policy's must hold {file.name}; {file.parent} does not. "
            "Resume with the settings that wrote it."
        )
    stored = load_file(file)
    if stored.keys() != weights.keys():
        raise ValueError(f"{file} holds the weights of another set-up. Resume with the settings that wrote it.")
    return stored
