"""Reference models of a loss.

A reference is a frozen copy of the model, the policy with its LoRA off, a second LoRA, errors computed before
training, or absent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..engines.engine import Engine
from ..families import Family
from .adapters import adapter_layers, adapter_parts, adapter_scalings, adapter_state, base_tensors
from .kernels import compile_blocks
from .numerics import read_contiguous
from .weight_copies import AdaptersOff, SecondAdapter, SecondDenoiser, WeightCopy, second_copy

REFERENCE_FILE = "reference.safetensors"  # in checkpoints
REFERENCE_ADAPTER = "ref"


class Reference(WeightCopy):
    """The policy as it was before training, with arithmetic identical to the policy's."""

    kind: str  # name in checkpoints
    module: nn.Module | None = None  # separate denoiser of the reference, if it has one
    # whether batches contain the reference's errors, so that no reference model runs in training
    is_precomputed = False

    def __init__(self, second: AdaptersOff | SecondAdapter | SecondDenoiser | None = None, *, stored: bool = False):
        super().__init__(second, REFERENCE_FILE, stored=stored)


class NoReference(Reference):
    """Placeholder for losses without a reference. `active` yields `None`."""

    kind = "none"


class AdapterOffReference(Reference):
    """The base model under a LoRA that was initialized to zero. Takes no memory."""

    kind = "adapter_off"

    def __init__(self, denoiser: nn.Module):
        super().__init__(AdaptersOff(denoiser))


class AdapterReference(Reference):
    """A second LoRA with the weights from the start of training or from the last synchronisation with the policy.

    Checkpoints contain it even if it never changes, because the initial LoRA may be stored nowhere else.
    """

    kind = "ref_adapter"

    def __init__(self, denoiser: nn.Module, policy_adapter: str, engine: Engine):
        super().__init__(SecondAdapter(denoiser, policy_adapter, REFERENCE_ADAPTER, engine), stored=True)


class FrozenReference(Reference):
    """A separate frozen denoiser as the reference.

    Args:
        half_dtype (`torch.dtype`, *optional*): See [`SecondDenoiser`]. Ignored if `follows` is set.
        follows (`bool`): Whether the reference is synchronised with the policy.

    Raises:
        `ValueError`: If the reference has another architecture.
    """

    kind = "frozen"

    def __init__(
        self,
        module: nn.Module,
        policy: nn.Module,
        engine: Engine,
        *,
        half_dtype: torch.dtype | None = None,
        follows: bool = False,
    ):
        check_same_architecture(policy, module)
        half_dtype = None if follows else half_dtype
        super().__init__(SecondDenoiser(module, policy, engine, half_dtype=half_dtype), stored=follows)
        self.module = module


class PolicyReference(Reference):
    """The policy itself, before it trains. Takes no memory."""

    kind = "policy"

    def __init__(self, denoiser: nn.Module, adapter: str | None):
        super().__init__()
        # Trained and frozen linear layers round differently unless inputs are contiguous; see `read_contiguous`.
        read_contiguous(denoiser.modules() if adapter is None else adapter_parts(denoiser, (adapter,)))

    def active(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        return contextlib.nullcontext(model)


class PrecomputedReference(Reference):
    """A reference that predicts only before training, within `predicting`. During training, batches contain its
    errors.

    Args:
        source ([`Reference`]): Reference that predicts: the user's model, the base under a new LoRA, or the policy.
        tensors (`Callable`): Function that returns all weights that the predictions depend on, by name.
    """

    kind = "errors"
    is_precomputed = True

    def __init__(self, source: Reference, tensors: Callable[[], dict[str, torch.Tensor]]):
        super().__init__()
        self._source: Reference | None = source
        self.module = source.module
        self._module: nn.Module | None = None
        self._tensors: Callable[[], dict[str, torch.Tensor]] | None = tensors

    def compile(self, backend: str | None, mode: str | None, *, regional: bool) -> None:
        """Compile the blocks of a separate reference. Other sources are compiled with the policy."""
        assert regional, "the policy is compiled after its errors are computed"
        if self.module is not None:
            compile_blocks(cast(Any, self.module), backend, mode)

    @property
    def can_predict(self) -> bool:
        """Whether training has not begun."""
        return self._source is not None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all weights that the predictions depend on, by name. The reference must not be released yet."""
        assert self._tensors is not None, "A released reference has no weights."
        return self._tensors()

    def active(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module | None]:
        return contextlib.nullcontext(self._module)

    @contextlib.contextmanager
    def predicting(self, denoiser: nn.Module, engine: Engine) -> Iterator[None]:
        """Let the reference predict on the device within the context.

        The engine must not have prepared the policy `denoiser` yet. Weights are rounded in the way in which the engine
        will round the policy.
        """
        assert self._source is not None, "A released reference cannot predict."
        with self._source.active(denoiser) as module:
            assert module is not None, "A source predicts."
            try:
                with engine.computing(module, is_policy=module is denoiser) as self._module:
                    yield
            finally:
                self._module = None

    def release(self) -> None:
        """Free the model. In training, batches contain its errors."""
        self._source = self._tensors = self.module = None


def build_reference(
    denoiser: nn.Module,
    engine: Engine,
    *,
    needed: bool,
    users_module: nn.Module | None,
    shared: bool = False,
    fresh_adapter: str | None,
    started_adapter: str | None,
    follows: bool,
    half_dtype: torch.dtype | None,
    precomputed: bool = False,
) -> Reference:
    """Choose the kind of reference.

    Args:
        engine ([`Engine`]): Trains the policy.
        needed (`bool`): Whether the loss uses a reference. If not, a reference passed by the user only serves metrics.
        users_module (`nn.Module`, *optional*): The user's reference. It may be rounded, sharded or updated in place.
        shared (`bool`): See [`second_copy`].
        fresh_adapter (`str`, *optional*): Name of a LoRA that was just added, initialized to zero.
        started_adapter (`str`, *optional*): Name of a LoRA that the policy already had, whose training continues.
        follows (`bool`): Whether the reference will be synchronised with the policy.
        half_dtype (`torch.dtype`, *optional*): See [`SecondDenoiser`].
        precomputed (`bool`): Whether the reference's errors are computed before training. Training then needs no copy
            of the policy.

    Raises:
        `ValueError`: If the user's reference cannot be used.
    """
    if users_module is not None:
        if follows and adapter_layers(denoiser):
            raise ValueError(
                "`sync_ref_model` with a LoRA needs a second LoRA as the reference, but `ref_model` was passed. Leave "
                "`ref_model` out."
            )
        frozen = FrozenReference(users_module, denoiser, engine, half_dtype=half_dtype, follows=follows)
        return PrecomputedReference(frozen, partial(_with_scalings, users_module)) if precomputed else frozen
    if not needed:
        return NoReference()
    if precomputed:
        return _precomputed(denoiser, fresh_adapter, started_adapter)
    if fresh_adapter is not None and not follows:
        return AdapterOffReference(denoiser)
    adapter = fresh_adapter or started_adapter
    if adapter is not None:
        return AdapterReference(denoiser, adapter, engine)
    copied = second_copy(denoiser, shared=shared)
    return FrozenReference(copied, denoiser, engine, half_dtype=half_dtype, follows=follows)


def _with_scalings(users_module: nn.Module) -> dict[str, torch.Tensor]:
    """Return all tensors of a reference, and the scaling of each active LoRA."""
    scalings = {
        f"{number}.{name}.scaling": torch.tensor(layer.scaling[name])
        for number, layer in enumerate(adapter_layers(users_module))
        for name in ([] if layer.disable_adapters else layer.active_adapters)
        if name in layer.scaling
    }
    return {**users_module.state_dict(), **scalings}


def _precomputed(denoiser: nn.Module, fresh_adapter: str | None, started_adapter: str | None) -> PrecomputedReference:
    """Return the policy before training as a reference with precomputed errors."""

    def tensors() -> dict[str, torch.Tensor]:
        if started_adapter is None:
            return base_tensors(denoiser)
        return {
            **base_tensors(denoiser),
            **adapter_state(denoiser, started_adapter),
            **adapter_scalings(denoiser, started_adapter),
        }

    if fresh_adapter is not None:
        return PrecomputedReference(AdapterOffReference(denoiser), tensors)
    return PrecomputedReference(PolicyReference(denoiser, started_adapter), tensors)


def check_same_architecture(policy: nn.Module, reference: nn.Module) -> None:
    """Raise `ValueError` if a reference has another architecture than the policy."""
    difference = architecture_difference(policy, reference)
    if difference is not None:
        raise ValueError(
            f"`ref_model` must have the architecture of `model`, {difference}. Use the checkpoint that the policy "
            "started from."
        )


def architecture_difference(policy: nn.Module, reference: nn.Module) -> str | None:
    """Describe how a reference differs from the policy in its class or in tensor names and shapes. Return `None` if
    there is no difference. Adapters are ignored."""
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in base_tensors(module).items()} for module in (policy, reference)
    )
    if type(policy) is type(reference) and ours == theirs:
        return None
    differing = sorted(name for name, _ in set(ours.items()) ^ set(theirs.items()))[:3]
    return (
        f"a {type(policy).__name__} with {len(ours)} tensors; got a {type(reference).__name__} with {len(theirs)}, "
        f"differing in {differing}"
    )


def networks(family: Family, reference: nn.Module | None) -> dict[str, nn.Module]:
    """Return the networks of a training step by name: denoiser, frozen components and, if any, a separate reference."""
    names = (family.denoiser_name, *family.frozen_components)
    modules = {name: getattr(family.pipeline, name) for name in names}
    return modules if reference is None else {**modules, "reference": reference}
