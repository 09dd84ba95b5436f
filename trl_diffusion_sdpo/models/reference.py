"""The reference model, to which the loss compares the policy.

A reference can be a frozen copy of the denoiser, the policy with its LoRA switched off, a second LoRA on the policy's
denoiser, or a list of errors that were computed before training. Some losses have no reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..engines.engine import Engine
from ..utils.errors import UserError
from .adapters import adapter_layers, adapter_parts, adapter_scalings, adapter_state, base_tensors
from .numerics import read_contiguous
from .weight_copies import AdaptersOff, SecondAdapter, SecondDenoiser, WeightCopy, second_copy

REFERENCE_FILE = "reference.safetensors"  # name of the file in checkpoints
REFERENCE_ADAPTER = "ref"


class Reference(WeightCopy):
    """Base class of references. By default, a reference is the policy as it was before training. It rounds exactly as
    the policy does."""

    kind: str  # name of the kind of reference in checkpoints
    module: nn.Module | None = None  # separate denoiser of the reference, if it has one
    # Whether batches contain the reference's errors, so that it does not predict during training.
    is_precomputed = False

    def __init__(self, second: AdaptersOff | SecondAdapter | SecondDenoiser | None = None, *, stored: bool = False):
        super().__init__(second, REFERENCE_FILE, stored=stored)


class NoReference(Reference):
    """Placeholder for losses that have no reference. The context `active` yields `None`."""

    kind = "none"


class AdapterOffReference(Reference):
    """The policy with its LoRA switched off, which takes no memory. If the LoRA is new, that is exactly the policy
    before training."""

    kind = "adapter_off"

    def __init__(self, denoiser: nn.Module):
        super().__init__(AdaptersOff(denoiser))


class SecondAdapterReference(Reference):
    """A second LoRA on the policy's denoiser, with the weights of the policy's LoRA at the start of training or of the
    last update (`sync_ref_model`).

    Checkpoints contain it even if it never changes, because the initial LoRA may be stored nowhere else.
    """

    kind = "ref_adapter"

    def __init__(self, denoiser: nn.Module, policy_adapter: str, engine: Engine):
        super().__init__(SecondAdapter(denoiser, policy_adapter, REFERENCE_ADAPTER, engine), stored=True)


class FrozenReference(Reference):
    """Reference that is a separate, frozen denoiser.

    Args:
        half_dtype (`torch.dtype`, *optional*): Dtype of autocast, to which most weights are cast once; see
            [`SecondDenoiser`]. Ignored with `follows`.

    Raises:
        `ValueError`: If the reference has another architecture than the policy.
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
    """The policy itself, as a reference that predicts only before training and so takes no extra memory."""

    kind = "policy"

    def __init__(self, denoiser: nn.Module, adapter: str | None):
        super().__init__()
        # Trained and frozen linear layers round differently unless inputs are contiguous; see `read_contiguous`.
        read_contiguous(denoiser.modules() if adapter is None else adapter_parts(denoiser, (adapter,)))

    def active(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        return contextlib.nullcontext(model)


class PrecomputedReference(Reference):
    """A reference that predicts only before training, within the context `predicting`. Training reads the errors from
    the batches.

    Args:
        source ([`Reference`]): What predicts: the user's model, the base model without a new LoRA, or the policy.
        tensors (`Callable`): Returns, by name, all weights on which the predictions depend.
    """

    kind = "errors"
    is_precomputed = True

    def __init__(self, source: Reference, tensors: Callable[[], dict[str, torch.Tensor]]):
        super().__init__()
        self._source: Reference | None = source
        self.module = source.module
        self._module: nn.Module | None = None
        self._tensors: Callable[[], dict[str, torch.Tensor]] | None = tensors

    def compile(self, backend: str | None, mode: str | None, *, by_block: bool) -> None:
        """Compile the blocks of a separate denoiser. A reference that shares the policy's is compiled with it."""
        assert by_block, "A whole policy would be compiled only after the errors are computed."
        if self.module is not None:
            module: Any = self.module
            module.compile_repeated_blocks(backend=backend, mode=mode)

    @property
    def can_predict(self) -> bool:
        """Whether the reference can still predict: `False` after `release`."""
        return self._source is not None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return, by name, all weights on which the predictions depend. The reference must not be released yet."""
        assert self._tensors is not None, "A released reference has no weights."
        return self._tensors()

    def active(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module | None]:
        return contextlib.nullcontext(self._module)

    @contextlib.contextmanager
    def predicting(self, denoiser: nn.Module, engine: Engine) -> Iterator[None]:
        """Make the reference predict on the device within the context.

        The engine must not have prepared the policy `denoiser` yet. The reference rounds as the engine will round the
        policy.
        """
        assert self._source is not None, "A released reference cannot predict."
        with self._source.active(denoiser) as module:
            assert module is not None, "The source of precomputed errors always predicts."
            try:
                with engine.computing(module, is_policy=module is denoiser) as self._module:
                    yield
            finally:
                self._module = None

    def release(self) -> None:
        """Free the reference model before training. Its errors are then read from the batches."""
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
    """Return a reference of the kind that the arguments require.

    Args:
        needed (`bool`): Whether the loss uses a reference. If not, the user's is for metrics only.
        users_module (`nn.Module`, *optional*): The user's reference. It may be rounded, sharded or updated in place.
        shared (`bool`): Whether a copy of the policy first shares the policy's memory; see [`second_copy`].
        fresh_adapter (`str`, *optional*): Name of a new LoRA, which does not change the model's output yet.
        started_adapter (`str`, *optional*): Name of a LoRA that was loaded with the policy and is trained further.
        follows (`bool`): Whether the reference is updated during training (`sync_ref_model`).
        half_dtype (`torch.dtype`, *optional*): Dtype of autocast; see [`SecondDenoiser`].
        precomputed (`bool`): Whether the reference's errors are computed before training, without a copy of the policy.

    Raises:
        `ValueError`: If the user's reference cannot be used.
    """
    if users_module is not None:
        if follows and adapter_layers(denoiser):
            raise UserError(
                "With a LoRA, `sync_ref_model` uses a second LoRA as the reference, which the trainer creates itself, "
                "but got a `ref_model` too. Leave `ref_model` out."
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
        return SecondAdapterReference(denoiser, adapter, engine)
    copied = second_copy(denoiser, shared=shared)
    return FrozenReference(copied, denoiser, engine, half_dtype=half_dtype, follows=follows)


def _with_scalings(users_module: nn.Module) -> dict[str, torch.Tensor]:
    """Return all tensors of a reference by name, and the scaling factors of its active LoRAs."""
    scalings = {
        f"{number}.{name}.scaling": torch.tensor(layer.scaling[name])
        for number, layer in enumerate(adapter_layers(users_module))
        for name in ([] if layer.disable_adapters else layer.active_adapters)
        if name in layer.scaling
    }
    return {**users_module.state_dict(), **scalings}


def _precomputed(denoiser: nn.Module, fresh_adapter: str | None, started_adapter: str | None) -> PrecomputedReference:
    """Return a reference that is the policy before training, and whose errors are computed before training."""

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
    """Raise `ValueError` if the reference has another architecture than the policy."""
    difference = architecture_difference(policy, reference)
    if difference is not None:
        raise UserError(
            f"`ref_model` must have the architecture of `model`: {difference}. Use the checkpoint that the policy "
            "started from."
        )


def architecture_difference(policy: nn.Module, reference: nn.Module) -> str | None:
    """Describe how `reference` differs from `policy` in class or in the names and shapes of tensors, adapters aside, or
    return `None`."""
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
