"""The memory of a set-up: what stays on the device, what each moment of a step adds, and the disk that a run takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..models.adapters import adapter_layers
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
        checkpoints (`int`): Checkpoints on disk at once, the newest and those that are kept.
        variants (`int`): Crops and flips of each image in a cache.
        draws (`int`): Of the noise of each pair, for which a cache has the reference's errors.
    """

    networks: Networks
    step: StepSettings
    optimizer: str
    max_norm: float | None
    layout: Layout
    frozen: FrozenState = "on device"
    stored: str | None = None
    checkpoints: int = 1
    variants: int = 1
    draws: int = 1


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
        cached (`dict[str, int]`): Bytes that caches take on disk for a pair with images and a prompt of its own, by
            name; without the zeros at the end of a prompt that they leave out.
    """

    components: dict[str, int]
    moments: dict[str, int]
    parameters: int
    trained: int
    flops: int
    pairs: int
    disk: dict[str, int] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)

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

    def plan(self, prepared: Prepared) -> Plan:
        """Plan a set-up."""
        networks, step, family = prepared.networks, prepared.step, prepared.networks.family
        weights = list(family.denoiser.parameters())
        counts = sum(weight.numel() for weight in weights), sum(weight.numel() for weight in networks.trained)
        disk, (components, states, temporary) = _disk(prepared), self._held(prepared)
        key = _key(prepared)
        disk["checkpoints"] += prepared.checkpoints * states
        buffers = self._buffers(prepared)
        fake_weights(all_modules(networks), self._mode)
        if key not in self._passes:
            self._passes[key] = measure_step(networks, step, self._device, self._mode)
        measured = self._passes[key]
        moments = {name: measured.peaks.get(name, 0) + size for name, size in buffers.items()}
        # The two branches combined, or the step.
        moments[OPTIMIZER] = max(measured.peaks.get(OPTIMIZER, 0), _optimizer_step(prepared, measured, temporary))
        frozen = sum(components[name] for name in components if name in family.frozen_components)
        stays = sum(components.values())
        for name in moments:
            away = prepared.frozen != "on device" and name != ENCODE
            moments[name] += stays - (frozen if away else 0)
        if prepared.frozen == "absent":
            del moments[ENCODE]
            components = {name: size for name, size in components.items() if name not in family.frozen_components}
        if networks.reference.is_precomputed or networks.reference.kind == "none":
            del moments[REFERENCE]
        return Plan(components, moments, *counts, measured.flops, step.pairs, disk, _cached(prepared, measured))

    def components(self, prepared: Prepared) -> dict[str, int]:
        """Bytes of what stays between steps, by name, VAE and text encoders included: [`Plan.components`] without the
        passes of a step."""
        return self._held(prepared)[0]

    def _held(self, prepared: Prepared) -> tuple[dict[str, int], int, int]:
        """What stays; the optimizer's states of all processes together, and what its step allocates."""
        trained = prepared.networks.trained
        states, temporary = optimizer_memory(prepared.optimizer, trained, prepared.max_norm, self._device, self._mode)
        count, by_branch = sum(weight.numel() for weight in trained), prepared.step.anchor is not None
        found = self._weights(prepared) | prepared.layout.trained_state(count, states, by_branch=by_branch)
        return found, states, temporary

    def _buffers(self, prepared: Prepared) -> dict[str, int]:
        """What passes allocate for weights and gradients besides what [`measure_step`] counts, by moment."""
        denoiser, layout = prepared.networks.family.denoiser, prepared.layout
        weights, dequantized = list(denoiser.parameters()), 0
        if prepared.stored:
            dequantized = max((weight.numel() * 2 for weight in weights), default=0)
        extra = dequantized + layout.gathered(denoiser)
        if isinstance(prepared.networks.reference.second, SecondDenoiser):
            extra += layout.left_gathered(prepared.networks.reference.second.module)
        return {REFERENCE: extra, FORWARD: extra, BACKWARD: extra + layout.reducing(denoiser), ENCODE: 0}

    def _weights(self, prepared: Prepared) -> dict[str, int]:
        """Weights that stay, in bytes; VAE and text encoders by their names in the pipeline."""
        networks, layout, block = prepared.networks, prepared.layout, self._device.block
        family, denoiser = networks.family, networks.family.denoiser
        shadows = {"reference": networks.reference, "average": networks.average}
        adapters = {name: _adapter(held) for name, held in shadows.items()}
        others = {id(weight) for weights in adapters.values() for weight in weights}
        policy = sum(layout.held(one, block) for one in _tensors(denoiser) if id(one) not in others)
        if prepared.stored is not None:
            policy -= _saved_by_quantization(_quantized(denoiser), prepared.stored, layout)
        found = {"policy": policy}
        for name, shadow in shadows.items():
            found[name] = 0 if shadow is None else self._of_shadow(shadow, adapters[name], layout)
        for name in family.frozen_components:
            found[name] = sum(_bytes(one, block) for one in _tensors(getattr(family.pipeline, name)))
        return {name: size for name, size in found.items() if size}

    def _of_shadow(self, shadow: ShadowWeights, adapter: list[torch.Tensor], layout: Layout) -> int:
        """Bytes of a reference or an average; `stored` are those that move, which an engine may not round."""
        second = shadow.second.module if isinstance(shadow.second, SecondDenoiser) else nn.Module()
        held = [*adapter, *_tensors(second)]
        exact = layout.rounded_in_place(sum(one.numel() for one in held)) if shadow.stored else 0
        copy = not shadow.stored
        return layout.share(exact) + sum(layout.held(one, self._device.block, rounded_copy=copy) for one in held)


def _optimizer_step(prepared: Prepared, measured: StepMemory, temporary: int) -> int:
    """Gradients, and what clipping and the optimizer's step allocate."""
    layout, trained = prepared.layout, sum(weight.numel() for weight in prepared.networks.trained)
    if prepared.step.shards > 1:
        left = measured.gradient_bytes
    else:
        left = layout.share(max(measured.gradient_bytes, 4 * trained if layout.name == "fsdp2" else 0))
    return left + layout.share(temporary + layout.rounded_in_place(trained))


def _cached(prepared: Prepared, measured: StepMemory) -> dict[str, int]:
    step = prepared.step
    return {
        "latents": measured.moments_bytes * prepared.variants // step.pairs,
        "prompts": measured.prompt_bytes // step.pairs,
        "reference errors": prepared.draws * step.noise.timesteps_per_pair * 2 * 4,
    }


def _key(prepared: Prepared) -> object:
    """Equal for set-ups whose forward and backward passes are the same."""
    family = prepared.networks.family
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for module in all_modules(prepared.networks)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    layers = [type(layer) for module in all_modules(prepared.networks) for layer in module.modules()]
    config = repr(sorted(family.denoiser.config.items(), key=lambda entry: entry[0]))
    of_family = type(family), family.guidance_scale, family.vae_encode_batch_size
    return repr((prepared.step, prepared.networks.reference.kind, of_family, config, tensors, layers))


def _adapter(weights: ShadowWeights | None) -> list[torch.Tensor]:
    if weights is None or not isinstance(weights.second, SecondAdapter):
        return []
    return list(weights.second.weights().values())


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers; what is shared once."""
    return [*module.parameters(), *module.buffers()]


def _bytes(tensor: torch.Tensor, block: int) -> int:
    return rounded(tensor.numel() * tensor.element_size(), block)


def _quantized(denoiser: nn.Module) -> set[Any]:
    """Frozen linear layers, whose weights are stored in fewer bits; those of adapters are not."""
    adapters = {part for layer in adapter_layers(denoiser) for part in layer.modules()}
    adapters -= {layer.get_base_layer() for layer in adapter_layers(denoiser)}
    linear = {layer for layer in denoiser.modules() if isinstance(layer, nn.Linear)}
    return {layer for layer in linear - adapters if not layer.weight.requires_grad}


def _saved_by_quantization(layers: set[Any], kind: str, layout: Layout) -> int:
    """Bytes that the weights of these layers take less when quantized. Engines do not shard such weights."""
    return sum(layout.held(layer.weight, 1) - round(layer.weight.numel() * STORED[kind]) for layer in layers)


def _disk(prepared: Prepared) -> dict[str, int]:
    """Trained weights, as they are saved, and checkpoints; the optimizer's states are added to these."""
    trained = 4 * sum(weight.numel() for weight in prepared.networks.trained)
    average = trained if prepared.networks.average is not None else 0
    return {"results": trained + average, "checkpoints": prepared.checkpoints * (trained + average)}
