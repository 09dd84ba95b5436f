"""Checks of the settings that need the model or depend on this process."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...families import Family
from ...families.inversion import InversionSettings, inversion_of
from ...families.noise import NoiseProcess, TimestepSampling
from ...losses import LOSSES, loss_weights_by_name
from ...utils._compat import activation_checkpointing, checkpoints_activations

if TYPE_CHECKING:
    from ..diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
QUANTILES = 10_001  # number of quantiles of the drawn timesteps that are checked
NEGLIGIBLE = 0.01  # share of drawn timesteps below which there is no warning
FAR = 100  # factor between `beta` and its default from which there is a warning
HIGH_RATE = 0.1  # learning rate above which there is a warning


def loss_defaults(args: DiffusionSDPOConfig, family: Family, *, full: bool) -> tuple[float, float | None]:
    """Return a family's defaults of `safeguard_mu` and `beta` for the loss of the settings.

    For a sum of losses, mu is the strictest one of the losses that read the loser, and beta is the common beta of all
    losses. The returned beta is `None` if the loss has none, or if `beta` is set.

    Raises:
        `ValueError`: If `beta` is not set and the losses of a sum have different defaults.
    """
    weights = loss_weights_by_name(args.loss_type, args.loss_weights)
    rows = {name: family.loss_defaults(name) for name, weight in weights.items() if weight}
    guarded = [row.safeguard_mu for name, row in rows.items() if LOSSES[name].uses_loser]
    mu = max(guarded or [row.safeguard_mu for row in rows.values()])
    betas = {name: row.beta_for(full=full) for name, row in rows.items() if LOSSES[name].uses_beta}
    if args.beta is not None or not betas:
        return mu, None
    if len(set(betas.values())) > 1:
        listed = ", ".join(f"{beta:g} of {name}" for name, beta in betas.items())
        raise ValueError(f"All losses of a sum share one `beta`. Their defaults differ: {listed}. Set `beta`.")
    return mu, next(iter(betas.values()))


def warn_of_far_settings(args: DiffusionSDPOConfig, family: Family, *, full: bool) -> None:
    """Warn if `beta` is far from the family's default, or if the learning rate is so high that it ruins the model."""
    weights = loss_weights_by_name(args.loss_type, args.loss_weights)
    betas = [family.loss_defaults(name).beta_for(full=full) for name in weights if LOSSES[name].uses_beta]
    if args.beta and betas and all(not 1 / FAR < args.beta / usual < FAR for usual in betas):
        logger.warning(
            "`beta=%g` differs from the default of %s, %g, by a factor of %d or more. Check the value.",
            args.beta,
            family.name,
            betas[0],
            FAR,
        )
    if args.learning_rate and args.learning_rate > HIGH_RATE:
        logger.warning(
            "`learning_rate=%g` can ruin a model in a few steps. The default of %s is %g. Check the value.",
            args.learning_rate,
            family.name,
            family.learning_rate_full if full else family.learning_rate_lora,
        )


def check_without_dropout(args: DiffusionSDPOConfig, denoiser: nn.Module) -> None:
    """Raise `ValueError` if a setting needs two equal predictions of one input and dropout would make them differ."""
    twice = [name for name in ("safeguard_low_memory", "safeguard_diagnostics_steps") if getattr(args, name)]
    if args.safeguard == "parameter" and twice:
        refuse_dropout(denoiser, f"`{twice[0]}`")
    if args.precompute_ref_errors and _has_dropout(denoiser):
        raise ValueError(
            "`precompute_ref_errors=True` needs a policy that predicts before training exactly as its reference. The "
            "policy has dropout, which makes the two differ. Set `disable_dropout=True`, or leave "
            "`precompute_ref_errors` out."
        )


def refuse_dropout(denoiser: nn.Module, what: str) -> None:
    """Raise `ValueError` if a denoiser has active dropout. `what` names the setting that predicts the same images
    twice."""
    if _has_dropout(denoiser):
        raise ValueError(
            f"{what} needs two equal predictions of the same images. The denoiser has dropout, which makes the two "
            "differ. Set `disable_dropout=True`, or change the setting."
        )


def _has_dropout(denoiser: nn.Module) -> bool:
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in denoiser.modules())


def check_activation_checkpointing(args: DiffusionSDPOConfig, denoiser: nn.Module) -> None:
    """Raise `ValueError` if the settings turn on activation checkpointing and the denoiser does not support it."""
    is_on, _ = activation_checkpointing(args)
    if is_on and not checkpoints_activations(denoiser):
        raise ValueError(
            "`activation_checkpointing` (`gradient_checkpointing`) needs a denoiser that supports it. diffusers' "
            f"{type(denoiser).__name__} does not. Leave it off, and use smaller micro-batches or "
            "`safeguard_low_memory`."
        )


def check_one_device(args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` if transformers would wrap the model in `nn.DataParallel`. That class replicates neither the
    reference nor the hooks of family and safeguard."""
    if args.n_gpu > 1:
        raise ValueError(
            f"Each process trains on one GPU. This process sees {args.n_gpu}. Start one process per GPU with "
            "`trl-diffusion-sdpo train --accelerate_config multi_gpu ...` or `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one GPU."
        )


def checked_timesteps(args: DiffusionSDPOConfig, family: Family) -> dict[str, Any]:
    """Return the arguments of the noise process that draw timesteps.

    Raises:
        `ValueError`: If the noise process cannot draw timesteps with the settings.
    """
    process = family.noise_process
    last = process.num_train_timesteps
    if args.timestep_range is not None and args.timestep_range[1] > last:
        raise ValueError(
            f"`timestep_range` must end at {last} or below, the scheduler's number of timesteps. Got "
            f"{list(args.timestep_range)}. Lower its second number."
        )
    weighting: dict[str, Any] = {"snr_gamma": args.snr_gamma, "weighting": args.timestep_weighting}
    process.weights(torch.ones(1, dtype=torch.long), image_seq_len=1, **weighting)  # raises its errors now
    weighting_kwargs = args.weighting_kwargs
    for name in weighting_kwargs:
        if args.weighting_scheme != {"mode_scale": "mode"}.get(name, "logit_normal"):
            logger.warning("`%s` has no effect with `weighting_scheme=%r`.", name, args.weighting_scheme)
    if args.timesteps is not None:
        only: dict[str, Any] = {"only": tuple(args.timesteps)}
        process.timesteps(torch.zeros(1), **only)  # raises its errors now
        return only
    sampling = TimestepSampling(args.weighting_scheme or "none", **weighting_kwargs)
    timestep_range = None if args.timestep_range is None else tuple(args.timestep_range)
    return {"timestep_range": timestep_range, "sampling": sampling}


def checked_inversion(
    args: DiffusionSDPOConfig, family: Family, timesteps: dict[str, Any], sizes: Iterable[tuple[int, int]]
) -> InversionSettings | None:
    """Return the settings of the inversion of images to noise, or `None` if noise is drawn.

    Args:
        timesteps (`dict`): Result of [`checked_timesteps`].
        sizes (`Iterable[tuple[int, int]]`): (height, width) of the training images.

    Raises:
        `ValueError`: If the model's noise process cannot invert with the settings.
    """
    if args.noise_source != "inversion":
        return None
    process = family.noise_process
    inversion = inversion_of(process)
    settings = InversionSettings(**args.inversion_kwargs)
    if settings.steps > process.num_train_timesteps:
        raise ValueError(
            f"`steps` of `inversion_kwargs` must be at most {process.num_train_timesteps}, the scheduler's number of "
            f"timesteps. Got {settings.steps}. Published values are 5 and 10."
        )
    if settings.eta and not inversion.has_variance:
        raise ValueError(
            f"`eta` of `inversion_kwargs` must be 0 for {family.name}, because its sampling step adds no noise. Got "
            f"{settings.eta}. Leave it out."
        )
    if settings.end == "grid":
        for length in sorted({family.tokens_of_image(*size) for size in sizes}):
            _check_inversion_grid(process, inversion.grid(settings.steps, CPU, length), length, timesteps)
    return settings


def _check_inversion_grid(process: NoiseProcess, grid: torch.Tensor, length: int, timesteps: dict[str, Any]) -> None:
    """Warn if some drawn timesteps are not above the grid, because inversion leaves their latents clean. Raises
    `ValueError` if no drawn timestep is above the grid."""
    drawn = process.timesteps(torch.linspace(0, 1, QUANTILES), image_seq_len=length, **timesteps)
    clean = (drawn <= grid.min()).float().mean() if len(grid) else torch.ones(())
    advice = "Use `end: exact`, or more `steps`."
    if clean == 1:
        raise ValueError(
            "With `end: grid` of `inversion_kwargs`, the grid must have a timestep below some drawn timesteps, which "
            f"are {float(drawn.min()):g} to {float(drawn.max()):g}. Got the grid "
            f"{[round(each, 3) for each in grid.tolist()]}. {advice}"
        )
    if clean > NEGLIGIBLE:
        logger.warning(
            "With `end: grid` of `inversion_kwargs`, %.0f%% of the drawn timesteps are not above the grid's first, "
            "%g. Their pairs train on clean latents as if they were noisy. %s",
            100 * clean,
            grid.min(),
            advice,
        )


def check_guidance(args: DiffusionSDPOConfig, family: Family) -> None:
    """Raise `ValueError` if `guidance_scale` is set and the denoiser has no such input."""
    if args.guidance_scale is not None and family.guidance_scale is None:
        raise ValueError(
            f"`guidance_scale` needs a denoiser that takes it as an input; the denoiser of {family.name} does not. Got "
            f"{args.guidance_scale}. Leave it unset, and set the guidance of sample images in `sample_kwargs`."
        )


def check_output_dir(folder: str) -> None:
    """Raise `ValueError` if `output_dir` is not writable."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a writable folder, got {folder!r} ({error}). Choose another."
        ) from error
