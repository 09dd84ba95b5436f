"""What is done once, before the first batch: unset settings completed, precision checked."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engines.sharding import set_deepspeed_learning_rate
from ..families import Family
from ..families.timestep_sampling import TimestepSampling
from ..losses import LossSpec
from .config_checks import check_one_device, settled_resolution
from .diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)


def copy_and_check_args(model: Any, ref_model: Any, args: DiffusionSDPOConfig | None) -> DiffusionSDPOConfig:
    """The trainer's own copy of the settings, after the checks that need no model.

    Raises:
        `ValueError`: If `args` are of another kind, the process sees several GPUs, model and reference are one object,
            or nothing could be written.
    """
    if args is None:
        args = DiffusionSDPOConfig(default_output_dir(model))
    if not isinstance(args, DiffusionSDPOConfig):
        raise ValueError(f"`args` must be a DiffusionSDPOConfig, got {type(args).__name__}.")
    check_one_device(args)
    if ref_model is not None and model is ref_model and not isinstance(model, (str, Path)):
        raise ValueError(
            "`model` and `ref_model` must be two objects: a reference that trains along keeps every margin at 0. "
            "Leave `ref_model` out, or pass a copy."
        )
    if isinstance(model, (str, Path)) and Path(model).resolve() == Path(args.output_dir).resolve():
        raise ValueError(
            f"`output_dir` must be another folder than the model's: saving would overwrite the pipeline that is tuned; "
            f"got {args.output_dir!r} for both."
        )
    if args.ref_model_init_kwargs is not None and not isinstance(ref_model, (str, Path)):
        raise ValueError(
            "`ref_model_init_kwargs` are for a `ref_model` given as Hub id or folder, got "
            f"{'none' if ref_model is None else f'a {type(ref_model).__name__}'}. Leave them out."
        )
    if args.should_save:
        check_output_dir(args.output_dir)
    return copy.copy(args)


def complete_args(args: DiffusionSDPOConfig, family: Family, loss: LossSpec, *, full: bool) -> None:
    """Fill in what was left to the family and the loss, and say so."""
    defaults = family.loss_defaults(args.loss_type)
    defaults_by_name = {
        "learning_rate": family.learning_rate_full if full else family.learning_rate_lora,
        "beta": defaults.beta_for(full=full) if loss.uses_beta else None,
        "safeguard_mu": defaults.safeguard_mu,
        "resolution": settled_resolution(family.default_resolution),
        "weighting_scheme": family.weighting_scheme if args.timesteps is None else None,
        "guidance_scale": family.guidance_scale,
    }
    chosen = {name: value for name, value in defaults_by_name.items() if getattr(args, name) is None}
    for name, value in chosen.items():
        setattr(args, name, value)
    set_deepspeed_learning_rate(args)
    safeguarded = args.safeguard != "none" and loss.uses_loser
    told = {name: value for name, value in chosen.items() if value is not None}
    if not safeguarded:
        told.pop("safeguard_mu", None)
    if told:
        listed = ", ".join(f"{name}={value}" for name, value in told.items())
        logger.warning("Chosen for %s and the loss %r: %s.", family.name, args.loss_type, listed)


def check_precision(denoiser: nn.Module, adapter: str | None, args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` where the weights' dtype and the training precision cannot work together."""
    halves = sorted({str(p.dtype) for p in denoiser.parameters() if p.is_floating_point() and p.itemsize < 4})
    if halves and adapter is None:
        raise ValueError(
            f"Full tuning needs float32 weights, got {', '.join(halves)}: small updates would be rounded away. Load "
            "with `dtype='float32'` and set `bf16=True` for autocast."
        )
    if halves and autocast_dtype(args) is None:
        raise ValueError(
            f"A base held in {', '.join(halves)} needs `bf16=True` or `fp16=True`, as its LoRA is held in float32."
        )


def check_output_dir(folder: str) -> None:
    """Raise `ValueError` where results could not be written, before hours of training find out."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` must be a folder that can be written, got {folder!r}: {error}.") from error


def check_resolution(args: DiffusionSDPOConfig, family: Family) -> None:
    """Raise `ValueError` where the VAE would cut off a part of the images, or the pipeline would not draw them."""
    sides = (args.resolution,) if isinstance(args.resolution, int) else args.resolution
    unit = family.vae_scale_factor * family.patch_size
    if args.sample_prompts:
        unit = math.lcm(unit, 8)
    if any(side % unit for side in sides):
        raise ValueError(f"`resolution` must be a multiple of {unit} pixels for this model, got {args.resolution}.")
    family.check_image_size(sides[0], sides[-1])


def checked_timesteps(args: DiffusionSDPOConfig, family: Family) -> dict[str, Any]:
    """How timesteps are drawn, as arguments of the noise process; `ValueError` where it cannot draw or weigh so."""
    process = family.noise_process
    last = process.num_train_timesteps
    if args.timestep_range is not None and args.timestep_range[1] > last:
        raise ValueError(
            f"`timestep_range` must end at {last} or below, the scheduler's number of timesteps; got "
            f"{list(args.timestep_range)}."
        )
    weighting = {"snr_gamma": args.snr_gamma, "weighting": args.timestep_weighting}
    process.weights(torch.ones(1, dtype=torch.long), image_seq_len=1, **weighting)  # raises what batches would raise
    unused = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
    for name, scheme in unused.items():
        if args.weighting_scheme != scheme and getattr(args, name) != getattr(TimestepSampling(), name):
            logger.warning("`%s` has no effect with `weighting_scheme=%r`.", name, args.weighting_scheme)
    if args.timesteps is not None:
        only = {"only": tuple(args.timesteps)}
        process.timesteps(torch.zeros(1), **only)  # raises what batches would raise
        return only
    sampling = TimestepSampling(args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)
    timestep_range = None if args.timestep_range is None else tuple(args.timestep_range)
    return {"timestep_range": timestep_range, "sampling": sampling}


def check_noise_range(args: DiffusionSDPOConfig, family: Family, drawn: dict[str, Any]) -> None:
    """Say which of the timesteps that are drawn `loser_noise_range` comes to; `ValueError` where it is none."""
    if args.loser_noise_range is None:
        return
    sides = (args.resolution,) if isinstance(args.resolution, int) else args.resolution
    tokens = sides[0] * sides[-1] // (family.vae_scale_factor * family.patch_size) ** 2
    low, high = args.loser_noise_range
    process = family.noise_process
    within = process.timesteps_within(low, high, tokens, **drawn)
    if within is None:
        every = process.timesteps_within(0.0, 1.0, tokens, **drawn)
        ends = torch.tensor(every).to(process.timestep_dtype)
        first, last = process.noise_level(ends, tokens).tolist()
        raise ValueError(
            f"`loser_noise_range` must meet the noise levels that are drawn, {first:.3f} to {last:.3f}; got "
            f"{list(args.loser_noise_range)}. To train winners only, use `loss_type='sft'`."
        )
    logger.warning(
        "Losers train at the noise levels %g to %g: timesteps %g to %g of %d.",
        *(low, high, *within, process.num_train_timesteps),
    )


def check_guidance(args: DiffusionSDPOConfig, family: Family) -> None:
    """Raise `ValueError` where guidance is given to a denoiser that takes none."""
    if args.guidance_scale is not None and family.guidance_scale is None:
        raise ValueError(
            f"`guidance_scale` is for denoisers that take it as an input, and that of {family.name} takes none; got "
            f"{args.guidance_scale}. Leave it unset; `sample_guidance_scale` is for drawing."
        )


def autocast_dtype(args: DiffusionSDPOConfig) -> torch.dtype | None:
    """The half precision that training runs in; `None` of float32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)


def disable_dropout(module: nn.Module) -> None:
    """Set every dropout within a module to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0


def default_output_dir(model: Any) -> str:
    """Where a run without `args` writes to."""
    name = Path(model).name if isinstance(model, (str, Path)) else type(model).__name__
    return f"{name}-DiffusionSDPO"
