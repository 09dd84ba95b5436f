"""Set-up before the first batch: the weights that train, settings completed by family and loss and checked against the
model."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import nn

from ..cache.encoding import EncodingSettings, PairEncoding, default_folder
from ..cache.key import EncoderKey, hash_of_tensors
from ..cache.reference_errors import ErrorSettings
from ..engines.batch_loaders import load_one_by_one
from ..engines.engine import Engine
from ..engines.engine_settings import (
    by_engine,
    check_deepspeed_precision,
    loading_unsharded,
    set_deepspeed_learning_rate,
    shards_weights,
)
from ..engines.processes import peers
from ..families import Family
from ..losses import LossSpec
from ..models.adapters import active_adapter, add_lora, check_adapter_weight, freeze, train_only_adapter
from ..models.frozen_components import FrozenComponents
from ..models.loading import LoadedModel, load_model, load_reference
from ..models.numerics import autocast_dtype
from ..models.reference import PrecomputedReference, Reference, build_reference
from ..saving.run_folder import refuse_own_start
from ..saving.starting_point import StartingPoint, attach_adapter, check_continued, starting_point
from ..step.noisy_batch import NoiseSettings
from ..step.pair_forward import LossSettings
from .config.all_arguments import settled_resolution
from .config.model_checks import (
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
from .data_preparation import aspect_ratio_buckets, largest_batch
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
    check_deepspeed_precision(args)
    if ref_model is not None and model is ref_model and not isinstance(model, (str, Path)):
        raise ValueError(
            "`model` and `ref_model` must be two objects: a reference that trains along keeps every margin at 0. "
            "Leave `ref_model` out, or pass a copy."
        )
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise ValueError(
            f"`ref_model` and `ref_model_name_or_path` both name the reference; got a {type(ref_model).__name__} and "
            f"{args.ref_model_name_or_path!r}. Leave one out."
        )
    ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
    refuse_own_start(args.output_dir, (model, args.adapter_name_or_path, ref_model))
    if args.ref_model_init_kwargs is not None and not isinstance(ref_model, (str, Path)):
        raise ValueError(
            "`ref_model_init_kwargs` are for a `ref_model` given as Hub id or folder, got "
            f"{'none' if ref_model is None else f'a {type(ref_model).__name__}'}. Leave them out."
        )
    if args.should_save:
        check_output_dir(args.output_dir)
    args = copy.copy(args)
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # no denoiser's buffers change; DDP would send them in every step
    return args


def load_policy(
    model: Any,
    args: DiffusionSDPOConfig,
    processing_class: DiffusionPipeline | None,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    *,
    denoiser: bool = True,
) -> LoadedModel:
    """The pipeline whose denoiser trains, unsharded under every engine; `denoiser` as of `load_model`."""
    start = StartingPoint("", adapter=args.adapter_name_or_path)
    options = cast(Any, args.model_init_kwargs)  # a dict by now
    if isinstance(model, (str, Path)):
        start = starting_point(model, args.adapter_name_or_path)
        model, options = start.pipeline, start.with_recorded(options)
    if quantization_config is not None and peft_config is None and start.adapter is None:
        raise ValueError(
            "`quantization_config` needs `peft_config`: quantized weights cannot be trained. Pass a `LoraConfig`, or "
            "leave the quantization out."
        )
    with loading_unsharded(args):
        loaded = load_model(
            model,
            processing_class=processing_class,
            model_init_kwargs=options,
            quantization_config=quantization_config,
            device=args.device,
            encoders=not args.precompute_latents,
            denoiser=denoiser,
            denoiser_folder=start.denoiser,
        )
    if start.adapter is None or not denoiser:
        return loaded
    attach_adapter(loaded.pipeline, loaded.family.denoiser_name, start.adapter, seed=args.seed)
    return dataclasses.replace(loaded, adapter_source=start.adapter)


def choose_trained_weights(
    loaded: LoadedModel, peft_config: PeftConfig | None, args: DiffusionSDPOConfig
) -> tuple[str | None, bool]:
    """Add a LoRA if one is asked for, and freeze what does not train.

    Returns:
        The trained adapter's name (`None` in full tuning), and whether it was added here.
    """
    denoiser = loaded.denoiser
    if args.disable_dropout:
        disable_dropout(denoiser)
    for name in loaded.family.frozen_components:
        freeze(name, getattr(loaded.pipeline, name))
    added = peft_config is not None and loaded.adapter_source is None
    if peft_config is not None and added:
        adapter = add_lora(denoiser, peft_config, loaded.family.lora_target_modules, args.seed)
        if args.disable_dropout:
            disable_dropout(denoiser)
    else:
        adapter = active_adapter(denoiser)
        if adapter is not None:
            check_adapter_weight(denoiser, adapter)
            if peft_config is not None:
                check_continued(denoiser, adapter, peft_config, str(loaded.adapter_source))
    check_precision(denoiser, adapter, args)
    if args.save_full_pipeline and adapter is not None:
        raise ValueError(
            "`save_full_pipeline=True` would save the base without its LoRA. Leave it off and load the LoRA with "
            "`load_lora_weights`, or tune in full."
        )
    if adapter is None:
        denoiser.requires_grad_(True)
        for name in loaded.family.idle_modules:
            denoiser.get_submodule(name).requires_grad_(False)
    else:
        train_only_adapter(denoiser, adapter)
    return adapter, added


def make_reference(
    loaded: LoadedModel, ref_model: Any, args: DiffusionSDPOConfig, loss: LossSpec, *, adapter: str | None, added: bool
) -> Reference:
    """How the old policy is recovered; `adapter` is the trained one, and `added` whether it starts at zero."""
    given = None
    if ref_model is not None:
        given = given_reference(ref_model, loaded, args)
        if args.disable_dropout:
            disable_dropout(given)
        if not loss.needs_reference:
            logger.warning(
                "The loss %r reads no reference; `ref_model` serves the metrics `errors/*_change` only.",
                args.loss_type,
            )
    changed_by_engine = by_engine(args)
    halves = args.ref_model_half_precision and not changed_by_engine
    return build_reference(
        loaded.denoiser,
        needed=loss.needs_reference,
        given=given,
        may_modify_given=isinstance(ref_model, (str, Path)),
        changed_by_engine=changed_by_engine,
        shared=shards_weights(args),
        fresh_adapter=adapter if added else None,
        started_adapter=None if added else adapter,
        follows=args.sync_ref_model,
        half_dtype=autocast_dtype(args.mixed_precision) if halves else None,
        precomputed=args.precompute_ref_errors,
    )


def given_reference(ref_model: Any, loaded: LoadedModel, args: DiffusionSDPOConfig) -> nn.Module:
    """The denoiser of a reference, with the LoRA of a run that it is named by."""
    start = StartingPoint("")
    options = cast(Any, args.ref_model_init_kwargs)  # a dict by now
    if isinstance(ref_model, (str, Path)):
        start = starting_point(ref_model)
        ref_model, options = start.pipeline, start.with_recorded(options)
    with loading_unsharded(args):
        given = load_reference(
            ref_model,
            loaded,
            model_init_kwargs=cast(Any, args.model_init_kwargs),
            ref_model_init_kwargs=options,
            denoiser_folder=start.denoiser,
            device=args.device,
        )
    if start.adapter is not None:
        owner = copy.copy(loaded.pipeline)
        owner.register_modules(**{loaded.family.denoiser_name: given})
        attach_adapter(owner, loaded.family.denoiser_name, start.adapter)
    return given


def reference_facts(
    reference: PrecomputedReference, family: Family, engine: Engine, args: DiffusionSDPOConfig, key: EncoderKey
) -> dict:
    """What errors of a reference depend on besides the data and the noise. All processes must call it together, before
    an engine shards the weights."""
    parts = {name: getattr(family.pipeline, name) for name in family.frozen_components}
    denoiser: Any = family.denoiser if reference.module is None else reference.module
    configs = {"configuration": denoiser.config, "scheduler": family.pipeline.scheduler.config}
    return {
        "reference": peers(args).first(lambda: hash_of_tensors(reference.tensors())),
        "family": family.name,
        "components": {name: str(part.dtype) for name, part in parts.items()},
        "encoders": key.hashes,
        "encoded": args.precompute_latents,  # in other batches, which may round differently
        "crops": stored_crops(args),
        **{kind: {k: v for k, v in config.items() if not k.startswith("_")} for kind, config in configs.items()},
        "guidance_scale": args.guidance_scale,
        "precision": [args.mixed_precision, str(engine.rounding), str(family.dtype)],
        "attention": args.attention_backend,
        "compiled": args.torch_compile,
    }


def stored_crops(args: DiffusionSDPOConfig) -> int | None:
    """Random crops of each image that are encoded; `None` where none are, as crops are drawn live or at the center."""
    return args.latent_crops if args.precompute_latents and args.random_crop else None


def precompute_folder(args: DiffusionSDPOConfig) -> Path:
    """The folder of everything that is computed before training."""
    return default_folder() if args.precompute_dir is None else Path(args.precompute_dir).expanduser()


def pair_encoding(frozen: FrozenComponents, key: EncoderKey, args: DiffusionSDPOConfig) -> PairEncoding:
    """Encodes images and prompts before training, as the settings say."""
    sides = cast(Any, [args.resolution] if isinstance(args.resolution, int) else args.resolution)
    settings = EncodingSettings(
        folder=precompute_folder(args),
        device=args.device,
        size=(sides[0], sides[-1]),
        crops=args.latent_crops,
        largest_batch=largest_batch(args),
        pin_memory=args.dataloader_pin_memory,
        check_sample=args.verify_images == "sample",
        load=partial(load_one_by_one, args),
        peers=peers(args),
    )
    return PairEncoding(frozen, key, settings)


def error_settings(
    args: DiffusionSDPOConfig, facts: dict[str, Any], *, to_inputs: Callable, load: Callable
) -> ErrorSettings:
    """How errors of the reference are computed before training, by settings; the rest is as of [`ErrorSettings`]."""
    return ErrorSettings(
        folder=precompute_folder(args),
        facts=facts,
        noise_draws=args.ref_noise_draws,
        batch_size=args.train_batch_size,
        eval_batch_size=args.eval_batch_size,
        to_inputs=to_inputs,
        load=load,
        show_progress=args.process_index == 0 and not args.disable_tqdm,
        peers=peers(args),
    )


def check_and_complete(
    args: DiffusionSDPOConfig, loaded: LoadedModel, loss: LossSpec, *, adapter: str | None
) -> NoiseSettings:
    """Check the settings against the model, fill in the defaults of family and loss, and return how noise and timesteps
    are drawn."""
    family = loaded.family
    check_guidance(args, family)
    complete_args(args, family, loss, full=adapter is None)
    check_resolution(args, family)
    timesteps = checked_timesteps(args, family)
    check_noise_range(args, family, timesteps)
    check_without_dropout(args, loaded.denoiser)
    check_activation_checkpointing(args, loaded.denoiser)
    inversion = checked_inversion(args, family, timesteps, image_sizes(args))
    return NoiseSettings(timesteps, args.noise_offset, args.input_perturbation, args.n_timesteps_per_pair, inversion)


def loss_settings(args: DiffusionSDPOConfig) -> LossSettings:
    """The settings of the loss."""
    span = args.loser_noise_range
    return LossSettings(
        loss_type=cast(Any, args.loss_type),
        beta=args.beta,
        safeguard=args.safeguard,
        safeguard_mu=args.safeguard_mu,
        safeguard_granularity=args.safeguard_granularity,
        safeguard_eps=args.safeguard_eps,
        loss_kwargs=args.loss_kwargs,
        snr_gamma=args.snr_gamma,
        timestep_weighting=args.timestep_weighting,
        num_noise_bins=args.num_noise_bins,
        loser_noise_range=None if span is None else (span[0], span[1]),
        loss_weights=args.loss_weights,
        sft_weight=args.sft_weight,
        margin_clamp=args.margin_clamp,
    )


def place_frozen_components(loaded: LoadedModel, args: DiffusionSDPOConfig) -> FrozenComponents:
    """The family whose frozen components run on the device; `args.vae_dtype` becomes the precision of the VAE."""

    def load() -> DiffusionPipeline:
        with loading_unsharded(args):
            return loaded.load_encoders()

    frozen = FrozenComponents(
        loaded.family,
        device=args.device,
        half_dtype=autocast_dtype(args.mixed_precision),
        vae_dtype=args.vae_dtype,
        vae_encode_batch_size=args.vae_encode_batch_size,
        guidance_scale=args.guidance_scale,
        offload=args.offload_frozen_components or args.precompute_latents,
        load=load,
    )
    args.vae_dtype = cast(Any, str(frozen.family.pipeline.vae.dtype).removeprefix("torch."))
    return frozen


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
        logger.warning("Chosen for %s and the loss %r: %s.", family.name, args.loss_type, listed)


def check_precision(denoiser: nn.Module, adapter: str | None, args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` where the weights' dtype and the training precision cannot work together."""
    halves = sorted({str(p.dtype) for p in denoiser.parameters() if p.is_floating_point() and p.itemsize < 4})
    if halves and adapter is None:
        raise ValueError(
            f"Full tuning needs float32 weights, got {', '.join(halves)}: small updates would be rounded away. Load "
            "with `dtype='float32'` and set `bf16=True` for autocast."
        )
    if halves and autocast_dtype(args.mixed_precision) is None:
        raise ValueError(
            f"A base held in {', '.join(halves)} needs `bf16=True` or `fp16=True`, as its LoRA is held in float32."
        )


def check_resolution(args: DiffusionSDPOConfig, family: Family) -> None:
    """Raise `ValueError` where the VAE would crop the images, the denoiser has no positions for them, or the pipeline
    would not generate them."""
    sides = (args.resolution,) if isinstance(args.resolution, int) else args.resolution
    unit = family.vae_scale_factor * family.patch_size
    if args.aspect_ratio_buckets and args.bucket_step % unit:
        raise ValueError(f"`bucket_step` must be a multiple of {unit} pixels for this model, got {args.bucket_step}.")
    if args.sample_prompts:
        unit = math.lcm(unit, 8)
    if any(side % unit for side in sides):
        raise ValueError(f"`resolution` must be a multiple of {unit} pixels for this model, got {args.resolution}.")
    family.check_image_size(sides[0], sides[-1])
    refused = {}
    for height, width in image_sizes(args):
        try:
            family.check_image_size(height, width)
        except ValueError as error:
            refused[f"{height}x{width}"] = error
    if refused:
        raise ValueError(
            f"Every size of `aspect_ratio_buckets` must fit the model, and these do not: {', '.join(refused)}. Lower "
            f"`bucket_max_aspect_ratio` or `resolution`. {next(iter(refused.values()))}"
        )


def image_sizes(args: DiffusionSDPOConfig) -> tuple[tuple[int, int], ...]:
    """The sizes `(height, width)` of training images; `args.resolution` is set."""
    buckets = aspect_ratio_buckets(args)
    sides = (args.resolution,) if isinstance(args.resolution, int) else args.resolution
    return ((sides[0], sides[-1]),) if buckets is None else buckets.sizes


def check_noise_range(args: DiffusionSDPOConfig, family: Family, timesteps: dict[str, Any]) -> None:
    """Log the timesteps within `loser_noise_range`; `ValueError` where none of those that are drawn is."""
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
            f"`loser_noise_range` must meet the noise levels that are drawn, {first:.3f} to {last:.3f}; got "
            f"{list(args.loser_noise_range)}. To train winners only, use `loss_type='sft'`."
        )
    logger.warning(
        "Losers train at the noise levels %g to %g: timesteps %g to %g of %d.",
        *(low, high, *within, process.num_train_timesteps),
    )


def disable_dropout(module: nn.Module) -> None:
    """Set every dropout within a module to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0


def default_output_dir(model: Any) -> str:
    """The output folder of a run without `args`."""
    name = Path(model).name if isinstance(model, (str, Path)) else type(model).__name__
    return f"{name}-DiffusionSDPO"
