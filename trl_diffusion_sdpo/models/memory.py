"""Less memory for the frozen base of a LoRA, attention back ends, and compiled blocks.

diffusers' own hooks for storage in 8 bits and for offloading are made for inference. They exchange the data of a
parameter that the backward pass is yet to read: convolutions then fail or use other bits. They do not free weights that
the graph holds, and they move the weights of a LoRA away from their gradients. Here other parameters are assigned in
place of the stored ones: what autograd has saved stays as it is, or is brought again. Which layers may be stored in 8
bits, which blocks repeat and which attention back ends exist is taken from diffusers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..utils._compat import (
    attention_backends,
    has_attention_backends,
    layers_in_full,
    reads_weights_in_their_layers,
    repeated_blocks,
)
from ..utils.hints import did_you_mean
from .numerics import AUTOCAST_LAYERS

NO_BACKWARD = "sage"  # quantized attention, in the names of back ends


@dataclass(eq=False)
class _Weight:
    """A frozen parameter: its place, and its values as they are stored."""

    module: nn.Module
    name: str
    stored: torch.Tensor
    dtype: torch.dtype  # in which it is used
    half_dtype: torch.dtype | None  # in which autocast would use it
    placeholder: nn.Parameter  # without elements; in its place while it is not used

    def fetch(self, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """Its values on the device, without waiting for the copy."""
        return self.stored.to(device, non_blocking=True).to(dtype or self.dtype)


class StoredBase:
    """The frozen weights of a denoiser under a LoRA, stored on the CPU or in 8 bits, and brought where they are used.

    What autograd saves of them is not kept but brought again for the backward pass. `state_dict` has the stored values.
    Those that autocast would cast are brought in its dtype under autocast: autograd would save what it has cast.

    Args:
        denoiser (`nn.Module`): All its adapters are added.
        device (`torch.device`): Where it runs.
        casting (`torch.dtype`, *optional*): An 8-bit dtype, in which linear and convolution weights are stored that
            diffusers stores so; biases, norms and embeddings are not.
        half_dtype (`torch.dtype`, *optional*): The dtype of autocast.
        offload (`str`, *optional*): `"block"` for the weights of repeated blocks, `"leaf"` for those of all layers.
        blocks (`int`): Neighbouring blocks that are on the device together.

    Raises:
        `ValueError`: If weights are quantized already or have values that the 8-bit dtype does not have, or the
            denoiser does not allow `"leaf"`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        device: torch.device,
        casting: torch.dtype | None = None,
        half_dtype: torch.dtype | None = None,
        offload: str | None = None,
        blocks: int = 1,
    ):
        self._device, self._casting, self._half_dtype = device, casting, half_dtype
        self._resident: list[_Weight] = []  # that are not offloaded
        self._live: dict[int, _Weight] = {}  # by the address of what was brought
        self._current: list[_Weight] = []  # of the block that was brought last
        self._saving = contextlib.ExitStack()
        check_offload(denoiser, offload)
        self._castable = set() if casting is None else cast_layers(denoiser)
        owners = {owner: (name, user) for name, owner, user in weight_owners(denoiser)}
        for group in block_groups(denoiser, blocks) if offload == "block" else []:
            within = {owner: owners.pop(owner) for block in group for _, owner, _ in weight_owners(block)}
            weights = [part for owner, (name, _) in within.items() for part in self._store(name, owner, offload=True)]
            # A UNet checkpoints the layers within its blocks: in the backward pass they run without their block.
            for module in dict.fromkeys([*group, *(user for _, user in within.values())]):
                module.register_forward_pre_hook(self._bring_block(weights), prepend=True)
        for owner, (name, user) in owners.items():
            weights = self._store(name, owner, offload=offload == "leaf")
            if weights:
                user.register_forward_pre_hook(self._bring_layer(weights), prepend=True)
                user.register_forward_hook(self._drop_layer(weights), always_call=True)
        denoiser.register_forward_pre_hook(self._begin, prepend=True)
        denoiser.register_forward_hook(self._end, always_call=True)

    # ---- Storing --------------------------------------------------------------------------------------------------

    def _store(self, name: str, owner: nn.Module, *, offload: bool) -> list[_Weight]:
        """Take a module's own frozen parameters out of it: all to offload them, or those that are cast."""
        half_dtype = self._half_dtype if isinstance(owner, AUTOCAST_LAYERS) else None
        weights = []
        for key, parameter in list(owner.named_parameters(recurse=False)):
            is_cast = owner in self._castable and parameter.dim() > 1
            if parameter.requires_grad or not (offload or is_cast):
                continue
            _check_plain(f"{name}.{key}", parameter)
            stored = self._cast(f"{name}.{key}", parameter) if is_cast else parameter.detach()
            stored = self._on_host(stored) if offload else stored
            empty = nn.Parameter(torch.empty(0, dtype=parameter.dtype, device=self._device), requires_grad=False)
            weights.append(_Weight(owner, key, stored, parameter.dtype, half_dtype, empty))
        if weights:
            owner.register_state_dict_post_hook(_with_stored(weights))
        self._resident += [] if offload else weights
        self._drop(weights)
        return weights

    def _cast(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        assert self._casting is not None
        values, largest = parameter.detach().to(self._device), torch.finfo(self._casting).max
        if not bool((values.abs() <= largest).all()):  # casting would clamp them or make them infinite
            raise ValueError(
                f"`layerwise_casting={str(self._casting).removeprefix('torch.')!r}` holds numbers up to {largest:g}, "
                f"and {name} has larger ones. Leave it out."
            )
        return values.to(self._casting).to(parameter.device)

    def _on_host(self, values: torch.Tensor) -> torch.Tensor:
        values = values.cpu()
        return values if self._device.type == "cpu" else values.pin_memory()  # a copy from other memory would wait

    def to_device(self) -> None:
        """Move what is not offloaded to the device, before training; until then it is where it was loaded."""
        for weight in self._resident:
            weight.stored = weight.stored.to(self._device)

    # ---- Bringing -------------------------------------------------------------------------------------------------

    def _bring(self, weights: list[_Weight]) -> None:
        in_half = torch.is_autocast_enabled(self._device.type)
        for weight in weights:
            value = weight.fetch(self._device, weight.half_dtype if in_half else None)
            self._live[_address(value)] = weight
            setattr(weight.module, weight.name, nn.Parameter(value, requires_grad=False))

    def _drop(self, weights: list[_Weight]) -> None:
        for weight in weights:
            self._live.pop(_address(getattr(weight.module, weight.name)), None)
            setattr(weight.module, weight.name, weight.placeholder)

    def _bring_layer(self, weights: list[_Weight]) -> Any:
        return lambda *_: self._bring(weights)

    def _drop_layer(self, weights: list[_Weight]) -> Any:
        return lambda *_: self._drop(weights)

    def _bring_block(self, weights: list[_Weight]) -> Any:
        """A hook that brings a group of blocks if it is not there, and drops the one before it. A group is not dropped
        after its last block, which in the backward pass is the first that runs again, and may end early."""

        def enter(*_: Any) -> None:
            if self._current is not weights:
                self._drop(self._current)
                self._current = weights
                self._bring(weights)

        return enter

    def _begin(self, *_: Any) -> None:
        self._saving = contextlib.ExitStack()
        if torch.is_grad_enabled():
            self._saving.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))

    def _end(self, *_: Any) -> None:
        self._saving.close()
        self._drop(self._current)
        self._current = []

    def _pack(self, tensor: torch.Tensor) -> Any:
        weight = self._live.get(_address(tensor))
        if weight is None or tensor.dtype not in (weight.dtype, weight.half_dtype):
            return tensor
        return weight, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        weight, dtype, *layout = packed  # the backward pass runs outside autocast
        return weight.fetch(self._device, dtype).as_strided(*layout)


def block_groups(denoiser: nn.Module, blocks: int) -> list[list[nn.Module]]:
    """The members of a denoiser's lists of modules, in groups of so many neighbours."""
    lists = [list(part) for part in denoiser.children() if isinstance(part, (nn.ModuleList, nn.Sequential))]
    return [part[first : first + blocks] for part in lists for first in range(0, len(part), blocks)]


def cast_layers(denoiser: nn.Module) -> set[nn.Module]:
    """The layers whose weights diffusers stores in 8 bits."""
    in_full = layers_in_full(denoiser)
    return {
        owner
        for name, owner, _ in weight_owners(denoiser)
        if isinstance(owner, AUTOCAST_LAYERS) and not _matches(name, in_full)
    }


def check_offload(denoiser: nn.Module, offload: str | None) -> None:
    """Raise `ValueError` where a denoiser does not allow `"leaf"`."""
    if offload == "leaf" and not reads_weights_in_their_layers(denoiser):
        raise ValueError(
            f"`group_offload='leaf'` cannot act: diffusers' {type(denoiser).__name__} reads weights of layers that "
            "it does not call. Use `group_offload='block'`."
        )


def weight_owners(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules without those of adapters, each with its name and the module in whose forward pass its parameters are
    read: the layers of PEFT read those of the layer that they wrap."""
    if isinstance(module, BaseTunerLayer):
        yield from ((prefix, part, module) for part in module.get_base_layer().modules())
        return
    yield prefix, module, module
    for name, child in module.named_children():
        yield from weight_owners(child, f"{prefix}.{name}" if prefix else name)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern is found in a module's name, or in that of a module around it."""
    parts = name.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(re.search(pattern, part) for pattern in patterns for part in around)


def _check_plain(name: str, parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        raise ValueError(
            "`layerwise_casting` and `group_offload` need weights that are not quantized: those of quantized layers "
            f"belong together with their scales. {name} is a {type(parameter).__name__} of {parameter.dtype}. Leave "
            "one of the two out."
        )


def _with_stored(weights: list[_Weight]) -> Any:
    def fill(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.update({prefix + weight.name: weight.stored for weight in weights})

    return fill


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# ---- Compiled blocks, and attention ----------------------------------------------------------------------------------


def compile_blocks(denoiser: ModelMixin, backend: str | None, mode: str | None) -> None:
    """Compile the blocks that a denoiser repeats, in place; each kind of block is compiled once.

    Raises:
        `ValueError`: If diffusers names no repeated blocks of it.
    """
    if not repeated_blocks(denoiser):
        raise ValueError(
            f"`torch_compile_regional` compiles repeated blocks, and diffusers names none of {type(denoiser).__name__}."
            " Leave it off: `torch_compile` then compiles the whole model."
        )
    denoiser.compile_repeated_blocks(backend=backend, mode=mode)


def set_attention(denoiser: ModelMixin, backend: str) -> None:
    """Choose the attention back end of a denoiser, by diffusers' name for it; for other models of the process, too.

    Raises:
        `ValueError`: If diffusers has no such back end, its package is missing, it has no backward pass, or it would
            not be used.
    """
    known, name = type(denoiser).__name__, backend.lower()
    if name not in attention_backends():
        raise ValueError(
            f"`attention_backend` must be one of {', '.join(attention_backends())}; got {backend!r}."
            f"{did_you_mean(name, attention_backends())}"
        )
    if NO_BACKWARD in name:
        raise ValueError(
            f"`attention_backend={backend!r}` quantizes queries and keys and has no backward pass. Use another one."
        )
    if not has_attention_backends(denoiser):
        raise ValueError(
            f"`attention_backend` cannot act: diffusers' {known} calls PyTorch's own attention, which chooses a kernel "
            "by itself (FlashAttention on most GPUs). Leave it unset."
        )
    try:
        denoiser.set_attention_backend(name)
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`attention_backend={backend!r}` cannot be used here: {reason}") from error
