"""Completion of the settings by the defaults of family and loss, and values that follow from several settings."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers.trainer_pt_utils import AcceleratorConfig

from ...cache.encoding import default_folder
from ...data.buckets import AspectRatioBuckets
from ...engines.engine_settings import check_deepspeed_precision, set_deepspeed_learning_rate
from ...families import Family
from ...losses import LossSpec
from ...models.loading import LoadedModel
from ...saving.run_folder import refuse_own_start
from ...step.pair_forward import LossSettings, NoiseSettings
from ..diffusion_sdpo_config import DiffusionSDPOConfig
from .all_arguments import settled_resolution
from .model_checks import (
    check_activation_checkpointing,
    check_guidance,
    check_one_device,
    check_output_dir,
    check_without_dropout,
    checked_inversion,
    checked_timesteps,
    loss_defaults,
    warn_of_far_settings,
)

logger = logging.getLogger(__name__)


def copy_and_check_args(model: Any, ref_model: Any, args: DiffusionSDPOConfig | None) -> DiffusionSDPOConfig:
    """Check the settings as far as possible without a model, and return a copy of them for the trainer.

    Raises:
        `ValueError`: If `args` has another class, the process sees several GPUs, the reference is named twice, or the
            output folder is not writable.
    """
    if args is None:
        args = DiffusionSDPOConfig(default_output_dir(model))
    if not isinstance(args, DiffusionSDPOConfig):
        raise ValueError(f"`args` must be a DiffusionSDPOConfig, got {type(args).__name__}. Pass one.")
    check_one_device(args)
    check_deepspeed_precision(args)
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise ValueError(
            "Only one of `ref_model` and `ref_model_name_or_path` may name the reference. Got a "
            f"{type(ref_model).__name__} and {args.ref_model_name_or_path!r}. Leave one out."
        )
    ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
    refuse_own_start(args.output_dir, (model, args.adapter_name_or_path, ref_model))
    if args.ref_model_init_kwargs is not None and not isinstance(ref_model, (str, Path)):
        raise ValueError(
            "`ref_model_init_kwargs` need a `ref_model` that is a Hub id or a folder, got "
            f"{'none' if ref_model is None else f'a {type(ref_model).__name__}'}. Leave them out."
        )
    if args.should_save:
        check_output_dir(args.output_dir)
    args = copy.copy(args)
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # DDP would send buffers in every step, but denoisers never change theirs
    return args


def default_output_dir(model: Any) -> str:
    """Name the output folder of a run without `args`."""
    name = Path(model).name if isinstance(model, (str, Path)) else type(model).__name__
    return f"{name}-DiffusionSDPO"


def check_and_complete(
    args: DiffusionSDPOConfig, loaded: LoadedModel, loss: LossSpec, *, adapter: str | None
) -> NoiseSettings:
    """Check the settings against the model, set unset settings to the defaults of family and loss, and return the
    settings of noise and timesteps."""
    family = loaded.family
    check_guidance(args, family)
    if family.takes_source:
        check_sources(args, family.name)
    sample_sources(args, family)
    complete_args(args, family, loss, full=adapter is None)
    check_resolution(args, family)
    timesteps = checked_timesteps(args, family)
    check_noise_range(args, family, timesteps)
    check_without_dropout(args, loaded.denoiser)
    check_activation_checkpointing(args, loaded.denoiser)
    inversion = checked_inversion(args, family, timesteps, image_sizes(args))
    return NoiseSettings(timesteps, args.noise_offset, args.n_timesteps_per_pair, inversion)


def check_sources(args: DiffusionSDPOConfig, model: str) -> None:
    """Raise `ValueError` if a setting does not work with the source images of edit pairs."""
    if args.random_crop:
        raise ValueError(
            f"`random_crop` cannot handle source images yet, and {model} trains on edit pairs. Leave it out."
        )


def sample_sources(args: DiffusionSDPOConfig, family: Family) -> list[Image.Image]:
    """Return the images that `sample_prompts` edit.

    Raises:
        `ValueError`: If the model needs them and they are not set, or it takes none, or their number is not that of the
            prompts, or one cannot be read.
    """
    if not args.sample_prompts or (args.sample_sources is None and not family.takes_source):
        return []
    prompts, paths = args.sample_prompts, args.sample_sources or []
    if not (family.takes_source or family.may_take_source):
        raise ValueError(f"`sample_sources` needs an edit model, and {family.name} is not one. Leave it out.")
    if len(paths) != len(prompts):
        raise ValueError(
            f"`sample_sources` must have one image for each of the {len(prompts)} `sample_prompts`, got {len(paths)}. "
            f"{family.name} edits one image for each prompt."
        )
    sources = []
    for path in paths:
        try:
            with Image.open(path) as source:
                sources.append(ImageOps.exif_transpose(source).convert("RGB"))
        except OSError as error:
            raise ValueError(f"`sample_sources` has {path!r}, which cannot be read as an image: {error}") from error
    return sources


def complete_args(args: DiffusionSDPOConfig, family: Family, loss: LossSpec, *, full: bool) -> None:
    """Set unset settings to the defaults of the family and the loss, and log them."""
    mu, beta = loss_defaults(args, family, full=full)
    warn_of_far_settings(args, family, full=full)
    defaults_by_name = {
        "learning_rate": family.learning_rate_full if full else family.learning_rate_lora,
        "beta": beta,
        "safeguard_mu": mu,
        "resolution": settled_resolution(family.default_resolution),
        "weighting_scheme": family.weighting_scheme if args.timesteps is None else None,
        "guidance_scale": family.guidance_scale,
    }
    chosen = {name: value for name, value in defaults_by_name.items() if getattr(args, name) is None}
    for name, value in chosen.items():
        setattr(args, name, value)
    set_deepspeed_learning_rate(args)
    safeguarded = args.safeguard != "none" and loss.uses_loser
    logged = {name: value for name, value in chosen.items() if value is not None}
    if not safeguarded:
        logged.pop("safeguard_mu", None)
    if logged:
        listed = ", ".join(f"{name}={value}" for name, value in logged.items())
        logger.warning("Defaults for %s and the loss %r: %s.", family.name, args.loss_type, listed)


def check_resolution(args: DiffusionSDPOConfig, family: Family) -> None:
    """Raise `ValueError` if the VAE would crop the images, the denoiser has no position embeddings for their size, or
    the pipeline cannot generate images of this size."""
    size = image_size(args)
    unit = family.vae_scale_factor * family.patch_size
    step = args.bucket_kwargs.get("step", AspectRatioBuckets.step)
    if args.aspect_ratio_buckets and step % unit:
        raise ValueError(f"`step` of `bucket_kwargs` must be a multiple of {unit} pixels for this model, got {step}.")
    if args.sample_prompts:
        unit = math.lcm(unit, 8)
    if any(side % unit for side in size):
        raise ValueError(f"`resolution` must be a multiple of {unit} pixels for this model, got {args.resolution}.")
    family.check_image_size(*size)
    refused = {}
    for height, width in image_sizes(args):
        try:
            family.check_image_size(height, width)
        except ValueError as error:
            refused[f"{height}x{width}"] = error
    if refused:
        raise ValueError(
            f"Every size of `aspect_ratio_buckets` must fit the model. These sizes do not fit: {', '.join(refused)}. "
            f"Lower `max_aspect_ratio` of `bucket_kwargs` or `resolution`. {next(iter(refused.values()))}"
        )


def check_noise_range(args: DiffusionSDPOConfig, family: Family, timesteps: dict[str, Any]) -> None:
    """Log the timesteps within `loser_noise_range`. Raises `ValueError` if the range contains no drawn timestep."""
    if args.loser_noise_range is None:
        return
    low, high = args.loser_noise_range
    process = family.noise_process
    for tokens in sorted({family.tokens_of_image(*size) for size in image_sizes(args)}):
        within = process.timestep_bounds(low, high, tokens, **timesteps)
        if within is None:
            break
    if within is None:
        every = process.timestep_bounds(0.0, 1.0, tokens, **timesteps)
        ends = torch.tensor(every).to(process.timestep_dtype)
        first, last = process.noise_level(ends, tokens).tolist()
        raise ValueError(
            f"`loser_noise_range` must overlap the noise levels that training draws, {first:.3f} to {last:.3f}. Got "
            f"{list(args.loser_noise_range)}. Change the range, or use `loss_type='sft'` to train winners only."
        )
    logger.warning(
        "Losers train at the noise levels %g to %g: timesteps %g to %g of %d.",
        low,
        high,
        *within,
        process.num_train_timesteps,
    )


def loss_settings(args: DiffusionSDPOConfig) -> LossSettings:
    """Return the settings of the loss. Every field of [`LossSettings`] is a setting of the same name."""
    settings = {setting.name: getattr(args, setting.name) for setting in fields(LossSettings)}
    if settings["loser_noise_range"] is not None:
        settings["loser_noise_range"] = tuple(settings["loser_noise_range"])
    return LossSettings(**settings)


def image_sizes(args: DiffusionSDPOConfig) -> tuple[tuple[int, int], ...]:
    """Return the sizes `(height, width)` of training images. `args.resolution` must be set."""
    buckets = aspect_ratio_buckets(args)
    return (image_size(args),) if buckets is None else buckets.sizes


def image_size(args: DiffusionSDPOConfig) -> tuple[int, int]:
    """Return `resolution` as height and width. `args.resolution` must be set."""
    assert args.resolution is not None, "`complete_args` sets `resolution`."
    height, width = args.resolution
    return height, width


def aspect_ratio_buckets(args: DiffusionSDPOConfig) -> AspectRatioBuckets | None:
    """Return the sizes at which pairs train, or `None` if all pairs train at `args.resolution`. `args.resolution` must
    be set."""
    if not args.aspect_ratio_buckets:
        return None
    return AspectRatioBuckets(image_size(args), **args.bucket_kwargs)


def largest_batch(args: DiffusionSDPOConfig) -> int:
    """Return the number of pairs of the largest batch in training and evaluation."""
    return max(args.per_device_train_batch_size, args.per_device_eval_batch_size)


def pairs_of_a_step(args: DiffusionSDPOConfig, batch_size: int) -> int:
    """Return the number of pairs in one batch of all processes together."""
    assert isinstance(args.accelerator_config, AcceleratorConfig), "`__post_init__` parses it."
    return batch_size * (1 if args.accelerator_config.split_batches else args.world_size)


def precompute_folder(args: DiffusionSDPOConfig) -> Path:
    """Return the folder of latents, prompt embeddings and errors that are computed before training."""
    return default_folder() if args.precompute_dir is None else Path(args.precompute_dir).expanduser()


def stored_crops(args: DiffusionSDPOConfig) -> int | None:
    """Return the number of stored random crops per image, or `None` if crops are not random or are drawn while
    training."""
    return args.precompute_epochs if args.precompute_latents and args.random_crop else None
