"""The memory of a set-up: what stays on the device, what each moment of a step adds, and the disk that a run takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..models.shadow_weights import SecondAdapter, SecondDenoiser, ShadowWeights
from .allocations import rounded
from .fake_device import fake_device
from .fake_step import (
    BACKWARD,
    ENCODE,
    FORWARD,
    OPTIMIZER,
    REFERENCE,
    Networks,
    StepMemory,
    StepSettings,
    all_modules,
    measure_step,
)
from .layouts import Layout
from .optimizers import optimizer_memory
from .skeleton import fake_weights

FrozenState = Literal["on device", "while encoding", "absent"]
CARDS = (8, 16, 24, 40, 80, 141)  # GB as vendors count, 1e9 bytes, of usual GPUs
# Share of a card that PyTorch can give to tensors: the rest is CUDA's context, kernels' workspaces and fragmentation.
USABLE = 0.92

# Bytes a weight of a linear layer: the weight and a float32 scale for each block of 64, or of each row.
STORED: dict[str, float] = {
    "float8": 1.0,
    "4bit": 0.5 + 4 / 64,
    "4bit nested": 0.5 + 1 / 64 + 4 / (64 * 256),
    "8bit": 1.0,
}


@dataclass(frozen=True)
class Prepared:
    """A set-up, on the meta device, as the trainer makes it.

    Attributes:
        networks ([`Networks`]): Policy with its trained weights, reference, average, VAE and text encoders.
        optimizer (`str`): A value of `optim`.
        max_norm (`float`, *optional*): Gradients are clipped to it.
        frozen (`str`): Where VAE and text encoders are.
        stored (`str`, *optional*): How a quantized base is held, a key of [`STORED`].
        offloaded (`str`, *optional*): What of a frozen base is on the CPU when it is not used: the weights of `"block"`
            or of `"leaf"`.
        blocks (`int`): Neighbouring blocks that are on the device together.
        checkpoints (`int`): Checkpoints on disk at once, the newest and those that are kept.
    """

    networks: Networks
    step: StepSettings
    optimizer: str
    max_norm: float | None
    layout: Layout
    frozen: FrozenState = "on device"
    stored: str | None = None
    offloaded: str | None = None
    blocks: int = 1
    checkpoints: int = 1


@dataclass(frozen=True)
class Plan:
    """Bytes of a set-up on one device, computed.

    Attributes:
        components (`dict[str, int]`): What stays between steps, by name.
        moments (`dict[str, int]`): The peak of each moment, with what stays.
        parameters, trained (`int`): Weights of the denoiser, and those that train.
        flops (`int`): Of a micro-batch on one device.
        pairs (`int`): Of a micro-batch.
        disk (`dict[str, int]`): Bytes on disk, by name.
    """

    components: dict[str, int]
    moments: dict[str, int]
    parameters: int
    trained: int
    flops: int
    pairs: int
    disk: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name])

    def fits(self, gigabytes: float) -> bool:
        """Whether it fits on a card, with a margin for what PyTorch does not count."""
        return self.peak <= USABLE * gigabytes * 1e9


class Planner:
    """Plans set-ups for a device; passes that are alike are run once.

    Args:
        device (`str`): `"cuda"` or `"cpu"`.
    """

    def __init__(self, device: str):
        self._device = fake_device(device)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._passes: dict[object, StepMemory] = {}

    def plan(self, prepared: Prepared, key: object) -> Plan:
        """Plan a set-up.

        Args:
            key: Equal for set-ups whose forward and backward passes are the same.
        """
        networks, layout, block = prepared.networks, prepared.layout, self._device.block
        family = networks.family
        weights = list(family.denoiser.parameters())
        counts = sum(weight.numel() for weight in weights), sum(weight.numel() for weight in networks.trained)
        components = self._components(prepared)
        disk = _disk(prepared)
        fake_weights(all_modules(networks), self._mode)
        states, temporary = optimizer_memory(
            prepared.optimizer, networks.trained, prepared.max_norm, self._device, self._mode
        )
        if key not in self._passes:
            self._passes[key] = measure_step(networks, prepared.step, self._device, self._mode)
        measured = self._passes[key]
        components |= layout.trained_state(counts[1], states, block)
        dequantized = 2 * max((weight.numel() for weight in weights), default=0) if prepared.stored else 0
        extra = dequantized + layout.gathered(sum(weight.numel() * weight.element_size() for weight in weights))
        stays = sum(components.values())
        frozen = sum(components[name] for name in components if name in family.frozen_components)
        moments = {name: stays + measured.peaks.get(name, 0) + extra for name in (REFERENCE, FORWARD, BACKWARD)}
        moments[BACKWARD] += layout.buckets(counts[1])
        moments[OPTIMIZER] = stays + layout.share(measured.gradient_bytes + temporary)
        moments[ENCODE] = stays + measured.peaks.get(ENCODE, 0)
        if prepared.frozen != "on device":
            for name in (REFERENCE, FORWARD, BACKWARD, OPTIMIZER):
                moments[name] -= frozen
        if prepared.frozen == "absent":
            del moments[ENCODE]
            components = {name: size for name, size in components.items() if name not in family.frozen_components}
        if networks.reference.is_precomputed or networks.reference.kind == "none":
            del moments[REFERENCE]
        disk["checkpoints"] += prepared.checkpoints * states
        return Plan(components, moments, *counts, measured.flops, prepared.step.pairs, disk)

    def _components(self, prepared: Prepared) -> dict[str, int]:
        """Weights that stay, in bytes; VAE and text encoders by their names in the pipeline."""
        networks, layout, block = prepared.networks, prepared.layout, self._device.block
        family = networks.family
        second = _seconds(networks.reference)
        adapters = sum(_size(_adapter(held), block) for held in (networks.reference, networks.average) if held)
        policy = _size([family.denoiser], block) - adapters
        if prepared.stored is not None:
            policy -= _saved_by_quantization(family.denoiser, prepared.stored)
        if prepared.offloaded is not None:
            away, largest = _offloaded(family.denoiser, prepared.offloaded, prepared.blocks)
            policy -= away - 2 * largest  # the group that runs, and the one before, whose weights are still in use
        found = {"policy": layout.share_weights(policy)}
        found["reference"] = layout.share_weights(_size(second, block)) + _size(_adapter(networks.reference), block)
        if networks.average is not None:
            average = networks.average
            found["average"] = layout.share_weights(_size(_seconds(average), block)) + _size(_adapter(average), block)
        for name in family.frozen_components:
            found[name] = _size([getattr(family.pipeline, name)], block)
        return {name: size for name, size in found.items() if size}


def _seconds(weights: ShadowWeights) -> list[nn.Module]:
    return [weights.second.module] if isinstance(weights.second, SecondDenoiser) else []


def _adapter(weights: ShadowWeights | None) -> list[torch.Tensor]:
    if weights is None or not isinstance(weights.second, SecondAdapter):
        return []
    return list(weights.second.weights().values())


def _size(parts: Iterable[nn.Module | torch.Tensor], block: int) -> int:
    """Bytes of tensors, and of modules' parameters and buffers; what is shared counts once."""
    tensors: dict[int, torch.Tensor] = {}
    for part in parts:
        held = (*part.parameters(), *part.buffers()) if isinstance(part, nn.Module) else (part,)
        tensors |= {id(tensor): tensor for tensor in held}
    return sum(rounded(tensor.numel() * tensor.element_size(), block) for tensor in tensors.values())


def _saved_by_quantization(denoiser: nn.Module, kind: str) -> int:
    """Bytes that frozen weights of linear layers take less when quantized."""
    kinds = (nn.Linear, nn.Conv2d) if kind == "float8" else nn.Linear
    stored = STORED[kind]
    weights = [layer.weight for layer in denoiser.modules() if isinstance(layer, kinds)]
    return sum(
        round(weight.numel() * (weight.element_size() - stored)) for weight in weights if not weight.requires_grad
    )


def _offloaded(denoiser: nn.Module, unit: str, blocks: int) -> tuple[int, int]:
    """Bytes of frozen weights that are on the CPU, and those of the largest group that is brought together."""
    if unit == "leaf":
        groups = [[module] for module in denoiser.modules() if not list(module.children())]
    else:
        lists = [list(part) for part in denoiser.children() if isinstance(part, (nn.ModuleList, nn.Sequential))]
        groups = [part[first : first + blocks] for part in lists for first in range(0, len(part), blocks)]
    sizes = [
        _size((weight for part in group for weight in part.parameters() if not weight.requires_grad), 1)
        for group in groups
    ]
    return sum(sizes), max(sizes, default=0)


def _disk(prepared: Prepared) -> dict[str, int]:
    """Trained weights, as they are saved, and checkpoints; the optimizer's states are added to these."""
    trained = 4 * sum(weight.numel() for weight in prepared.networks.trained)
    average = trained if prepared.networks.average is not None else 0
    return {"results": trained + average, "checkpoints": prepared.checkpoints * (trained + average)}
