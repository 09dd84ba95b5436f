"""Computes the memory that a run needs on a device: tensors that stay between steps, and the peak in each phase of a
step, such as the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from ...step.stochastic_rounding import LOW_BITS
from ...utils._compat import FakeTensorMode
from ...utils.errors import UserError
from .allocations import block_size, rounded
from .fake_step import BACKWARD, ENCODE, FORWARD, OPTIMIZER, PlannedRun, measure_step
from .planned_engine import ZERO_BUCKET, largest_block
from .skeleton import fake_weights

SETUP = "set-up"
CARDS = (8, 16, 24, 40, 80, 141)  # memory of common GPUs in GB (1e9 bytes)
# Share of a GPU's memory for tensors. The rest is for CUDA's context, workspaces of kernels, and fragmentation.
USABLE = 0.92

_QUANTIZED = 1 + 4 / 256  # bytes per 8-bit value: one byte, and a float32 scale for each block of 256 values
# Optimizer -> (bytes of its states per weight, bytes of temporary tensors in its step per weight). What is small beside
# the weights counts as 0, and so do paged states, which move to the CPU if the device has no room for them.
OPTIMIZERS = {
    "adamw_torch": (8, 4),
    "adamw_torch_fused": (8, 0),
    "sgd": (0, 0),
    "adafactor": (0, 0),
    "adamw_bnb_8bit": (2 * _QUANTIZED, 0),
    "adamw_8bit": (2 * _QUANTIZED, 0),
    "lion_8bit": (_QUANTIZED, 0),
    "paged_adamw_8bit": (0, 0),
    "paged_adamw_32bit": (0, 0),
}
# Temporary bytes per value of torchao's step, which takes one weight after the other. Measured without its compiler; a
# compiled step takes less.
ONE_WEIGHT = 58
# Bytes per weight of a quantized linear layer. With 4 bits, each block of 64 weights also has a float32 scale.
STORED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}


@dataclass(frozen=True)
class Plan:
    """Computed memory of a run on one device, in bytes."""

    components: dict[str, int]  # bytes of tensors that stay between steps, by name
    phases: dict[str, int]  # peak of each phase in bytes, with those tensors

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    def fits(self, gigabytes: float) -> bool:
        """Return whether the run fits on a GPU with `gigabytes` GB, of which tensors get the share `USABLE`."""
        return self.peak <= USABLE * gigabytes * 1e9


def make_plan(run: PlannedRun, device: str) -> Plan:
    """Simulate one step on fake tensors, and return the run's memory.

    Args:
        run ([`PlannedRun`]): Networks and settings of the run.
        device (`str`): Type of the planned device, `"cuda"` or `"cpu"`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    engine, family = run.engine, run.family
    trained = sum(weight.numel() for weight in run.trained)
    states, temporary = _optimizer_bytes(run)

    # Compute the tensors that stay between steps.
    components = _weights(run, block_size(device))
    frozen = sum(size for name, size in components.items() if name in family.frozen_components)
    absent = frozen if run.args.precompute_latents or run.args.offload_frozen_components else 0  # except to encode
    setup = sum(components.values()) - absent
    if engine.divides("weights"):  # one block at a time is whole in memory
        setup += largest_block(family.denoiser, None)[0]
    components["optimizer"] = engine.share("optimizer", states)
    if engine.name == "multi_gpu":
        components["DDP's buckets"] = 4 * trained
    if engine.is_zero:
        components["float32 weights"] = engine.share("optimizer", 4 * trained)
        components["DeepSpeed's bucket"] = ZERO_BUCKET * (2 if run.autocast else 4)
    if engine.divides("gradients"):
        components["gradients"] = engine.share("gradients", 4 * trained)

    # Simulate one step, as if on one device.
    passes = _in_passes(run)
    fake_weights(run.denoisers.values(), mode, run.autocast if engine.rounds_weights else None)
    fake_weights(run.frozen, mode)
    peaks, gradients = measure_step(run, device, mode)
    phases = {name: peaks.get(name, 0) for name in (ENCODE, FORWARD, BACKWARD)}
    phases[FORWARD] += passes
    phases[BACKWARD] += passes
    if run.steps_in_backward:
        phases[BACKWARD] += temporary  # at most: the largest weight may step beside fewer activations
    left = engine.share("gradients", gradients)
    step = left + engine.share("optimizer", temporary)
    phases[OPTIMIZER] = max(peaks.get(OPTIMIZER, 0), step)
    if engine.divides("gradients") and run.args.safeguard == "parameter":
        # The simulation holds the unsharded gradients of winners and of losers; the engine never holds both.
        spared = (gradients - left) // 2
        phases[BACKWARD] -= spared
        phases[OPTIMIZER] -= spared

    # Add the tensors that stay between steps to the peak in each phase.
    stays = sum(components.values())
    for name in phases:
        phases[name] += stays - (absent if name != ENCODE else 0)
    phases = {SETUP: setup, **phases}
    if run.args.precompute_latents:
        del phases[ENCODE]
        components = {name: size for name, size in components.items() if name not in family.frozen_components}
    return Plan({name: size for name, size in components.items() if size}, phases)


def table(plans: Mapping[str, Plan]) -> str:
    """Return a Markdown table with a row for each plan: peak memory, its phase, and the smallest GPU that fits."""
    lines = ["| training | peak, GiB | at | smallest card |", "|---|---:|---|---|"]
    for name, plan in plans.items():
        card = next((f"{card} GB" for card in CARDS if plan.fits(card)), "none of these")
        lines.append(f"| {name} | {plan.peak / 2**30:.2f} | {plan.peak_phase} | {card} |")
    return "\n".join(lines)


def _optimizer_bytes(run: PlannedRun) -> tuple[int, int]:
    """Return the bytes of the optimizer's states, and of temporary tensors in its step."""
    optimizer = OptimizerNames(run.args.optim)
    if optimizer in LOW_BITS:
        # A state has a byte or half a byte for each value, a float32 scale for each block of 256 values, and a float32
        # table of the values that its codes stand for. Those of small weights stay in float32.
        bits = LOW_BITS[optimizer]
        sizes = [weight.numel() for weight in run.trained]
        coded = [size for size in sizes if size >= 4096 and size % 256 == 0]
        state = sum(coded) * bits / 8 + sum(coded) * 4 / 256 + len(coded) * 4 * 2**bits
        return 2 * round(state + 4 * (sum(sizes) - sum(coded))), ONE_WEIGHT * max(sizes, default=0)
    if optimizer.value not in OPTIMIZERS:
        raise UserError(
            "A plan can only compute the memory of these optimizers: "
            f"{', '.join([*OPTIMIZERS, *(name.value for name in LOW_BITS)])}. Got `optim={optimizer.value}`. Set "
            "`optim` to an optimizer of this list."
        )
    trained = sum(weight.numel() for weight in run.trained)
    states, temporary = OPTIMIZERS[optimizer.value]
    return round(trained * states), round(trained * temporary)


def _weights(run: PlannedRun, block: int) -> dict[str, int]:
    """Return the bytes of the weights that stay between steps, by name: the policy, the reference and the averaged
    weights if these are separate models, and each frozen component of the pipeline."""
    engine, family = run.engine, run.family
    half = run.autocast is not None and engine.is_zero

    def stored_bytes(tensors: list[torch.Tensor]) -> int:
        total = 0
        for tensor in tensors:
            width = 2 if half and tensor.is_floating_point() else tensor.element_size()
            size = rounded(tensor.numel() * width, block)
            total += engine.share("weights", size) if isinstance(tensor, nn.Parameter) else size
        return total

    sizes = {name: stored_bytes(_tensors(module)) for name, module in run.denoisers.items()}
    if run.stored is not None:
        for layer in family.denoiser.modules():
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                saved = layer.weight.element_size() - STORED[run.stored]
                sizes["policy"] -= round(layer.weight.numel() * saved)
    for name in family.frozen_components:
        tensors = _tensors(getattr(family.pipeline, name))
        sizes[name] = sum(rounded(tensor.numel() * tensor.element_size(), block) for tensor in tensors)
    return sizes


def _in_passes(run: PlannedRun) -> int:
    """Return the bytes of temporary copies of weights in a forward or backward pass.

    A quantized base is dequantized to half precision one layer at a time. An engine that shards weights gathers the
    current block, the next one, and all weights outside of blocks.
    """
    denoiser = run.family.denoiser
    extra = 0
    if run.stored is not None:
        extra += max((2 * weight.numel() for weight in denoiser.parameters()), default=0)
    if run.engine.divides("weights"):
        block, outside = largest_block(denoiser, 2 if run.autocast else None)
        extra += 2 * block + outside
    return extra


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return a module's parameters and buffers. One that several submodules share appears once."""
    return [*module.parameters(), *module.buffers()]
