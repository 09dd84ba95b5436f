"""The trainer's forward and backward passes on fake tensors, without data."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ...data.transforms import pixels_as_floats, white
from ...engines.gradient_backends import ReplicatedBackend
from ...families import Family
from ...families.base import SOURCE
from ...families.noise import constant
from ...models.denoiser_wrapper import DenoiserWrapper
from ...models.ema import EMAWeights
from ...models.numerics import autocast_dtype
from ...models.reference import Reference
from ...models.weight_copies import SecondDenoiser
from ...step.branch_gradients import BranchGradients
from ...step.meters import MetricMeter
from ...step.pair_forward import NoiseSettings, PairForward
from ...step.parameter_safeguard import ParameterSafeguard
from ...step.stochastic_rounding import may_step_in_backward
from ...trainer import DiffusionSDPOConfig
from ...trainer.config.complete import image_sizes, loss_settings, predicts_halves
from ...utils._compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    activation_checkpointing,
)
from .allocations import Allocations, autocast_like, block_size
from .planned_engine import PlannedEngine
from .skeleton import needs_values

ENCODE, FORWARD, BACKWARD, OPTIMIZER = "encode", "forward", "backward", "optimizer"


@dataclass(frozen=True)
class PlannedRun:
    """Networks of a planned run on the meta device, and the settings on which its memory depends."""

    family: Family  # pipeline family, with VAE and text encoders in the dtypes of training
    reference: Reference
    average: EMAWeights | None
    args: DiffusionSDPOConfig  # settings of the trainer, complete
    noise: NoiseSettings
    engine: PlannedEngine
    source: tuple[int, int] | None  # height and width of a source image when the VAE encodes it
    stored: str | None  # storage format of a quantized base model, a key of `plan.STORED`

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of autocast, or `None` without autocast."""
        return autocast_dtype(self.args.mixed_precision)

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer steps each weight within the backward pass, and frees its gradient."""
        return self.engine.name == "single_gpu" and may_step_in_backward(self.args)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.family.denoiser.parameters() if weight.requires_grad]

    @property
    def frozen(self) -> list[nn.Module]:
        """The VAE and the text encoders."""
        return [getattr(self.family.pipeline, name) for name in self.family.frozen_components]

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """Denoisers of the policy and, if these are separate models, of the reference and the averaged weights."""
        copies = {"reference": self.reference, "average": self.average}
        seconds = {name: copy.second for name, copy in copies.items() if copy is not None}
        others = {name: second.module for name, second in seconds.items() if isinstance(second, SecondDenoiser)}
        return {"policy": self.family.denoiser, **others}


class OneProcess:
    """Stands in for accelerate's `Accelerator`, with one process and no gradient scaler."""

    scaler = None
    num_processes = 1

    def __init__(self, dtype: torch.dtype | None):
        self._dtype = dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._dtype is None else torch.autocast("cpu", self._dtype)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class MeasuredForward(PairForward):
    """Forward passes of the simulated step, with the memory of encoding images and prompts measured separately."""

    def __init__(self, allocations: Allocations, *parts: Any, **settings: Any):
        super().__init__(*parts, **settings)
        self.allocations = allocations

    def encode(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Encode images and prompts, record the peak, and pass the results on as if they were precomputed."""
        with self.allocations.phase(ENCODE), torch.no_grad():
            with self._frozen.in_use() as family:
                moments = family.image_moments(pixels_as_floats(inputs["pixel_values"]))
                try:
                    conditioning = family.encode_prompts(inputs["prompts"])
                except Exception as error:  # the pipeline reads values, which fake tensors lack
                    raise needs_values(family.name) from error
                if "source_pixels" in inputs:
                    source = family.encode_images(pixels_as_floats(inputs["source_pixels"]))
                    conditioning[f"{SOURCE}0"] = source
            size = tuple(inputs["pixel_values"].shape[-2:])
            return super().encode({**inputs, "moments": moments, "conditioning": conditioning, "target_size": size})


def measure_step(run: PlannedRun, device: str, mode: FakeTensorMode) -> tuple[dict[str, int], int]:
    """Run the trainer's forward and backward passes of a step on fake tensors.

    Returns:
        The peak of each phase, and the memory in use before the optimizer's step, both in bytes without the weights.
    """
    denoiser = run.family.denoiser
    model = DenoiserWrapper(denoiser).train()
    checkpoints, arguments = activation_checkpointing(run.args)
    if checkpoints:
        model.activation_checkpointing_enable(arguments)
    try:
        with mode, autocast_like(device):
            return _measure(model, run, device)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise needs_values(run.family.name) from error
    finally:
        for cached in (constant, white):  # otherwise later code would get fake tensors from them
            cached.cache_clear()
        if checkpoints:
            denoiser.disable_gradient_checkpointing()
        for weight in run.trained:
            weight.grad = None


def _measure(model: nn.Module, run: PlannedRun, device: str) -> tuple[dict[str, int], int]:
    denoiser = run.family.denoiser
    allocations = Allocations(block_size(device))
    for module in (*run.denoisers.values(), *run.frozen):
        allocations.ignore([*module.parameters(), *module.buffers()])
    loss = loss_settings(run.args)
    # All components stay on the device here. The plan later subtracts the offloaded ones.
    components: Any = SimpleNamespace(family=run.family, in_use=lambda: contextlib.nullcontext(run.family))
    process: Any = OneProcess(run.autocast)
    forward = MeasuredForward(
        allocations,
        components,
        run.reference,
        noise=run.noise,
        loss=loss,
        autocast=process.autocast,
        by_halves=run.engine.rounds_weights or predicts_halves(run.args, denoiser, run.args.loss_spec),
    )
    with allocations:
        inputs = _batch(run)
        if run.args.safeguard == "parameter":
            _by_branch(model, forward, inputs, run, ReplicatedBackend(model, process))
        else:
            hooks = []
            for weight in run.trained:
                if run.engine.divides("gradients") or run.steps_in_backward:
                    hooks.append(weight.register_post_accumulate_grad_hook(_drop_gradient))
                elif run.args.gradient_accumulation_steps > 1:
                    weight.grad = torch.empty_like(weight)
            with allocations.phase(FORWARD):
                output = forward.loss(forward.predict_pairs(model, inputs)).loss
            with allocations.phase(BACKWARD):
                output.backward()
            del output
            for hook in hooks:
                hook.remove()
        return allocations.peaks, allocations.live


def _drop_gradient(weight: torch.Tensor) -> None:
    """Delete a gradient as soon as it is complete: the optimizer has used it, or the plan adds its shard itself."""
    weight.grad = None


def _by_branch(
    model: nn.Module, forward: MeasuredForward, inputs: dict[str, Any], run: PlannedRun, backend: ReplicatedBackend
) -> None:
    """Run the forward and backward passes of `safeguard="parameter"`, which computes the gradients of winners and
    losers separately. With gradient accumulation, run two micro-batches."""
    args = run.args
    allocations = forward.allocations
    anchor = args.safeguard_settings.anchor or args.loss_spec.anchor
    gradients = BranchGradients(backend, mu=loss_settings(args).safeguard_mu, anchor=anchor)
    safeguard = ParameterSafeguard(
        forward,
        gradients,
        MetricMeter(),
        sorts_by_scores=args.loss_spec.needs_scores,
        low_memory=args.safeguard_settings.low_memory,
        verified=True,  # it would read values, which fake tensors lack
    )
    for _ in range(2 if args.gradient_accumulation_steps > 1 else 1):
        with safeguard.accumulating():
            with allocations.phase(FORWARD):
                loss = forward.loss(safeguard.predict_pairs(model, inputs)).loss
            with allocations.phase(BACKWARD):
                safeguard.backward_branches(loss, share=1.0)
        del loss
    with allocations.phase(OPTIMIZER):
        gradients.combine()


def largest_size(args: DiffusionSDPOConfig) -> tuple[int, int]:
    """Return height and width of the largest bucket, which needs the most memory."""
    return max(image_sizes(args), key=lambda size: size[0] * size[1])


def _batch(run: PlannedRun) -> dict[str, Any]:
    """Return a batch of fake tensors with the keys and shapes of `PreferenceCollator`'s."""
    pairs = run.args.per_device_train_batch_size
    images = 2 * pairs
    sizes = torch.ones(images, 2, dtype=torch.long)
    height, width = largest_size(run.args)
    batch = {
        "pixel_values": torch.empty(images, 3, height, width, dtype=torch.uint8),
        "prompts": ["a prompt"] * pairs,
        "original_sizes": sizes,
        "crop_top_lefts": sizes,
        "seeds": list(range(pairs)),
        "rows": list(range(pairs)),
    }
    if run.source is not None:
        batch["source_pixels"] = torch.empty(pairs, 3, *run.source, dtype=torch.uint8)
    if run.args.loss_spec.reads_scores(run.args.loss_kwargs):
        batch["scores"] = torch.ones(images)
    if run.reference.is_precomputed:
        batch["ref_errors"] = torch.ones(images)
    return batch
