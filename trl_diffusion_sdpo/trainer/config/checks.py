"""Checks of the settings that need no model."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from transformers import get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig

from ...data.checking import parse_verify_images
from ...data.images import parse_schemes
from ...families.inversion import InversionSettings
from ...families.timestep_sampling import TimestepSampling
from ...losses import (
    LOSSES,
    WEIGHT_FUNCTIONS,
    LossSpec,
    check_auto_beta,
    check_loss_kwargs,
    check_safeguard,
    loss_weights_by_name,
)
from ...reporting.sample_scores import PREFIX, WIN_RATE
from ...step.winner_budget import ProbeSettings
from ...utils._compat import CHECKPOINTING, activation_checkpointing
from ...utils.hints import did_you_mean
from ...utils.import_utils import require_optimizer, require_trackers
from .all_arguments import Setting, settings_of
from .declaring import Choices, Keys, Range

if TYPE_CHECKING:
    from ..diffusion_sdpo_config import DiffusionSDPOConfig

# Optimizers that step within the backward pass, before the other branch's gradient is computed.
FUSED_OPTIMIZERS = ("lomo", "adalomo")
LAYERWISE = "layerwise"
MEASUREMENTS_OF_LAG = 10  # largest lag of the averaged weights, in measurements of the winner budget


def check_settings(args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` if a value is out of its range, or if settings cannot be used, alone or together."""
    for name, setting in settings_of(type(args)).items():
        _check_value(name, setting, getattr(args, name))
    loss = args.loss_spec
    assert isinstance(args.report_to, list), "transformers makes a list of one name."
    require_trackers(args.report_to)
    _check_numbers(args)
    _check_schedule(args)
    _check_inherited(args)
    _check_length(args)
    _check_loss(args, loss)
    _check_parameter_safeguard(args, loss)
    _check_data(args)
    _check_scores(args, loss)
    _check_losers(args, loss)
    _check_noise(args)
    _check_inversion(args)
    _check_reference(args, loss)
    _check_precomputed_reference(args, loss)
    _check_loser_noise_range(args, loss)
    _check_winner_budget(args, loss)
    _check_average(args)
    _check_winner_rise(args)
    _check_memory(args)
    require_optimizer(str(getattr(args.optim, "value", args.optim)))


def _check_value(name: str, setting: Setting, value: Any) -> None:
    if value is None and setting.is_optional:
        return
    if setting.choices and str not in setting.types and value not in setting.choices:
        near = did_you_mean(str(value), setting.choices)
        raise ValueError(f"`{name}` must be one of {', '.join(setting.choices)}; got {value!r}.{near}")
    for allowed in setting.facts:
        if isinstance(allowed, Range) and value not in allowed:
            raise ValueError(f"`{name}` must be {allowed}, got {value!r}. {allowed.advice}".rstrip())
        if isinstance(allowed, Choices):
            choices = tuple(LOSSES) if name == "loss_type" else allowed.words  # `LOSSES` has the user's losses, too
            _check_words(name, choices, value if isinstance(value, list) else [value])
        if isinstance(allowed, Keys):
            _check_mapping(name, allowed, value)


def _check_mapping(name: str, keys: Keys, values: dict[str, Any]) -> None:
    hints = get_type_hints(keys.of)
    for key, value in values.items():
        if key not in keys.names:
            near = did_you_mean(key, keys.names)
            raise ValueError(f"`{name}` takes {', '.join(keys.names)}; got {key!r}.{near}")
        choices = get_args(hints[key])
        if choices:
            _check_words(f"{name}: {key}", choices, [value])
        elif isinstance(value, bool) or not isinstance(value, int if hints[key] is int else (int, float)):
            expected = "a whole number" if hints[key] is int else "a number"
            raise ValueError(f"`{key}` of `{name}` must be {expected}, got {value!r}.")


def _check_words(name: str, choices: tuple[str, ...], words: list[Any]) -> None:
    for word in words:
        if word not in choices:
            near = did_you_mean(str(word), choices)
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {word!r}.{near}")


def _warn(message: str) -> None:
    """Warn at the line that makes the configuration."""
    # Frames below that line: `__init__`, `__post_init__`, `check_settings`, a check, and this function.
    warnings.warn(message, stacklevel=6)


def _check_inherited(args: DiffusionSDPOConfig) -> None:
    """Refuse settings of language models and classifiers that cannot act on a diffusion model."""
    if args.remove_unused_columns:
        _warn("`remove_unused_columns=True` has no effect, because the format of the data set selects its columns.")
        args.remove_unused_columns = False
    assert isinstance(args.accelerator_config, AcceleratorConfig), "transformers parses it."
    _, checkpointing = activation_checkpointing(args)
    in_order = args.train_sampling_strategy in ("random", "sequential")
    counts_tokens = args.include_num_input_tokens_seen not in ("no", False)
    refused = {
        "neftune_noise_alpha": (args.neftune_noise_alpha is not None, "It perturbs token embeddings. Leave it unset"),
        "use_liger_kernel": (args.use_liger_kernel, "Its kernels are for language models. Leave it off"),
        "label_smoothing_factor": (bool(args.label_smoothing_factor), "Use `loss_type='robust'`"),
        "train_sampling_strategy": (not in_order, "Images have no length to group by. Use 'random'"),
        "include_for_metrics": (
            bool(args.include_for_metrics),
            "`compute_metrics` receives only rewards. Leave it empty",
        ),
        "include_num_input_tokens_seen": (counts_tokens, "Images have no tokens. Leave it off"),
        "bf16_full_eval": (args.bf16_full_eval, "It would round the policy and not the reference. Use `bf16`"),
        "fp16_full_eval": (args.fp16_full_eval, "It would round the policy and not the reference. Use `fp16`"),
        "fp16": (args.fp16 and args.device.type == "cpu", "A CPU has no fp16 autocast. Use `bf16`"),
        "accelerator_config": (
            bool(args.accelerator_config.dispatch_batches),
            "`dispatch_batches` cannot send prompts and seeds between processes. Leave it off",
        ),
        f"{CHECKPOINTING}_kwargs": (
            bool(checkpointing.get("use_reentrant")),
            "`use_reentrant=True` loses the gradients of a LoRA. Leave it out",
        ),
    }
    for name, (is_refused, advice) in refused.items():
        if is_refused:
            raise ValueError(f"`{name}={getattr(args, name)}` cannot be used with a diffusion model. {advice}.")


def _check_length(args: DiffusionSDPOConfig) -> None:
    """Refuse a run without steps. transformers' Trainer would take one step with `max_steps=0`."""
    if args.max_steps == 0:
        raise ValueError("A run needs at least one step, got `max_steps=0`. Use -1 to train for `num_train_epochs`.")
    if args.max_steps < 0 and not args.num_train_epochs > 0:
        raise ValueError(
            f"A run needs at least one step, got `num_train_epochs={args.num_train_epochs}` and no `max_steps`. Set "
            "one of the two."
        )


def _check_numbers(args: DiffusionSDPOConfig) -> None:
    """Refuse settings of the optimizer that would spoil every weight in the first step."""
    for name in ("learning_rate", "weight_decay", "adam_epsilon"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}. Set one, or leave it out.")


def _check_schedule(args: DiffusionSDPOConfig) -> None:
    """Check the arguments of the schedule on a single weight. transformers would check them only after data and model
    are loaded."""
    rate = 1.0 if args.learning_rate is None else max(0.0, args.learning_rate)  # unset: the family sets it later
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    kwargs: Any = args.lr_scheduler_kwargs
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=kwargs)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`lr_scheduler_kwargs` must be arguments of "
            f"`lr_scheduler_type={getattr(args.lr_scheduler_type, 'value', '')}`, got {kwargs}. The scheduler said: "
            f"{' '.join(str(error).split())}"
        ) from error


def _check_loss(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    check_loss_kwargs(args.loss_type, args.beta, args.loss_kwargs)
    mu = 0.0 if args.safeguard_mu is None else args.safeguard_mu
    check_safeguard(args.safeguard, mu, args.safeguard_granularity, args.safeguard_eps)
    if not loss.uses_beta and args.beta is not None:
        _warn(f"`beta={args.beta}` has no effect, because the loss {args.loss_type!r} has no beta.")
    if args.auto_beta:
        check_auto_beta(args.loss_type, args.loss_weights)
    weights = loss_weights_by_name(args.loss_type, args.loss_weights)
    for name in (name for name, weight in weights.items() if not weight):
        _warn(f"The loss {name!r} has no effect, because its weight in `loss_weights` is 0.")
    if "dspo" in weights and args.beta is not None and args.beta > 1:
        _warn(
            f"`beta={args.beta}` is large for the loss 'dspo'. It multiplies the distance to the reference, and the "
            "published value is 0.001. Use 'dspo_sdxl' for a beta in the thousands."
        )
    if args.mask_anchor and (args.precompute_ref_errors or not loss.needs_reference):
        reason = "`precompute_ref_errors=True`" if args.precompute_ref_errors else f"the loss {args.loss_type!r}"
        raise ValueError(
            f"`mask_anchor={args.mask_anchor}` needs the reference's prediction at every step, and {reason} has none. "
            "Leave one of the two out."
        )
    unsafe = args.safeguard == "none" or not loss.uses_loser
    if unsafe and (args.safeguard_mu is not None or args.safeguard_eps or args.safeguard_granularity != "batch"):
        reason = "`safeguard='none'`" if loss.uses_loser else f"the loss {args.loss_type!r}, which has no loser"
        _warn(f"The `safeguard_*` settings have no effect, because of {reason}.")


def _check_parameter_safeguard(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    """Refuse settings that would make lambda or the gradients wrong."""
    if args.safeguard != "parameter":
        names = ("safeguard_anchor", "safeguard_low_memory", "safeguard_diagnostics_steps")
        idle = [name for name in names if getattr(args, name)]
        if idle:
            listed = ", ".join(f"`{name}`" for name in idle)
            _warn(f"{listed} has no effect without `safeguard='parameter'`.")
        return
    if not loss.uses_loser:
        raise ValueError(
            f"`safeguard='parameter'` needs a loss with a loser, got {args.loss_type!r}. Use `safeguard='none'`, which "
            "gives the same result here and costs less."
        )
    if args.safeguard_granularity != "batch" or args.safeguard_eps:
        _warn(
            "`safeguard_granularity` and `safeguard_eps` have no effect with `safeguard='parameter'`. It has one "
            "lambda per optimizer step, and no division that needs an epsilon."
        )
    optimizer = str(args.optim).rsplit(".", 1)[-1].lower()
    if optimizer in FUSED_OPTIMIZERS or LAYERWISE in optimizer:
        raise ValueError(
            "`safeguard='parameter'` needs an optimizer that steps after both branches' backward passes. Got "
            f"{optimizer!r}, which steps within a backward pass. Use another optimizer, or `safeguard='output'`."
        )
    if args.ddp_static_graph:
        raise ValueError(
            "`safeguard='parameter'` needs one backward pass per branch, so `ddp_static_graph` must be off. Got "
            "`ddp_static_graph=True`. Leave it out."
        )


def _check_data(args: DiffusionSDPOConfig) -> None:
    crops = args.precompute_latents and args.random_crop
    if args.precompute_epochs != 1 and not (crops or args.precompute_ref_errors):
        _warn(
            "`precompute_epochs` has no effect without `precompute_ref_errors`, or both `precompute_latents` and "
            "`random_crop`."
        )
    if args.precompute_dir is not None and not (args.precompute_latents or args.precompute_ref_errors):
        _warn("`precompute_dir` has no effect without `precompute_latents` or `precompute_ref_errors`.")
    args.verify_images = parse_verify_images(args.verify_images)
    args.image_schemes = list(parse_schemes(args.image_schemes)) or None
    if args.bucket_kwargs and not args.aspect_ratio_buckets:
        _warn("`bucket_kwargs` has no effect without `aspect_ratio_buckets`.")
    for name in ("sample_sources", "sample_steps", "sample_kwargs", "sample_scorers"):
        if getattr(args, name) and not args.sample_prompts:
            _warn(f"`{name}` has no effect without `sample_prompts`.")
    best = best_sample_metric(args)
    scorers = args.sample_scorers or [] if args.sample_prompts else []
    metrics = [f"{PREFIX}{name}{ending}" for name in scorers for ending in (WIN_RATE, "")]
    if best is not None and best not in metrics:
        raise ValueError(
            f"`metric_for_best_model` must be a metric of `sample_prompts` and `sample_scorers`, got {best!r}. Use one "
            f"of {metrics}."
        )


def best_sample_metric(args: DiffusionSDPOConfig) -> str | None:
    """Return `metric_for_best_model` without the prefix of evaluations if it is a score of sample images."""
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    return metric if metric.startswith(PREFIX) else None


def _check_scores(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    weights = None if args.pair_weights is None else WEIGHT_FUNCTIONS.get(args.pair_weights)
    reads_gaps = weights is not None and not weights.several_scorers
    if args.calibrated_scores and not (loss.needs_scores or reads_gaps):
        _warn(
            "`calibrated_scores` has no effect, because neither the loss nor `pair_weights` reads `chosen_score` and "
            "`rejected_score`."
        )


def _check_losers(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    reasons = {
        f"The loss {args.loss_type!r} reads the scores of the data set's losers": loss.needs_scores,
        f"`pair_weights={args.pair_weights!r}` reads the scores of the data set's losers (a column of weights is "
        "possible)": args.pair_weights in WEIGHT_FUNCTIONS,
        "`calibrated_scores` reads the scores of the data set's losers": args.calibrated_scores,
        "`swap_labels` would make the image of another prompt the winner": args.swap_labels,
        "`aspect_ratio_buckets` trains a pair at the winner's size. Losers of another aspect ratio would be cropped "
        "more than any winner": args.aspect_ratio_buckets,
        "`precompute_latents` with `random_crop` stores each image with the crop of its own pair, but both images of a "
        "pair need one crop": args.precompute_latents and args.random_crop,
    }
    for reason, applies in reasons.items():
        if args.losers == "permute" and applies:
            raise ValueError(f"`losers='permute'` cannot be used here. {reason}. Leave one of the two out.")


def _check_noise(args: DiffusionSDPOConfig) -> None:
    if args.timestep_range is not None:
        span = list(args.timestep_range)
        if len(span) != 2 or not all(isinstance(end, int) for end in span) or not 0 <= span[0] < span[1]:
            raise ValueError(
                "`timestep_range` must be two whole numbers, the lowest timestep and the one above the highest, got "
                f"{span}. For example, 500 1000 is the noisier half of 1000 timesteps."
            )
    if args.timesteps is not None and (args.timestep_range is not None or args.weighting_scheme is not None):
        raise ValueError(
            "`timesteps` cannot be combined with `timestep_range` or `weighting_scheme`. Got "
            f"{list(args.timesteps)}, {args.timestep_range} and {args.weighting_scheme!r}. Leave out `timesteps`, or "
            "leave out the other two."
        )
    TimestepSampling(args.weighting_scheme or "none", **args.weighting_kwargs)
    if args.snr_gamma is not None and args.timestep_weighting != "none":
        raise ValueError(
            "Only one of `snr_gamma` (for DDPM) and `timestep_weighting` (for flow matching) may weigh the timesteps. "
            f"Got {args.snr_gamma} and {args.timestep_weighting!r}. Set one."
        )


def _check_inversion(args: DiffusionSDPOConfig) -> None:
    if args.noise_source != "inversion" and args.inversion_kwargs:
        _warn("`inversion_kwargs` has no effect without `noise_source='inversion'`.")
    if args.noise_source == "shared":
        return
    if args.noise_offset:
        raise ValueError(
            f"`noise_offset` needs `noise_source='shared'`, got `noise_offset={args.noise_offset}` and "
            f"`noise_source={args.noise_source!r}`. Leave one of the two out."
        )
    if args.noise_source == "generated":
        for name in ("random_flip", "random_crop"):
            if getattr(args, name):
                raise ValueError(
                    f"`noise_source='generated'` needs images as they were generated, got `{name}=True`. Set it to "
                    "False: the noise of an image does not fit its mirror image or a part of it."
                )
        return
    InversionSettings(**args.inversion_kwargs)
    if args.eval_strategy == "no" and args.winner_budget is None:
        _warn(
            "With `noise_source='inversion'`, training errors are measured at noise from the policy's own inversion. "
            "They can fall while errors at drawn noise rise. Set `eval_strategy` and pass an `eval_dataset` to measure "
            "errors at drawn noise."
        )


def _check_reference(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    if args.sync_ref_model and not loss.needs_reference:
        raise ValueError(
            f"`sync_ref_model=True` needs a loss with a reference, got {args.loss_type!r}. Leave it off, or choose a "
            "loss with a reference."
        )


def _check_precomputed_reference(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    if not args.precompute_ref_errors:
        return
    reasons = {
        f"The loss {args.loss_type!r} reads the reference's prediction itself": loss.reads_reference_prediction,
        f"The loss {args.loss_type!r} has no reference": not loss.needs_reference,
        "`sync_ref_model` changes the reference and its errors": args.sync_ref_model,
        "The noise of `noise_source='inversion'` changes with the policy": args.noise_source == "inversion",
        "`torch_compile` compiles the policy after the reference's errors are computed, so the two would be rounded "
        "differently (`torch_compile_regional` compiles before)": args.torch_compile
        and not args.torch_compile_regional,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"`precompute_ref_errors=True` cannot be used here. {reason}. Leave one of the two out.")


def _check_loser_noise_range(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    levels = args.loser_noise_range
    if levels is not None and (len(levels) != 2 or not 0 <= levels[0] < levels[1] <= 1):
        raise ValueError(
            f"`loser_noise_range` must be two noise levels in [0, 1], the lower one first, got {list(levels)}. For "
            "example, use 0.6 1 for the noisier levels."
        )
    if levels is not None and not loss.uses_loser:
        raise ValueError(_without_loser("loser_noise_range", args))


def _check_winner_budget(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    probe = ProbeSettings(**args.winner_budget_kwargs)
    if args.winner_budget is None and probe != ProbeSettings():
        _warn("`winner_budget_kwargs` has no effect without `winner_budget`.")
    if args.winner_budget is not None and not loss.uses_loser:
        raise ValueError(_without_loser("winner_budget", args))


def _without_loser(name: str, args: DiffusionSDPOConfig) -> str:
    return f"`{name}` needs a loss with a loser, got {args.loss_type!r}. Leave it unset."


def _check_average(args: DiffusionSDPOConfig) -> None:
    if args.ema_decay is None:
        return
    if args.sync_ref_model:
        raise ValueError(
            "`ema_decay` needs a reference that does not change. Got `sync_ref_model=True`, which changes the "
            "reference. Leave one of the two out."
        )
    lag = 1 / (1 - args.ema_decay)  # number of steps that the average covers
    probe = ProbeSettings(**args.winner_budget_kwargs)
    if args.winner_budget is not None and lag > MEASUREMENTS_OF_LAG * probe.steps:
        _warn(
            f"`winner_budget` measures the averaged weights every {probe.steps} steps. With "
            f"`ema_decay={args.ema_decay}` they lag by about {lag:.0f} steps, so the budget will react late and too "
            f"strongly. Set `steps` of `winner_budget_kwargs` to {lag / MEASUREMENTS_OF_LAG:.0f} or more, or a smaller "
            "`ema_decay`."
        )


def _check_winner_rise(args: DiffusionSDPOConfig) -> None:
    if args.on_winner_rise == "stop" and args.eval_strategy == "no":
        raise ValueError(
            "`on_winner_rise='stop'` needs evaluations of held-out pairs, got `eval_strategy='no'`. Pass an "
            "`eval_dataset` and set `eval_strategy='steps'`."
        )


def _check_memory(args: DiffusionSDPOConfig) -> None:
    on_host = args.device.type == "cpu"
    idle = {
        "torch_compile_regional": args.torch_compile_regional and not args.torch_compile,
        "offload_frozen_components": args.offload_frozen_components and on_host,
    }
    needed = {"torch_compile_regional": "`torch_compile`"}
    for name in (name for name, is_idle in idle.items() if is_idle):
        _warn(f"`{name}` has no effect without {needed.get(name, 'an accelerator')}.")
