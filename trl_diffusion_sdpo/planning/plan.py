"""Computes the memory that a run needs on a device: tensors that stay between steps, and the peak in each phase of a
step. A phase is called a moment, such as the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..models.adapters import adapter_layers
from ..models.weight_copies import SecondAdapter, SecondDenoiser, WeightCopy
from .allocations import fake_device, rounded
from .fake_step import (
    BACKWARD,
    ENCODE,
    FORWARD,
    OPTIMIZER,
    REFERENCE,
    PlannedRun,
    all_modules,
    measure_step,
)
from .optimizers import optimizer_memory
from .sharding import ZERO_BUCKET, largest_block
from .skeleton import fake_weights

SETUP = "set-up"
CARDS = (8, 16, 24, 40, 80, 141)  # memory of common GPUs in GB (1e9 bytes)
# Share of a GPU's memory that tensors can use. The rest is for CUDA's context, workspaces of kernels, and
# fragmentation.
USABLE = 0.92

# Bytes per weight of a quantized linear layer. In 4 bits, each block of 64 weights also has a float32 scale.
STORED: dict[str, float] = {
    "4bit": 0.5 + 4 / 64,
    "4bit nested": 0.5 + 1 / 64 + 4 / (64 * 256),
    "8bit": 1.0,
}


@dataclass(frozen=True)
class Plan:
    """Computed memory of a run on one device, in bytes."""

    components: dict[str, int]  # bytes of the tensors that stay between steps, by name
    moments: dict[str, int]  # peak in each moment, including the tensors that stay between steps
    parameters: int  # number of weights of the denoiser
    trained: int  # number of weights that are trained
    flops: int  # floating point operations of a micro-batch on one device
    pairs: int  # pairs of a micro-batch

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name])

    def fits(self, gigabytes: float) -> bool:
        """Return whether the run fits on a GPU with `gigabytes` GB, with a margin for memory besides tensors."""
        return self.peak <= USABLE * gigabytes * 1e9


def make_plan(run: PlannedRun, device: str) -> Plan:
    """Simulate one step on fake tensors, and return the memory of the run.

    Args:
        run ([`PlannedRun`]): Networks and settings of the run.
        device (`str`): Type of the planned device, `"cuda"` or `"cpu"`.
    """
    fake = fake_device(device)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    engine, family = run.engine, run.family
    trained = sum(weight.numel() for weight in run.trained)
    parameters = sum(weight.numel() for weight in family.denoiser.parameters())

    # Compute the tensors that stay between steps.
    states, temporary = optimizer_memory(run.optimizer, run.trained, run.max_norm, fake, mode)
    components = _weights(run, fake.block)
    frozen = sum(size for name, size in components.items() if name in family.frozen_components)
    setup = sum(components.values()) - (0 if run.frozen == "on device" else frozen)
    if engine.divides_weights:  # while the weights are sharded, one block is in memory whole
        setup += largest_block(family.denoiser, None)[0]
    components["optimizer"] = engine.share("optimizer", states)
    if engine.name == "ddp":
        components["DDP's buckets"] = 4 * trained
    if engine.is_zero:
        components["float32 weights"] = engine.share("optimizer", 4 * trained)
        components["DeepSpeed's bucket"] = ZERO_BUCKET * (2 if run.autocast else 4)
    if engine.divides_gradients:
        components["gradients"] = engine.share("gradients", 4 * trained)

    # Simulate one step on fake tensors, as if on one device.
    passes = _in_passes(run)
    fake_weights(all_modules(run), mode)
    measured = measure_step(run, fake, mode)
    moments = {name: measured.peaks.get(name, 0) for name in (ENCODE, REFERENCE, FORWARD, BACKWARD)}
    for name in (REFERENCE, FORWARD, BACKWARD):
        moments[name] += passes
    left = engine.share("gradients", measured.gradient_bytes)
    step = left + engine.share("optimizer", temporary)
    moments[OPTIMIZER] = max(measured.peaks.get(OPTIMIZER, 0), step)
    if engine.divides_gradients and run.anchor is not None:
        # The simulation holds the unsharded gradients of both branches. The engine holds those of one branch at a time.
        spared = (measured.gradient_bytes - left) // 2
        moments[BACKWARD] -= spared
        moments[OPTIMIZER] -= spared

    # Add the tensors that stay to the peak in each moment.
    stays = sum(components.values())
    for name in moments:
        moments[name] += stays - (frozen if run.frozen != "on device" and name != ENCODE else 0)
    moments = {SETUP: setup, **moments}
    if run.frozen == "absent":
        del moments[ENCODE]
        components = {name: size for name, size in components.items() if name not in family.frozen_components}
    if run.reference.is_precomputed or run.reference.kind == "none":
        del moments[REFERENCE]
    components = {name: size for name, size in components.items() if size}
    return Plan(components, moments, parameters, trained, measured.flops, run.pairs)


def _weights(run: PlannedRun, block: int) -> dict[str, int]:
    """Return the bytes of the weights that stay between steps: of the policy, the reference, the averaged weights, and
    each frozen component of the pipeline."""
    engine, family = run.engine, run.family
    half = run.autocast is not None and engine.is_zero
    copies: dict[str, WeightCopy | None] = {"reference": run.reference, "average": run.average}

    def stored_bytes(tensors: list[torch.Tensor]) -> int:
        total = 0
        for tensor in tensors:
            width = 2 if half and tensor.is_floating_point() else tensor.element_size()
            size = rounded(tensor.numel() * width, block)
            total += engine.share("weights", size) if isinstance(tensor, nn.Parameter) else size
        return total

    adapters = {name: _adapter(copy) for name, copy in copies.items()}
    others = {id(weight) for weights in adapters.values() for weight in weights}
    policy = stored_bytes([tensor for tensor in _tensors(family.denoiser) if id(tensor) not in others])
    if run.stored is not None:
        adapted = adapter_layers(family.denoiser)
        of_adapters = {module for layer in adapted for module in layer.modules()}
        of_adapters -= {layer.get_base_layer() for layer in adapted}
        for layer in family.denoiser.modules():
            if isinstance(layer, nn.Linear) and layer not in of_adapters and not layer.weight.requires_grad:
                policy -= round(layer.weight.numel() * (layer.weight.element_size() - STORED[run.stored]))
    sizes = {"policy": policy}
    for name, copy in copies.items():
        second = None if copy is None else copy.second
        sizes[name] = stored_bytes(adapters[name])
        if isinstance(second, SecondDenoiser):
            sizes[name] += stored_bytes(_tensors(second.module))
    for name in family.frozen_components:
        tensors = _tensors(getattr(family.pipeline, name))
        sizes[name] = sum(rounded(tensor.numel() * tensor.element_size(), block) for tensor in tensors)
    return sizes


def _in_passes(run: PlannedRun) -> int:
    """Return the bytes of the temporary weights of a forward or backward pass.

    A quantized base model needs one layer at a time in half precision. If the engine shards weights, it gathers the
    current block, the next block, and all weights outside of blocks.
    """
    denoiser = run.family.denoiser
    extra = 0
    if run.stored is not None:
        extra += max((2 * weight.numel() for weight in denoiser.parameters()), default=0)
    if run.engine.divides_weights:
        block, outside = largest_block(denoiser, 2 if run.autocast else None)
        extra += 2 * block + outside
    return extra


def _adapter(weights: WeightCopy | None) -> list[torch.Tensor]:
    if weights is None or not isinstance(weights.second, SecondAdapter):
        return []
    return list(weights.second.weights().values())


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of a module. A tensor that several submodules share appears once."""
    return [*module.parameters(), *module.buffers()]
