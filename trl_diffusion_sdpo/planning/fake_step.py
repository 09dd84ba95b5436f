"""Simulation of the trainer's forward and backward passes on fake tensors, without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ..data.images import pixels_as_floats, white
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
from .allocations import Allocations
from .fake_device import FakeDevice
from .skeleton import needs_values

ENCODE, REFERENCE, FORWARD, BACKWARD, OPTIMIZER = "encode", "reference", "forward", "backward", "optimizer"


@dataclass(frozen=True)
class StepSettings:
    """Settings of a simulated step.

    Attributes:
        resolution (`tuple[int, int]`): (height, width) of the images in pixels.
        source (`tuple[int, int]`, *optional*): (height, width) of an edit model's sources, as the VAE encodes
            them. They are made from images of the size `resolution`.
        pairs (`int`): Pairs of a micro-batch.
        autocast (`torch.dtype`, *optional*): The dtype of autocast.
        checkpointing (`dict`, *optional*): Arguments of activation checkpointing; `None` without.
        anchor (`str`, *optional*): Anchor of the safeguard in parameter space. `None` in output space, or without
            a safeguard.
        low_memory (`bool`): Whether this safeguard holds the activations of one branch at a time.
        accumulates (`bool`): Whether gradients of earlier micro-batches are in memory.
        divides_gradients (`bool`): Whether the engine shards each gradient over processes when it is computed.
        rounds_weights (`bool`): Whether the engine computes with weights in the dtype of autocast.
        two_prompts (`bool`): Whether each image of a pair has its own prompt.
    """

    noise: NoiseSettings
    loss: LossSettings
    resolution: tuple[int, int]
    pairs: int
    autocast: torch.dtype | None
    checkpointing: dict[str, Any] | None
    anchor: Anchor | None
    low_memory: bool
    accumulates: bool
    divides_gradients: bool = False
    rounds_weights: bool = False
    two_prompts: bool = False
    source: tuple[int, int] | None = None


@dataclass
class Networks:
    """Networks of a step, made as the trainer makes them. The denoiser's trained weights require gradients. VAE and
    text encoders have the precision in which they run."""

    family: Family
    reference: Reference
    average: EMAWeights | None

    @property
    def trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.family.denoiser.parameters() if weight.requires_grad]


@dataclass(frozen=True)
class StepMemory:
    """Memory of a step besides the weights that stay, in bytes.

    Attributes:
        peaks (`dict[str, int]`): Peak of each moment: activations, gradients, temporaries and the batch.
        gradient_bytes (`int`): Memory in use when the optimizer steps.
        flops (`int`): Floating point operations of matrix products, convolutions and attention.
    """

    peaks: dict[str, int]
    gradient_bytes: int
    flops: int


class OneProcess:
    """Stand-in for accelerate's `Accelerator`, with one process and no gradient scaler."""

    scaler = None
    num_processes = 1

    def __init__(self, dtype: torch.dtype | None):
        self._dtype = dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._dtype is None else torch.autocast("cpu", self._dtype)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class HeldComponents:
    """Stand-in for [`~trl_diffusion_sdpo.models.frozen_components.FrozenComponents`]. All components are on the device.
    The plan subtracts components that are offloaded."""

    def __init__(self, family: Family):
        self.family = family

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Family]:
        yield self.family


class MeasuredForward(PairForward):
    """Forward passes of a pair. Encoding and the reference's pass are separate moments."""

    allocations: Allocations

    def encode(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Simulate precomputed latents by encoding here, so that their memory is counted apart."""
        with self.allocations.moment(ENCODE), torch.no_grad():
            with self._frozen.in_use() as family:
                moments = family.image_moments(pixels_as_floats(inputs["pixel_values"]))
                try:
                    conditioning = family.encode_prompts(inputs["prompts"])
                except Exception as error:  # fake tensors and tokenizers have no values
                    raise needs_values(family.name) from error
                if "source_pixels" in inputs:
                    source = family.encode_images(pixels_as_floats(inputs["source_pixels"]))
                    conditioning[f"{SOURCE}0"] = source
            size = tuple(inputs["pixel_values"].shape[-2:])
            return super().encode({**inputs, "moments": moments, "conditioning": conditioning, "target_size": size})

    def predict_reference(self, model: nn.Module, batches: Sequence[NoisyBatch]) -> list[torch.Tensor] | None:
        with self.allocations.moment(REFERENCE):
            return super().predict_reference(model, batches)


def measure_step(networks: Networks, settings: StepSettings, device: FakeDevice, mode: FakeTensorMode) -> StepMemory:
    """Run the forward and backward passes of a step as the trainer does."""
    denoiser = networks.family.denoiser
    model = DenoiserWrapper(denoiser).train()
    if settings.checkpointing is not None:
        model.activation_checkpointing_enable(settings.checkpointing)
    if settings.rounds_weights and settings.autocast is not None:
        _round_weights(networks, settings.autocast, mode)
    try:
        with mode, device.active():
            return _measure(model, networks, settings, device)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise needs_values(networks.family.name) from error
    finally:
        for cached in (constant, white):  # a later step must not get fake tensors
            cached.cache_clear()
        if settings.checkpointing is not None:
            denoiser.disable_gradient_checkpointing()
        for weight in networks.trained:
            weight.grad = None


def _measure(model: nn.Module, networks: Networks, settings: StepSettings, device: FakeDevice) -> StepMemory:
    allocations = Allocations(device.block, device.hidden)
    allocations.ignore(_existing(networks))
    components: Any = HeldComponents(networks.family)
    process: Any = OneProcess(settings.autocast)
    forward = MeasuredForward(
        components, networks.reference, noise=settings.noise, loss=settings.loss, autocast=process.autocast
    )
    forward.allocations = allocations
    with allocations:
        inputs = _batch(settings, with_errors=networks.reference.is_precomputed)
        if settings.anchor is not None:
            _by_branch(model, forward, inputs, settings, ReplicatedBackend(model, process))
        else:
            hooks = []
            for weight in networks.trained:
                if settings.divides_gradients:
                    hooks.append(weight.register_post_accumulate_grad_hook(_drop_gradient))
                elif settings.accumulates:
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
    """Drop a gradient. The plan counts its shard with the tensors that stay."""
    weight.grad = None


def _round_weights(networks: Networks, dtype: torch.dtype, mode: FakeTensorMode) -> None:
    with mode:
        for module in (networks.family.denoiser, *_second_denoisers(networks)):
            for submodule in module.modules():
                for name, weight in submodule.named_parameters(recurse=False):
                    rounded = torch.empty(weight.shape, dtype=dtype, device="cpu")
                    setattr(submodule, name, nn.Parameter(rounded, requires_grad=weight.requires_grad))


def _by_branch(
    model: nn.Module,
    forward: MeasuredForward,
    inputs: dict[str, Any],
    settings: StepSettings,
    backend: ReplicatedBackend,
) -> None:
    """Run the step with the safeguard in parameter space. If gradients accumulate, run two micro-batches."""
    assert settings.anchor is not None
    allocations = forward.allocations
    gradients = BranchGradients(backend, mu=settings.loss.safeguard_mu, anchor=settings.anchor)
    safeguard = ParameterSafeguard(
        forward,
        gradients,
        MetricMeter(),
        sorts_by_scores=settings.loss.spec.needs_scores,
        low_memory=settings.low_memory,
        diagnostics=None,
    )
    for _ in range(2 if settings.accumulates else 1):
        allocations.flops = 0  # report one micro-batch only
        with allocations.moment(FORWARD):
            loss = forward.loss(safeguard.predict_pairs(model, inputs)).loss
        with allocations.moment(BACKWARD):
            safeguard.backward_branches(loss, step=1, share=1.0)
        del loss
    with allocations.moment(OPTIMIZER):
        gradients.combine()


def _existing(networks: Networks) -> list[torch.Tensor]:
    """Return the tensors that stay between steps."""
    return [tensor for module in all_modules(networks) for tensor in (*module.parameters(), *module.buffers())]


def all_modules(networks: Networks) -> list[nn.Module]:
    """Return the policy, VAE and text encoders, and second denoisers."""
    family = networks.family
    frozen = [getattr(family.pipeline, name) for name in family.frozen_components]
    return [family.denoiser, *frozen, *_second_denoisers(networks)]


def _second_denoisers(networks: Networks) -> list[nn.Module]:
    seconds = [weights.second for weights in (networks.reference, networks.average) if weights is not None]
    return [second.module for second in seconds if isinstance(second, SecondDenoiser)]


def _batch(settings: StepSettings, *, with_errors: bool) -> dict[str, Any]:
    """Return a collated batch on the device, in the form of `PreferenceCollator`."""
    images, (height, width) = 2 * settings.pairs, settings.resolution
    sizes = torch.ones(images, 2, dtype=torch.long)
    batch = {
        "pixel_values": torch.empty(images, 3, height, width, dtype=torch.uint8),
        "prompts": ["a prompt"] * settings.pairs * (1 + settings.two_prompts),
        "original_sizes": sizes,
        "crop_top_lefts": sizes,
        "seeds": list(range(settings.pairs)),
        "rows": list(range(settings.pairs)),
    }
    if settings.source is not None:
        batch["source_pixels"] = torch.empty(settings.pairs, 3, *settings.source, dtype=torch.uint8)
    if settings.loss.spec.needs_scores:
        batch["scores"] = torch.ones(images)
    if with_errors:
        batch["ref_errors"] = torch.ones(images * settings.noise.timesteps_per_pair)
    return batch
