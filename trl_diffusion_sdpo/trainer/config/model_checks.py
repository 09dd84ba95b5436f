"""Checks of the settings against a model or this process."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ...families import Family
from ...families.inversion import InversionSettings, inversion_of
from ...families.noise import NoiseProcess
from ...families.timestep_sampling import TimestepSampling
from ...losses import LOSSES, loss_weights_by_name
from ...utils._compat import activation_checkpointing, checkpoints_activations

if TYPE_CHECKING:
    from ..diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
QUANTILES = 10_001  # of the timesteps that are drawn
NEGLIGIBLE = 0.01  # share of them
FAR = 100  # factor from which a `beta` is taken for a mistake
HIGH_RATE = 0.1  # learning rate


def loss_defaults(args: DiffusionSDPOConfig, family: Family, *, full: bool) -> tuple[float, float | None]:
    """Return a family's defaults of `safeguard_mu` and `beta` for the loss of the settings.

    A sum of losses has the strictest mu of its parts that read the loser, and the beta that its parts have in common.
    The beta is `None` if the loss has none, or if `beta` is set.

    Raises:
        `ValueError`: If `beta` is not given and the parts of a sum have different ones.
    """
    weights = loss_weights_by_name(cast(Any, args.loss_type), args.loss_weights)
    rows = {name: family.loss_defaults(name) for name, weight in weights.items() if weight}
    guarded = [row.safeguard_mu for name, row in rows.items() if LOSSES[name].uses_loser]
    mu = max(guarded or [row.safeguard_mu for row in rows.values()])
    betas = {name: row.beta_for(full=full) for name, row in rows.items() if LOSSES[name].uses_beta}
    if args.beta is not None or not betas:
        return mu, None
    if len(set(betas.values())) > 1:
        listed = ", ".join(f"{beta:g} of {name}" for name, beta in betas.items())
        raise ValueError(f"The parts of a sum share `beta`, and their defaults differ: {listed}. Set `beta`.")
    return mu, next(iter(betas.values()))


def warn_of_far_settings(args: DiffusionSDPOConfig, family: Family, *, full: bool) -> None:
    """Warn of a `beta` far from the family's default, and of a learning rate at which nothing trains."""
    weights = loss_weights_by_name(cast(Any, args.loss_type), args.loss_weights)
    betas = [family.loss_defaults(name).beta_for(full=full) for name in weights if LOSSES[name].uses_beta]
    if args.beta and betas and all(not 1 / FAR < args.beta / usual < FAR for usual in betas):
        logger.warning(
            "`beta=%g` is far from the default of %s, %g, by a factor of %d or more. Is it meant?",
            *(args.beta, family.name, betas[0], FAR),
        )
    if args.learning_rate and args.learning_rate > HIGH_RATE:
        logger.warning(
            "`learning_rate=%g` ruins a model in a few steps; the default of %s is %g. Is it meant?",
            *(args.learning_rate, family.name, family.learning_rate_full if full else family.learning_rate_lora),
        )


def check_without_dropout(args: DiffusionSDPOConfig, denoiser: nn.Module) -> None:
    """Raise `ValueError` if a setting predicts the same input twice and dropout would make the two differ."""
    twice = [name for name in ("safeguard_low_memory", "safeguard_diagnostics_steps") if getattr(args, name)]
    if args.safeguard == "parameter" and twice:
        refuse_dropout(denoiser, f"`{twice[0]}`")
    if args.precompute_ref_errors and _has_dropout(denoiser):
        raise ValueError(
            "`precompute_ref_errors=True` needs a policy that predicts as its reference did before training, and "
            "dropout makes the two differ. Set `disable_dropout=True`, or leave it out."
        )


def refuse_dropout(denoiser: nn.Module, what: str) -> None:
    """Raise `ValueError` if a denoiser has active dropout, because `what` predicts the same images twice."""
    if _has_dropout(denoiser):
        raise ValueError(
            f"{what} predicts the same images twice, and dropout makes the two differ. Set `disable_dropout=True`, or "
            "leave it out."
        )


def _has_dropout(denoiser: nn.Module) -> bool:
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in denoiser.modules())


def check_activation_checkpointing(args: DiffusionSDPOConfig, denoiser: nn.Module) -> None:
    """Raise `ValueError` if the denoiser does not support the activation checkpointing that the settings ask for."""
    is_on, _ = activation_checkpointing(args)
    if is_on and not checkpoints_activations(denoiser):
        raise ValueError(
            f"`activation_checkpointing` (`gradient_checkpointing`) cannot act: diffusers' {type(denoiser).__name__} "
            "has none. Leave it off, and use smaller micro-batches or `safeguard_low_memory`."
        )


def check_one_device(args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` if transformers would wrap the model in `nn.DataParallel`, which replicates neither the
    reference nor the hooks of a family and of the safeguard."""
    if args.n_gpu > 1:
        raise ValueError(
            f"One process trains on one GPU, and this one sees {args.n_gpu}. Start a process for each with "
            "`trl-diffusion-sdpo train --accelerate_config multi_gpu ...` or `accelerate launch`, or show it one with "
            "CUDA_VISIBLE_DEVICES=0."
        )


def checked_timesteps(args: DiffusionSDPOConfig, family: Family) -> dict[str, Any]:
    """Return how timesteps are drawn, as arguments of the noise process; `ValueError` if the process cannot."""
    process = family.noise_process
    last = process.num_train_timesteps
    if args.timestep_range is not None and args.timestep_range[1] > last:
        raise ValueError(
            f"`timestep_range` must end at {last} or below, the scheduler's number of timesteps; got "
            f"{list(args.timestep_range)}."
        )
    weighting: dict[str, Any] = {"snr_gamma": args.snr_gamma, "weighting": args.timestep_weighting}
    process.weights(torch.ones(1, dtype=torch.long), image_seq_len=1, **weighting)  # raises what batches would raise
    weighting_kwargs = args.weighting_kwargs
    for name in weighting_kwargs:
        if args.weighting_scheme != {"mode_scale": "mode"}.get(name, "logit_normal"):
            logger.warning("`%s` has no effect with `weighting_scheme=%r`.", name, args.weighting_scheme)
    if args.timesteps is not None:
        only: dict[str, Any] = {"only": tuple(args.timesteps)}
        process.timesteps(torch.zeros(1), **only)  # raises what batches would raise
        return only
    sampling = TimestepSampling(args.weighting_scheme, **weighting_kwargs)
    timestep_range = None if args.timestep_range is None else tuple(args.timestep_range)
    return {"timestep_range": timestep_range, "sampling": sampling}


def checked_inversion(
    args: DiffusionSDPOConfig, family: Family, timesteps: dict[str, Any], sizes: Iterable[tuple[int, int]]
) -> InversionSettings | None:
    """Return how images are inverted for their noise, `None` if noise is drawn; `ValueError` if the model's noise
    process cannot invert.

    Args:
        timesteps: Result of [`checked_timesteps`].
        sizes (`Iterable[tuple[int, int]]`): (height, width) of the training images.
    """
    if args.noise_source != "inversion":
        return None
    process = family.noise_process
    inversion = inversion_of(process)
    settings = InversionSettings(**args.inversion_kwargs)
    if settings.steps > process.num_train_timesteps:
        raise ValueError(
            f"`steps` of `inversion_kwargs` must be at most {process.num_train_timesteps}, the scheduler's number of "
            f"timesteps; got {settings.steps}. Published: 5 and 10."
        )
    if settings.eta and not inversion.has_variance:
        raise ValueError(
            f"`eta` of `inversion_kwargs` scales DDIM's variance, and the sampling step of {family.name} has none; got "
            f"{settings.eta}. Use 0."
        )
    if settings.end == "grid":
        for length in sorted({family.tokens_of_image(*size) for size in sizes}):
            _check_inversion_grid(process, inversion.grid(settings.steps, CPU, length), length, timesteps)
    return settings


def _check_inversion_grid(process: NoiseProcess, grid: torch.Tensor, length: int, timesteps: dict[str, Any]) -> None:
    """Warn if timesteps lie below the grid, because their images keep their clean latents; `ValueError` if all do."""
    drawn = process.timesteps(torch.linspace(0, 1, QUANTILES), image_seq_len=length, **timesteps)
    clean = (drawn <= grid.min()).float().mean() if len(grid) else torch.ones(())
    advice = "Use `end: exact`, which steps to the timestep itself, or more `steps`."
    if clean == 1:
        raise ValueError(
            "With `end: grid`, `inversion_kwargs` must have a timestep of the grid below some that are drawn, "
            f"{float(drawn.min()):g} to {float(drawn.max()):g}; got {[round(each, 3) for each in grid.tolist()]}. "
            f"{advice}"
        )
    if clean > NEGLIGIBLE:
        logger.warning(
            "With `end: grid` of `inversion_kwargs`, %.0f%% of the timesteps that are drawn are not above the grid's "
            "first, %g: the clean latents of their pairs are taken for noisy ones. %s",
            100 * clean,
            grid.min(),
            advice,
        )


def check_guidance(args: DiffusionSDPOConfig, family: Family) -> None:
    """Raise `ValueError` if `guidance_scale` is set for a denoiser that takes none."""
    if args.guidance_scale is not None and family.guidance_scale is None:
        raise ValueError(
            f"`guidance_scale` is for denoisers that take it as an input, and that of {family.name} takes none; got "
            f"{args.guidance_scale}. Leave it unset; that of sample images is in `sample_kwargs`."
        )


def check_output_dir(folder: str) -> None:
    """Raise `ValueError` if `output_dir` is not writable."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` must be a folder that can be written, got {folder!r}: {error}.") from error
