"""Fills in unset settings with the defaults of the model family and the loss, and checks all against the model and the
machine.

The functions at the end derive values from several settings.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn
from transformers.trainer_pt_utils import AcceleratorConfig

from ...data.buckets import AspectRatioBuckets
from ...data.images import ImageReader, UndecodableImageError, UnreadableImageError
from ...data.transforms import INTERPOLATION
from ...engines.engine_settings import by_engine, check_deepspeed_precision, set_deepspeed_learning_rate
from ...families import PARAMETER_MU, Family
from ...families.inversion import Inversion, InversionSettings, inversion_of
from ...families.noise import TimestepSampling
from ...losses import LOSSES, LossSpec, loss_weights_by_name
from ...models.loading import LoadedModel
from ...saving.run_folder import refuse_own_start
from ...step.pair_forward import LossSettings, NoiseSettings
from ...step.split_gradients import SplitGradients
from ...utils._compat import activation_checkpointing, checkpoints_activations
from ...utils.errors import UserError
from ...utils.files import user_cache
from .all_arguments import settled_resolution
from .checks import check_weighting_kwargs
from .declaring import from_kwargs
from .default_safeguard import default_safeguard, has_dropout
from .diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)
FAR = 100  # a `beta` further from its default, as a factor, is probably a mistake
DRAWN = 10_000  # number of timesteps that are compared with an inversion's grid
NOTABLE = 0.01  # share of drawn timesteps without noise that is worth a warning

# ---- Before the model is loaded -------------------------------------------------------------------------------------


def copy_and_check_args(model: Any, ref_model: Any, args: DiffusionSDPOConfig | None) -> DiffusionSDPOConfig:
    """Check the settings as far as possible without a model, and return the trainer's copy of them.

    Raises:
        `ValueError`: If `args` is no `DiffusionSDPOConfig`, the process sees several GPUs or has fp16 without one, two
            arguments name a reference, or the output folder is not writable.
    """
    if args is None:
        name = Path(model).name if isinstance(model, (str, Path)) else type(model).__name__
        args = DiffusionSDPOConfig(f"{name}-DiffusionSDPO")
    if not isinstance(args, DiffusionSDPOConfig):
        raise UserError(
            f"`args` must be a DiffusionSDPOConfig, got {type(args).__name__}. Pass a DiffusionSDPOConfig."
        )
    if args.n_gpu > 1:  # transformers would wrap the model in `nn.DataParallel`, which does not copy the reference
        raise UserError(
            f"Each process trains on one GPU, but this one sees {args.n_gpu}. Start one process per GPU with "
            "`trl-diffusion-sdpo train --accelerate_config multi_gpu ...` or `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one GPU."
        )
    if args.fp16 and args.device.type == "cpu":  # not in the configuration, because a CPU may plan a run
        raise UserError("`fp16=True` needs an accelerator, because accelerate ignores it on a CPU. Use `bf16`.")
    check_deepspeed_precision(args)
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise UserError(
            "Only one of `ref_model` and `ref_model_name_or_path` may name the reference, got a "
            f"{type(ref_model).__name__} and {args.ref_model_name_or_path!r}. Leave one of the two out."
        )
    ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
    refuse_own_start(args.output_dir, (model, args.adapter_name_or_path, ref_model))
    if args.ref_model_init_kwargs is not None and not isinstance(ref_model, (str, Path)):
        raise UserError(
            "`ref_model_init_kwargs` needs a `ref_model` that is a Hub id or a folder, got "
            f"{'none' if ref_model is None else f'a {type(ref_model).__name__}'}. Leave `ref_model_init_kwargs` out."
        )
    if args.should_save:
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.output_dir):
                pass
        except OSError as error:
            raise UserError(
                f"`output_dir` must be a writable folder, got {args.output_dir!r} ({error}). Choose another folder."
            ) from error
    args = copy.copy(args)
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # denoisers never change their buffers
    return args


# ---- With the model -------------------------------------------------------------------------------------------------


def check_and_complete(
    args: DiffusionSDPOConfig, loaded: LoadedModel, loss: LossSpec, *, adapter: str | None
) -> NoiseSettings:
    """Check the settings against the model, and fill in the unset ones with the defaults of the model family and the
    loss. Return the settings of noise and timesteps.

    Raises:
        `ValueError`: If the model cannot train with the settings.
    """
    family, denoiser = loaded.family, loaded.denoiser
    if args.guidance_scale is not None and family.guidance_scale is None:
        raise UserError(
            f"`guidance_scale` needs a denoiser that takes it as an input. Got {args.guidance_scale} for "
            f"{family.name}, whose denoiser does not. Leave it unset; for the guidance of sample images, use "
            "`sample_kwargs`."
        )
    complete_args(args, family, full=adapter is None)
    check_resolution(args, family)
    sample_sources(args, family)
    timesteps = checked_timesteps(args, family)
    check_noise_range(args, family, timesteps)

    # No dropout where two predictions of the same input must be equal.
    if args.safeguard == "parameter" and args.safeguard_settings.low_memory:
        refuse_dropout(denoiser, "`low_memory` of `safeguard_kwargs`")
    if args.precompute_ref_errors:
        refuse_dropout(denoiser, "`precompute_ref_errors`, whose policy must start exactly as its reference,")
    checkpoints, _ = activation_checkpointing(args)
    if checkpoints and not checkpoints_activations(denoiser):
        raise UserError(
            "`activation_checkpointing` (`gradient_checkpointing`) needs a denoiser that has it, got a "
            f"{type(denoiser).__name__} without. Leave it off, and save memory by smaller micro-batches, or by "
            "`low_memory` of `safeguard_kwargs` with `safeguard='parameter'`."
        )
    inversion = checked_inversion(args, family, timesteps)
    return NoiseSettings(timesteps, args.noise_offset, inversion)


def predicts_halves(args: DiffusionSDPOConfig, denoiser: nn.Module, loss: LossSpec) -> bool:
    """Return whether a training step predicts winners and losers in two half batches: with `safeguard="parameter"`,
    where more than one gradient of a branch is needed, or one backward pass cannot give the gradients of both."""
    if args.safeguard != "parameter":
        return False
    settings = args.safeguard_settings
    several = bool(args.mask_anchor) or (settings.anchor or loss.anchor) == "error"
    whole_modules = args.torch_compile or by_engine(args) or not SplitGradients.fits(denoiser)
    return settings.low_memory or several or whole_modules


def refuse_dropout(denoiser: nn.Module, what: str) -> None:
    """Raise `ValueError` if a denoiser has active dropout. `what` names the setting that needs two equal
    predictions."""
    if has_dropout(denoiser):
        raise UserError(
            f"{what} needs two equal predictions of the same images, but the denoiser has dropout. Set "
            "`disable_dropout=True`, or leave the setting out."
        )


def sample_sources(args: DiffusionSDPOConfig, family: Family) -> list[Image.Image]:
    """Return the images that `sample_prompts` edit, cropped to the shape of `args.resolution` as in training, unless
    the source determines the size of the sample image. `args.resolution` must be set.

    Raises:
        `ValueError`: If the model always edits images and `sample_sources` is unset, if the model edits no images, if
            `sample_sources` and `sample_prompts` differ in number, or if an image cannot be read.
    """
    if not args.sample_prompts or (args.sample_sources is None and not family.takes_source):
        return []
    prompts, paths = args.sample_prompts, args.sample_sources or []
    if not (family.takes_source or family.may_take_source):
        raise UserError(f"`sample_sources` needs an edit model, got {family.name}. Leave `sample_sources` out.")
    if len(paths) != len(prompts):
        raise UserError(
            f"`sample_sources` must have one image for each prompt in `sample_prompts`, got {len(paths)} images and "
            f"{len(prompts)} prompts for {family.name}."
        )
    sources = []
    for path in paths:
        try:
            sources.append(ImageReader().decode(path))
        except (UndecodableImageError, UnreadableImageError) as error:
            raise UserError(f"`sample_sources` must be paths of images, got {path!r}: {error}.") from error
    height, width = image_size(args)
    if not family.size_kwargs(height, width):
        return sources
    return [ImageOps.fit(source, (width, height), INTERPOLATION) for source in sources]


def complete_args(args: DiffusionSDPOConfig, family: Family, *, full: bool) -> None:
    """Fill in unset settings of `args` with the defaults of the model family and the loss, and log them."""
    mu, beta = loss_defaults(args, family, full=full)
    safeguard, reason = default_safeguard(args, args.loss_spec, family.denoiser)
    if args.safeguard is None and reason and args.should_log:
        logger.log(logging.WARNING if safeguard == "output" else logging.INFO, reason)
    defaults_by_name = {
        "learning_rate": family.learning_rate_full if full else family.learning_rate_lora,
        "beta": beta,
        "safeguard": safeguard,
        "safeguard_mu": PARAMETER_MU if (args.safeguard or safeguard) == "parameter" else mu,
        "resolution": settled_resolution(family.default_resolution),
        "weighting_scheme": family.weighting_scheme if args.timesteps is None else None,
        "guidance_scale": family.guidance_scale,
    }
    chosen = {name: value for name, value in defaults_by_name.items() if getattr(args, name) is None}
    for name, value in chosen.items():
        setattr(args, name, value)
    set_deepspeed_learning_rate(args)
    listed = ", ".join(f"{name}={value}" for name, value in chosen.items() if value is not None)
    if args.should_log:
        logger.info("Defaults for %s and the loss %r: %s.", family.name, args.loss_type, listed)


def loss_defaults(args: DiffusionSDPOConfig, family: Family, *, full: bool) -> tuple[float, float | None]:
    """Return the defaults of `safeguard_mu` (in output space) and `beta` for the model family and the loss. Warn if
    `args.beta` is far from its default.

    For a sum of losses, `safeguard_mu` is the largest default among the losses that use the loser, and `beta` is the
    default that all losses share. The returned `beta` is `None` if the loss has no `beta`, or if `args.beta` is set.

    Raises:
        `ValueError`: If `beta` is unset and the losses of a sum have different defaults.
    """
    weights = loss_weights_by_name(args.loss_type, args.loss_weights)
    rows = {name: family.loss_defaults(name) for name, weight in weights.items() if weight}
    guarded = [row.safeguard_mu for name, row in rows.items() if LOSSES[name].uses_loser]
    mu = max(guarded or [row.safeguard_mu for row in rows.values()])
    betas = {name: row.beta_for(full=full) for name, row in rows.items() if LOSSES[name].uses_beta}
    is_far = args.beta and betas and all(not 1 / FAR <= args.beta / usual <= FAR for usual in betas.values())
    if is_far and args.should_log:
        listed = ", ".join(f"{beta:g} for {name}" for name, beta in betas.items())
        logger.warning(
            "`beta=%g` is more than %d times smaller or larger than the default of %s (%s). A beta of language models, "
            "such as 0.1, hardly ties the model to its reference here. Leave `beta` unset for the default.",
            *(args.beta, FAR, family.name, listed),
        )
    if args.beta is not None or not betas:
        return mu, None
    if len(set(betas.values())) > 1:
        listed = ", ".join(f"{beta:g} of {name}" for name, beta in betas.items())
        raise UserError(f"All losses of a sum share one `beta`, but their defaults differ: {listed}. Set `beta`.")
    return mu, next(iter(betas.values()))


def check_resolution(args: DiffusionSDPOConfig, family: Family) -> None:
    """Raise `ValueError` if an image size does not fit the model: the VAE would crop the images, the denoiser has no
    position embeddings for it, or the pipeline cannot generate samples of it."""
    size = image_size(args)
    unit = family.vae_scale_factor * family.patch_size
    step = args.bucket_kwargs.get("step", AspectRatioBuckets.step)
    if args.aspect_ratio_buckets and (step < 1 or step % unit):
        raise UserError(f"`step` of `bucket_kwargs` must be a multiple of {unit} pixels for this model, got {step}.")
    if args.sample_prompts:
        unit = math.lcm(unit, 8)
    if any(side % unit for side in size):
        raise UserError(f"`resolution` must be a multiple of {unit} pixels for this model, got {args.resolution}.")
    for height, width in image_sizes(args):
        family.check_image_size(height, width)


def check_noise_range(args: DiffusionSDPOConfig, family: Family, timesteps: dict[str, Any]) -> None:
    """Raise `ValueError` if training draws no timestep with a noise level in `loser_noise_range`."""
    if args.loser_noise_range is None:
        return
    low, high = args.loser_noise_range
    process = family.noise_process
    drawn = process.candidate_timesteps(torch.device("cpu"), **timesteps)
    for size in image_sizes(args):
        levels = process.noise_level(drawn, family.tokens_of_image(*size))
        if not ((levels >= low) & (levels <= high)).any():
            raise UserError(
                f"`loser_noise_range` must overlap the noise levels that training draws, {levels.min():.3f} to "
                f"{levels.max():.3f}. Got {list(args.loser_noise_range)}. Change the range, or use `loss_type='sft'` "
                "to train winners only."
            )


def checked_timesteps(args: DiffusionSDPOConfig, family: Family) -> dict[str, Any]:
    """Return the keyword arguments with which the noise process draws timesteps.

    Raises:
        `ValueError`: If the model's noise process does not support the settings.
    """
    process = family.noise_process
    last = process.num_train_timesteps
    if args.timestep_range is not None and args.timestep_range[1] > last:
        raise UserError(
            f"`timestep_range` must end at {last} or below, the scheduler's number of timesteps. Got "
            f"{list(args.timestep_range)}. Lower its second number."
        )
    # Raise errors in settings now.
    process.weights(torch.ones(1, dtype=torch.long), weighting=args.timestep_weighting, image_seq_len=1)
    check_weighting_kwargs(args)
    if args.timesteps is not None:
        only: dict[str, Any] = {"only": tuple(args.timesteps)}
        process.timesteps(torch.zeros(1), **only)  # raises errors in settings now
        return only
    constants = {name: value for name, value in args.weighting_kwargs.items() if name != "snr_gamma"}
    sampling = TimestepSampling(args.weighting_scheme or "none", **constants)
    timestep_range = None if args.timestep_range is None else tuple(args.timestep_range)
    return {"timestep_range": timestep_range, "sampling": sampling}


def checked_inversion(
    args: DiffusionSDPOConfig, family: Family, timesteps: dict[str, Any]
) -> InversionSettings | None:
    """Return the settings of the inversion that gives each image its noise, or `None` if `noise_source` is not
    `"inversion"`.

    With `end: grid`, an image at or below the first timestep of the grid gets no noise; warn if training draws many.
    `timesteps` are the arguments from [`checked_timesteps`].

    Raises:
        `ValueError`: If the model's noise process does not support the settings, or no image would get noise.
    """
    if args.noise_source != "inversion":
        return None
    process, settings = family.noise_process, InversionSettings(**args.inversion_kwargs)
    inversion = inversion_of(process)
    if settings.steps > process.num_train_timesteps:
        raise UserError(
            f"`steps` of `inversion_kwargs` must be at most {process.num_train_timesteps}, the scheduler's number of "
            f"timesteps. Got {settings.steps}. Published values are 5 and 10."
        )
    if settings.eta and not inversion.has_variance:
        raise UserError(
            f"`eta` of `inversion_kwargs` must be 0 for a model whose sampling step adds no noise, got {settings.eta} "
            f"for {family.name}. Leave `eta` out."
        )
    if settings.end == "grid":
        tokens = [family.tokens_of_image(*size) for size in image_sizes(args)]
        clean = max(_share_without_noise(inversion, settings, count, timesteps) for count in tokens)
        message = (
            f"With `end: grid` and `steps: {settings.steps}` in `inversion_kwargs`, images get noise only at timesteps "
            f"above the first inversion step. {clean:.0%} of the timesteps that training draws are not above it, and "
            "train on clean latents as if they were noisy. Use `end: exact`, or more `steps`."
        )
        if clean == 1:
            raise UserError(message)
        if clean >= NOTABLE and args.should_log:
            logger.warning(message)
    return settings


def _share_without_noise(
    inversion: Inversion, settings: InversionSettings, tokens: int, timesteps: dict[str, Any]
) -> float:
    """Return the share of the drawn timesteps at or below the first timestep of an inversion's grid."""
    uniform = (torch.arange(DRAWN) + 0.5) / DRAWN
    drawn = inversion.process.timesteps(uniform, image_seq_len=tokens, **timesteps)
    grid = inversion.grid(settings.steps, uniform.device, tokens)
    return 1 - float((drawn[:, None] > grid).any(dim=1).double().mean())


# ---- Values that follow from several settings ------------------------------------------------------------------------


def loss_settings(args: DiffusionSDPOConfig) -> LossSettings:
    """Return the settings of the loss, after `complete_args`."""
    assert args.safeguard is not None and args.safeguard_mu is not None, "`complete_args` sets both."
    levels = args.loser_noise_range
    return LossSettings(
        loss_type=args.loss_type,
        loss_weights=args.loss_weights,
        loss_kwargs=args.loss_kwargs,
        margin_clamp=args.margin_clamp,
        beta=args.beta,
        safeguard=args.safeguard,
        safeguard_mu=args.safeguard_mu,
        safeguard_granularity=args.safeguard_settings.granularity,
        safeguard_eps=args.safeguard_settings.eps,
        timestep_weighting=args.timestep_weighting,
        snr_gamma=args.weighting_kwargs.get("snr_gamma"),
        loser_noise_range=None if levels is None else (levels[0], levels[1]),
        mask_anchor=args.mask_anchor,
    )


def image_sizes(args: DiffusionSDPOConfig) -> tuple[tuple[int, int], ...]:
    """Return all sizes `(height, width)` at which pairs train: one, or those of all aspect-ratio buckets.
    `args.resolution` must be set."""
    buckets = aspect_ratio_buckets(args)
    return (image_size(args),) if buckets is None else buckets.sizes


def image_size(args: DiffusionSDPOConfig) -> tuple[int, int]:
    """Return `args.resolution` as `(height, width)`. `args.resolution` must be set."""
    assert args.resolution is not None, "`complete_args` sets `resolution`."
    height, width = args.resolution
    return height, width


def aspect_ratio_buckets(args: DiffusionSDPOConfig) -> AspectRatioBuckets | None:
    """Return the aspect-ratio buckets, or `None` if all pairs train at `args.resolution`, which must be set."""
    if not args.aspect_ratio_buckets:
        return None
    return from_kwargs(AspectRatioBuckets, "bucket_kwargs", args.bucket_kwargs, image_size(args))


def largest_batch(args: DiffusionSDPOConfig) -> int:
    """Return the larger batch size per device of training and evaluation."""
    return max(args.per_device_train_batch_size, args.per_device_eval_batch_size)


def pairs_of_a_step(args: DiffusionSDPOConfig, batch_size: int) -> int:
    """Return the number of pairs that all processes together read at a time, for a batch size per device."""
    assert isinstance(args.accelerator_config, AcceleratorConfig), "`__post_init__` parses it."
    return batch_size * (1 if args.accelerator_config.split_batches else args.world_size)


def precompute_folder(args: DiffusionSDPOConfig) -> Path:
    """Return the folder for latents, prompt embeddings and reference errors computed before training."""
    return user_cache() if args.precompute_dir is None else Path(args.precompute_dir).expanduser()


def stored_crops(args: DiffusionSDPOConfig) -> int | None:
    """Return the number of random crops that `precompute_latents` stores for each image, or `None` without both
    settings."""
    return args.precompute_epochs if args.precompute_latents and args.random_crop else None
