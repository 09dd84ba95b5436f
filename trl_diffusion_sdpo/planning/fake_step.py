"""Simulation of the trainer's forward and backward passes on fake tensors, without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ..data.transforms import pixels_as_floats, white
from ..engines.gradient_backends import ReplicatedBackend
from ..families import Family
from ..families.base import SOURCE
from ..families.noise import constant
from ..losses import Anchor
from ..models.denoiser_wrapper import DenoiserWrapper
from ..models.ema import EMAWeights
from ..models.reference import Reference
from ..models.weight_copies import SecondDenoiser
from ..step.branch_gradients import BranchGradients
from ..step.meters import MetricMeter
from ..step.pair_forward import LossSettings, NoiseSettings, NoisyBatch, PairForward
from ..step.parameter_safeguard import ParameterSafeguard
from .allocations import Allocations, FakeDevice
from .sharding import Engine
from .skeleton import needs_values

FrozenState = Literal["on device", "while encoding", "absent"]
ENCODE, REFERENCE, FORWARD, BACKWARD, OPTIMIZER = "encode", "reference", "forward", "backward", "optimizer"


@dataclass(frozen=True)
class PlannedRun:
    """Networks of a planned run on the meta device, and the settings on which the run's memory depends."""

    family: Family  # pipeline family, with VAE and text encoders in the dtypes of training
    reference: Reference
    average: EMAWeights | None
    noise: NoiseSettings
    loss: LossSettings
    resolution: tuple[int, int]  # height and width of the images in pixels
    source: tuple[int, int] | None  # height and width of a pair's source image as the VAE encodes it
    pairs: int  # pairs of a micro-batch
    autocast: torch.dtype | None  # dtype of autocast; `None` without autocast
    checkpointing: dict[str, Any] | None  # arguments of activation checkpointing; `None` if it is off
    anchor: Anchor | None  # anchor of the safeguard in parameter space; `None` without this safeguard
    low_memory: bool  # whether the safeguard in parameter space holds only one branch's activations at a time
    accumulates: bool  # whether an optimizer step has several micro-batches
    two_prompts: bool  # whether each image of a pair has its own prompt
    optimizer: str  # a value of `optim`
    max_norm: float | None  # norm to which gradients are clipped
    engine: Engine
    frozen: FrozenState  # when VAE and text encoders are on the device
    stored: str | None  # storage format of a quantized base model, a key of `plan.STORED`

    @property
    def trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.family.denoiser.parameters() if weight.requires_grad]


@dataclass(frozen=True)
class StepMemory:
    """Memory in bytes that one simulated step needs in addition to the weights, and the step's FLOP."""

    peaks: dict[str, int]  # peak of each moment: activations, gradients, temporary tensors and the batch
    gradient_bytes: int  # bytes in use when the optimizer steps
    flops: int  # floating point operations of matrix products, convolutions and attention


class OneProcess:
    """Substitute for accelerate's `Accelerator` in the simulation, with one process and no gradient scaler."""

    scaler = None
    num_processes = 1

    def __init__(self, dtype: torch.dtype | None):
        self._dtype = dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._dtype is None else torch.autocast("cpu", self._dtype)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class HeldComponents:
    """Substitute for [`~trl_diffusion_sdpo.models.frozen_components.FrozenComponents`] in the simulation. This
    class keeps all components on the device. The plan later subtracts the components that the run offloads."""

    def __init__(self, family: Family):
        self.family = family

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Family]:
        yield self.family


class MeasuredForward(PairForward):
    """Forward passes of the simulated step. The memory of encoding and of the reference's forward pass is measured
    separately."""

    allocations: Allocations

    def encode(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Encode images and prompts as a separate moment, and pass the results on like precomputed latents."""
        with self.allocations.moment(ENCODE), torch.no_grad():
            with self._frozen.in_use() as family:
                moments = family.image_moments(pixels_as_floats(inputs["pixel_values"]))
                try:
                    conditioning = family.encode_prompts(inputs["prompts"])
                except Exception as error:  # the substitutes of tensors and tokenizers have no values
                    raise needs_values(family.name) from error
                if "source_pixels" in inputs:
                    source = family.encode_images(pixels_as_floats(inputs["source_pixels"]))
                    conditioning[f"{SOURCE}0"] = source
            size = tuple(inputs["pixel_values"].shape[-2:])
            return super().encode({**inputs, "moments": moments, "conditioning": conditioning, "target_size": size})

    def predict_reference(self, model: nn.Module, batches: Sequence[NoisyBatch]) -> list[torch.Tensor] | None:
        with self.allocations.moment(REFERENCE):
            return super().predict_reference(model, batches)


def measure_step(run: PlannedRun, device: FakeDevice, mode: FakeTensorMode) -> StepMemory:
    """Run the trainer's forward and backward passes of a step on fake tensors, and return the memory that they need."""
    denoiser = run.family.denoiser
    model = DenoiserWrapper(denoiser).train()
    if run.checkpointing is not None:
        model.activation_checkpointing_enable(run.checkpointing)
    if run.engine.rounds_weights and run.autocast is not None:
        _round_weights(run, run.autocast, mode)
    try:
        with mode, device.autocast_rules():
            return _measure(model, run, device)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise needs_values(run.family.name) from error
    finally:
        for cached in (constant, white):  # later code must not get fake tensors from these caches
            cached.cache_clear()
        if run.checkpointing is not None:
            denoiser.disable_gradient_checkpointing()
        for weight in run.trained:
            weight.grad = None


def _measure(model: nn.Module, run: PlannedRun, device: FakeDevice) -> StepMemory:
    allocations = Allocations(device.block, device.hidden)
    modules = all_modules(run)
    allocations.ignore([tensor for module in modules for tensor in (*module.parameters(), *module.buffers())])
    components: Any = HeldComponents(run.family)
    process: Any = OneProcess(run.autocast)
    forward = MeasuredForward(components, run.reference, noise=run.noise, loss=run.loss, autocast=process.autocast)
    forward.allocations = allocations
    with allocations:
        inputs = _batch(run)
        if run.anchor is not None:
            backend = ReplicatedBackend(model, process)
            gradients = BranchGradients(backend, mu=run.loss.safeguard_mu, anchor=run.anchor)
            _by_branch(model, forward, inputs, run, gradients)
        else:
            hooks = []
            for weight in run.trained:
                if run.engine.divides_gradients:
                    hooks.append(weight.register_post_accumulate_grad_hook(_drop_gradient))
                elif run.accumulates:
                    weight.grad = torch.empty_like(weight)
            with allocations.moment(FORWARD):
                loss = forward.loss(forward.predict_pairs(model, inputs)).loss
            with allocations.moment(BACKWARD):
                loss.backward()
            del loss
            for hook in hooks:
                hook.remove()
        left = allocations.live
    return StepMemory(dict(allocations.peaks), left, allocations.flops)


def _drop_gradient(weight: torch.Tensor) -> None:
    """Delete a gradient as soon as it is complete. The plan adds the gradient's shard to the memory between steps."""
    weight.grad = None


def _round_weights(run: PlannedRun, dtype: torch.dtype, mode: FakeTensorMode) -> None:
    with mode:
        for module in (run.family.denoiser, *_second_denoisers(run)):
            for submodule in module.modules():
                for name, weight in submodule.named_parameters(recurse=False):
                    rounded = torch.empty(weight.shape, dtype=dtype, device="cpu")
                    setattr(submodule, name, nn.Parameter(rounded, requires_grad=weight.requires_grad))


def _by_branch(
    model: nn.Module,
    forward: MeasuredForward,
    inputs: dict[str, Any],
    run: PlannedRun,
    gradients: BranchGradients,
) -> None:
    """Run the forward and backward passes with the safeguard in parameter space. If gradients accumulate, run two
    micro-batches."""
    allocations = forward.allocations
    safeguard = ParameterSafeguard(
        forward,
        gradients,
        MetricMeter(),
        sorts_by_scores=run.loss.spec.needs_scores,
        low_memory=run.low_memory,
    )
    for _ in range(2 if run.accumulates else 1):
        allocations.flops = 0  # the plan reports the FLOP of one micro-batch
        with allocations.moment(FORWARD):
            loss = forward.loss(safeguard.predict_pairs(model, inputs)).loss
        with allocations.moment(BACKWARD):
            safeguard.backward_branches(loss, share=1.0)
        del loss
    with allocations.moment(OPTIMIZER):
        gradients.combine()


def all_modules(run: PlannedRun) -> list[nn.Module]:
    """Return the policy's denoiser, VAE and text encoders, and the denoisers of reference and averaged weights if they
    have their own."""
    frozen = [getattr(run.family.pipeline, name) for name in run.family.frozen_components]
    return [run.family.denoiser, *frozen, *_second_denoisers(run)]


def _second_denoisers(run: PlannedRun) -> list[nn.Module]:
    seconds = [weights.second for weights in (run.reference, run.average) if weights is not None]
    return [second.module for second in seconds if isinstance(second, SecondDenoiser)]


def _batch(run: PlannedRun) -> dict[str, Any]:
    """Return a batch of fake tensors in the form in which `PreferenceCollator` makes it."""
    images = 2 * run.pairs
    sizes = torch.ones(images, 2, dtype=torch.long)
    batch = {
        "pixel_values": torch.empty(images, 3, *run.resolution, dtype=torch.uint8),
        "prompts": ["a prompt"] * run.pairs * (1 + run.two_prompts),
        "original_sizes": sizes,
        "crop_top_lefts": sizes,
        "seeds": list(range(run.pairs)),
        "rows": list(range(run.pairs)),
    }
    if run.source is not None:
        batch["source_pixels"] = torch.empty(run.pairs, 3, *run.source, dtype=torch.uint8)
    if run.loss.spec.needs_scores:
        batch["scores"] = torch.ones(images)
    if run.reference.is_precomputed:
        batch["ref_errors"] = torch.ones(images * run.noise.timesteps_per_pair)
    return batch
