"""The components of a run: policy, LoRA, reference, VAE, text encoders, and what computes a step."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import nn
from transformers.training_args import OptimizerNames

from ..cache.encoding import EncodingSettings, PairEncoding
from ..cache.key import EncoderKey
from ..cache.reference_errors import ErrorSettings, ReferenceErrors
from ..data.batch_loaders import BatchLoaders, load_one_by_one
from ..data.dataset import PreferenceDataset
from ..engines.engine import Engine
from ..engines.engine_settings import by_engine, loading_unsharded, shards_weights
from ..engines.processes import peers
from ..engines.shared_loading import load_once
from ..families import Family
from ..losses import LossSpec
from ..models.adapters import active_adapter, add_lora, check_adapter_weight, freeze, train_only_adapter
from ..models.frozen_components import FrozenComponents
from ..models.kernels import check_attention, is_mostly_blocks
from ..models.loading import LoadedModel, load_model, load_reference
from ..models.numerics import autocast_dtype
from ..models.reference import PrecomputedReference, Reference, build_reference
from ..models.weight_copies import WeightCopy, second_copy
from ..saving.starting_point import StartingPoint, attach_adapter, starting_point
from ..step.pair_forward import PairForward
from ..step.stochastic_rounding import ADVICE, rounds_at_random
from ..utils._compat import attention_backends, compile_with_eager_rounding
from ..utils.errors import UserError
from ..utils.identity import describe_component, hash_of_tensors, public_config
from .config.complete import image_size, largest_batch, pairs_of_a_step, precompute_folder, stored_crops
from .config.diffusion_sdpo_config import DiffusionSDPOConfig
from .config.model_arguments import VaeDtype

logger = logging.getLogger(__name__)

# ---- The policy -----------------------------------------------------------------------------------------------------


def load_policy(
    model: Any,
    args: DiffusionSDPOConfig,
    processing_class: DiffusionPipeline | None,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    *,
    denoiser: bool = True,
) -> LoadedModel:
    """Load the pipeline whose denoiser trains, unsharded in every process, which share the memory of what is loaded
    from a Hub id or folder. `denoiser=False` leaves the denoiser's weights out."""
    start = StartingPoint("", adapter=args.adapter_name_or_path)
    options = args.model_init_kwargs
    if isinstance(model, (str, Path)):
        start = starting_point(model, args.adapter_name_or_path)
        model = start.pipeline
        options = start.with_recorded(options)
    if quantization_config is not None and peft_config is None and start.adapter is None:
        raise UserError(
            "`quantization_config` needs `peft_config`, because quantized weights cannot be trained themselves; got "
            "none. Pass a `LoraConfig`, or leave `quantization_config` out."
        )

    def load() -> LoadedModel:
        with loading_unsharded(args):
            return load_model(
                model,
                processing_class=processing_class,
                model_init_kwargs=options,
                quantization_config=quantization_config,
                device=args.device,
                encoders=not args.precompute_latents,
                denoiser=denoiser,
                denoiser_folder=start.denoiser,
            )

    is_read = isinstance(model, (str, Path)) and quantization_config is None
    loaded = load_once(load, args) if is_read else load()
    if start.adapter is None or not denoiser:
        return loaded
    attach_adapter(loaded.pipeline, loaded.family.denoiser_name, start.adapter, seed=args.seed)
    return dataclasses.replace(loaded, adapter_source=start.adapter)


def choose_trained_weights(
    loaded: LoadedModel, peft_config: PeftConfig | None, args: DiffusionSDPOConfig, *, own_optimizer: bool = False
) -> tuple[str | None, bool]:
    """Add a LoRA if `peft_config` is set and no LoRA was loaded, and freeze all weights that do not train.

    Args:
        own_optimizer (`bool`): Whether the user passes an optimizer. The one in `args` then has no effect.

    Returns:
        The name of the LoRA that trains (`None` in full tuning), and whether it is new.
    """
    denoiser = loaded.denoiser
    if args.disable_dropout:
        disable_dropout(denoiser)
    for name in loaded.family.frozen_components:
        freeze(name, getattr(loaded.pipeline, name))
    added = peft_config is not None and loaded.adapter_source is None
    adapter: str | None
    if peft_config is not None and added:
        adapter = add_lora(denoiser, peft_config, loaded.family.lora_target_modules, args.seed)
        if args.disable_dropout:
            disable_dropout(denoiser)
    else:
        adapter = active_adapter(denoiser)
        if adapter is not None:
            check_adapter_weight(denoiser, adapter)
            if peft_config is not None:
                logger.warning(
                    "`peft_config` has no effect: the LoRA from %s trains further, with its own rank, alpha and target "
                    "modules.",
                    loaded.adapter_source,
                )
    halves = sorted({str(p.dtype) for p in denoiser.parameters() if p.is_floating_point() and p.itemsize < 4})
    if halves and adapter is None:
        check_half_weights(halves, args, own_optimizer=own_optimizer)
    if halves and autocast_dtype(args.mixed_precision) is None:
        raise UserError(
            "A LoRA trains in float32, and goes with a half-precision base model only under autocast. Got a base model "
            f"in {', '.join(halves)} without autocast. Set `bf16=True` or `fp16=True`."
        )
    if args.save_full_pipeline and adapter is not None:
        raise UserError(
            "`save_full_pipeline=True` needs full tuning: the pipeline would not contain the LoRA. Leave it off, and "
            "load the saved LoRA into the base model with `load_lora_weights`."
        )
    if adapter is None:
        denoiser.requires_grad_(True)
        for name in loaded.family.idle_modules:
            denoiser.get_submodule(name).requires_grad_(False)
    else:
        train_only_adapter(denoiser, adapter)
    return adapter, added


def check_half_weights(halves: list[str], args: DiffusionSDPOConfig, *, own_optimizer: bool) -> None:
    """Raise `ValueError` if full tuning would lose small updates, or round policy and reference differently.

    Args:
        halves (`list[str]`): Names of the half-precision dtypes of the denoiser's weights.
        own_optimizer (`bool`): Whether the user passes an optimizer.
    """
    float32 = "Load the model with `dtype='float32'`, and set `bf16=True` to compute in half precision"
    got = f"Got {', '.join(halves)}"
    if own_optimizer or not rounds_at_random(args):
        optimizer = "an optimizer object" if own_optimizer else f"`optim={str(OptimizerNames(args.optim).value)!r}`"
        raise UserError(
            "Full tuning needs float32 weights, or bf16 weights and an optimizer that rounds them at random: rounding "
            f"to the nearest value loses small updates. {got} and {optimizer}. {float32}; or, to save memory, load it "
            f"in bfloat16 and set {ADVICE}."
        )
    if halves != ["torch.bfloat16"] or autocast_dtype(args.mixed_precision) is not torch.bfloat16:
        raise UserError(
            "Stochastic rounding needs bf16 weights that compute under bf16 autocast. "
            f"{got} and `mixed_precision={args.mixed_precision!r}`. Load the model with `dtype='bfloat16'`, and set "
            "`bf16=True`."
        )
    if by_engine(args):
        raise UserError(
            f"Full tuning with DeepSpeed or FSDP needs float32 weights, of which each process holds a part. {got}. "
            f"{float32}."
        )
    if args.sync_ref_model:
        raise UserError(
            "A reference that follows the policy (`sync_ref_model`) needs float32 weights, because it moves by small "
            f"steps too. {got}. {float32}, or leave `sync_ref_model` out."
        )


def disable_dropout(module: nn.Module) -> None:
    """Turn dropout off: set the probability of every dropout layer to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0


# ---- Second copies and files ----------------------------------------------------------------------------------------


def make_reference(
    loaded: LoadedModel,
    ref_model: Any,
    args: DiffusionSDPOConfig,
    loss: LossSpec,
    engine: Engine,
    *,
    adapter: str | None,
    added: bool,
) -> Reference:
    """Build the reference model. `adapter` is the name of the LoRA that trains. `added` says whether it is new, and so
    does not change the model's output yet."""
    half_dtype = None if by_engine(args) else autocast_dtype(args.mixed_precision)
    users_reference = None
    if ref_model is not None:
        users_reference = load_ref_model(ref_model, loaded, args)
        if users_reference is loaded.denoiser:
            raise UserError(
                f"`model` and `ref_model` must be two objects, got one {type(users_reference).__name__} for both. The "
                "reference would train too, and all margins would stay 0. Leave `ref_model` out, or pass a copy of the "
                "model."
            )
        is_changed = half_dtype is not None or args.sync_ref_model or by_engine(args)
        if is_changed and not isinstance(ref_model, (str, Path)):
            users_reference = second_copy(users_reference, shared=shards_weights(args))
        if args.disable_dropout:
            disable_dropout(users_reference)
        if not loss.needs_reference and args.should_log:
            logger.warning(
                "The loss %r has no reference, so `ref_model` is only used for the metrics `errors/*_change`. Leave "
                "it out to save memory.",
                args.loss_type,
            )
    return build_reference(
        loaded.denoiser,
        engine,
        needed=loss.needs_reference,
        users_module=users_reference,
        shared=shards_weights(args),
        fresh_adapter=adapter if added else None,
        started_adapter=None if added else adapter,
        follows=args.sync_ref_model,
        half_dtype=half_dtype,
        precomputed=args.precompute_ref_errors,
    )


def load_ref_model(ref_model: Any, loaded: LoadedModel, args: DiffusionSDPOConfig) -> nn.Module:
    """Load the reference's denoiser, and the LoRA if `ref_model` is the output folder of a run that trained one."""
    start = StartingPoint("")
    options = args.ref_model_init_kwargs
    if isinstance(ref_model, (str, Path)):
        start = starting_point(ref_model)
        ref_model = start.pipeline
        options = start.with_recorded(options)

    def load() -> nn.Module:
        with loading_unsharded(args):
            return load_reference(
                ref_model,
                loaded,
                model_init_kwargs=args.model_init_kwargs,
                ref_model_init_kwargs=options,
                denoiser_folder=start.denoiser,
                device=args.device,
            )

    denoiser = load_once(load, args) if isinstance(ref_model, (str, Path)) else load()
    if start.adapter is not None:
        owner = copy.copy(loaded.pipeline)
        owner.register_modules(**{loaded.family.denoiser_name: denoiser})
        attach_adapter(owner, loaded.family.denoiser_name, start.adapter)
    return denoiser


# ---- Before training ------------------------------------------------------------------------------------------------


def place_frozen_components(loaded: LoadedModel, args: DiffusionSDPOConfig) -> FrozenComponents:
    """Move VAE and text encoders to their device, and set `args.vae_dtype` to the VAE's dtype."""

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
    args.vae_dtype = cast(VaeDtype, str(frozen.family.pipeline.vae.dtype).removeprefix("torch."))
    return frozen


def pair_encoding(frozen: FrozenComponents, key: EncoderKey, args: DiffusionSDPOConfig) -> PairEncoding:
    """Return the [`PairEncoding`] that encodes images and prompts before training."""
    settings = EncodingSettings(
        folder=precompute_folder(args),
        device=args.device,
        size=image_size(args),
        crops=args.precompute_epochs,
        epochs=partial(epochs_of_run, args),
        largest_batch=largest_batch(args),
        load=partial(load_one_by_one, args),
        peers=peers(args),
    )
    return PairEncoding(frozen, key, settings)


def epochs_of_run(args: DiffusionSDPOConfig, dataset: PreferenceDataset) -> int | None:
    """Return how many epochs of a data set training reads at most, or `None` if it may read any flip or crop."""
    if args.winner_budget is not None:
        return None  # its probe may be of training images, plain and cropped at the center
    if args.precompute_ref_errors:
        return args.precompute_epochs
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    group = pairs_of_a_step(args, args.train_batch_size)
    sampler: Any = dataset.sampler(group, shuffled=True, drop_last=args.dataloader_drop_last)
    pairs = len(sampler)
    steps = pairs // (args.train_batch_size * args.world_size) // args.gradient_accumulation_steps
    return math.ceil(args.max_steps / max(1, steps))


def make_reference_errors(
    forward: PairForward,
    frozen: FrozenComponents,
    encoder_key: EncoderKey,
    engine: Engine,
    args: DiffusionSDPOConfig,
    loaders: BatchLoaders,
    to_inputs: Callable,
) -> ReferenceErrors | None:
    """Return what computes the reference's errors before training, or `None` without `precompute_ref_errors`. Call it
    in all processes together, before an engine shards the weights.

    Args:
        encoder_key ([`EncoderKey`]): Identifies VAE and text encoders in the cache.
        to_inputs (`Callable`): Makes a batch of items, on the device.
    """
    reference = forward.reference
    if not isinstance(reference, PrecomputedReference):
        return None
    settings = ErrorSettings(
        folder=precompute_folder(args),
        facts=reference_facts(reference, frozen.family, encoder_key, engine, args),
        epochs=args.precompute_epochs,
        batch_size=args.train_batch_size,
        eval_batch_size=args.eval_batch_size,
        to_inputs=to_inputs,
        load=loaders.in_batches,
        show_progress=args.process_index == 0 and not args.disable_tqdm,
        peers=peers(args),
    )
    return ReferenceErrors(forward, reference, frozen.family.denoiser, engine, settings)


def reference_facts(
    reference: PrecomputedReference, family: Family, key: EncoderKey, engine: Engine, args: DiffusionSDPOConfig
) -> dict[str, Any]:
    """Return what the reference's errors depend on besides data and noise, as a part of their cache key."""
    frozen = {name: getattr(family.pipeline, name) for name in family.frozen_components}
    denoiser: Any = family.denoiser if reference.module is None else reference.module
    return {
        "reference": peers(args).first(lambda: hash_of_tensors(reference.tensors())),
        "family": family.name,
        "components": {name: str(module.dtype) for name, module in frozen.items()},
        "encoders": key.facts,
        "encoded": args.precompute_latents,  # encoding in other batch sizes may round differently
        "crops": stored_crops(args),
        "configuration": public_config(denoiser.config),
        "scheduler": describe_component(family.pipeline.scheduler),
        "guidance_scale": args.guidance_scale,
        "precision": [args.mixed_precision, str(engine.rounding), str(family.dtype)],
        "attention": [name for name in attention_backends(denoiser) if name != "native"]
        or None,  # `None`: the default
        "compiled": args.torch_compile,
    }


# ---- Kernels --------------------------------------------------------------------------------------------------------


def choose_kernels(
    denoiser: Any, copies: Sequence[WeightCopy], frozen: FrozenComponents, args: DiffusionSDPOConfig
) -> None:
    """Check the attention back end. With `torch_compile`, compile the repeated blocks of all denoisers: each kind once.
    Without `precompute_latents`, compile the VAE's encoder and the text encoders too.

    Where DeepSpeed or FSDP wraps the blocks, or they are not most of the network, compile the reference and the
    averaged weights (`copies`) whole, and leave the model that trains to accelerate.

    Raises:
        `ValueError`: If the attention has no backward pass, or the model that trains would be compiled after its
            reference's errors.
    """
    check_attention(denoiser)
    if not args.torch_compile:
        return
    by_block = is_mostly_blocks(denoiser) and not by_engine(args)
    if args.precompute_ref_errors and not by_block:
        raise UserError(
            "`precompute_ref_errors=True` with `torch_compile=True` needs one process or DDP, and a model that mostly "
            f"consists of repeated blocks. accelerate would compile this {type(denoiser).__name__} after the "
            "reference's errors, so policy and reference would round differently. Leave one of the two out."
        )
    backend = args.torch_compile_backend
    mode = args.torch_compile_mode
    compile_with_eager_rounding()
    if backend == "inductor" and args.loss_spec.needs_reference and args.should_log:
        logger.warning(
            "`torch_compile` compiles the policy with gradients and the reference without, and the two may round "
            "differently: margins start near 0 instead of at 0. If `rewards/margins` of the first step is far from 0, "
            "leave `torch_compile` off."
        )
    if not args.precompute_latents:
        frozen.compile(backend, mode)
    for weights in copies:
        weights.compile(backend, mode, by_block=by_block)
    if by_block:
        denoiser.compile_repeated_blocks(backend=backend, mode=mode)
        args.torch_compile_backend = None  # accelerate must not compile again
        args.torch_compile_mode = None
