"""Checks of the settings without a model. (Those with one are in `complete.py`.)"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ...data.buckets import AspectRatioBuckets
from ...data.images import parse_schemes
from ...families.inversion import InversionSettings
from ...families.noise import CONSTANTS, SNR_GAMMA, TimestepSampling
from ...losses import (
    LOSSES,
    WEIGHT_FUNCTIONS,
    LossSpec,
    check_loss_kwargs,
    check_safeguard,
    loss_weights_by_name,
)
from ...reporting.sample_scores import PREFIX
from ...step.winner_budget import ProbeSettings
from ...utils._compat import CHECKPOINTING, activation_checkpointing
from ...utils.errors import UserError
from ...utils.hints import did_you_mean
from .all_arguments import Setting, settings_of
from .declaring import Choices, Range, check_kwargs, from_kwargs
from .default_safeguard import default_safeguard, setting_obstacles

if TYPE_CHECKING:
    from .diffusion_sdpo_config import DiffusionSDPOConfig


# Intervals of settings that transformers and the libraries below it check late or not at all.
_INHERITED_RANGES = {
    "learning_rate": Range("[0, inf)"),
    "max_grad_norm": Range("[0, inf)", "Use 0 to leave gradients as they are."),
    "weight_decay": Range("[0, inf)"),
    "per_device_train_batch_size": Range("[1, inf)"),
    "per_device_eval_batch_size": Range("[1, inf)"),
    "gradient_accumulation_steps": Range("[1, inf)"),
    "dataloader_num_workers": Range("[0, inf)", "Use 0 to read in the main process."),
}


@dataclass(frozen=True)
class WeightingConstants(TimestepSampling):
    """All constants in `weighting_kwargs`: those of the density of timesteps, and min-SNR's gamma."""

    snr_gamma: float = SNR_GAMMA

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.snr_gamma < math.inf:
            raise UserError(f"`snr_gamma` of `weighting_kwargs` must be above 0, got {self.snr_gamma}.")


def check_settings(args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` if a value is not allowed or two settings exclude each other. Warn about settings without
    effect."""
    for name, setting in settings_of(type(args)).items():
        _check_value(name, setting, getattr(args, name))
    loss = args.loss_spec
    assert isinstance(args.report_to, list), "transformers makes a list of one name."
    _check_inherited(args)
    check_loss_kwargs(args.loss_type, args.beta, args.loss_kwargs)
    mu = 0.0 if args.safeguard_mu is None else args.safeguard_mu
    safeguard = args.safeguard_settings
    check_safeguard(args.safeguard or "none", mu, safeguard.granularity, safeguard.eps, loss, args.loss_type)
    from_kwargs(WeightingConstants, "weighting_kwargs", args.weighting_kwargs, args.weighting_scheme or "none")
    if args.weighting_scheme is not None or args.timesteps is not None:  # else the model's family sets the scheme
        check_weighting_kwargs(args)
    check_kwargs(AspectRatioBuckets, "bucket_kwargs", args.bucket_kwargs)
    from_kwargs(InversionSettings, "inversion_kwargs", args.inversion_kwargs)
    from_kwargs(ProbeSettings, "winner_budget_kwargs", args.winner_budget_kwargs)
    args.image_schemes = list(parse_schemes(args.image_schemes)) or None
    for message in (*_conflicts_of_losses(args, loss), *_conflicts(args)):
        raise UserError(message)
    for message in _without_effect(args, loss):
        # The user's line calls `__init__`, which calls `__post_init__`, which calls this: the level shows that line.
        warnings.warn(message, stacklevel=4)


def check_weighting_kwargs(args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` if `weighting_kwargs` has a constant that `weighting_scheme` does not use."""
    scheme = "none" if args.weighting_scheme is None else args.weighting_scheme
    for name in args.weighting_kwargs:
        if name != "snr_gamma" and name not in CONSTANTS[scheme]:
            reason = f"`weighting_scheme={scheme!r}`" if args.timesteps is None else "`timesteps`"
            raise UserError(
                f"`{name}` of `weighting_kwargs` has no effect with {reason}. Leave it out, or set `weighting_scheme` "
                f"to {' or '.join(repr(other) for other, names in CONSTANTS.items() if name in names)}."
            )


# ---- Single settings ------------------------------------------------------------------------------------------------


def _check_value(name: str, setting: Setting, value: Any) -> None:
    if value is None and setting.is_optional:
        return
    if setting.choices and str not in setting.types:
        _check_words(name, setting.choices, [value])
    for allowed in setting.facts:
        if isinstance(allowed, Range) and value not in allowed:
            raise UserError(f"`{name}` must be {allowed}, got {value!r}. {allowed.advice}".rstrip())
        if isinstance(allowed, Choices):
            choices = tuple(LOSSES) if name == "loss_type" else allowed.words  # with the user's losses
            _check_words(name, choices, value if isinstance(value, list) else [value])


def _check_words(name: str, choices: tuple[str, ...], words: list[Any]) -> None:
    for word in words:
        if word not in choices:
            near = did_you_mean(str(word), choices)
            raise UserError(f"`{name}` must be one of {', '.join(choices)}; got {word!r}.{near}")


def _check_inherited(args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` if a setting of transformers does not fit diffusion models, or would train nothing."""
    for name, allowed in _INHERITED_RANGES.items():
        value = getattr(args, name)
        if value is not None and value not in allowed:
            raise UserError(f"`{name}` must be {allowed}, got {value!r}. {allowed.advice}".rstrip())
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise UserError(
            f"A run must have at least one step, got `max_steps={args.max_steps}` and "
            f"`num_train_epochs={args.num_train_epochs}`. Set one of the two."
        )
    for name in ("model_init_kwargs", "ref_model_init_kwargs"):
        value = getattr(args, name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f'`{name}` must map names to values, got {value!r}. Example: {{"variant": "fp16"}}.')
    _, checkpointing = activation_checkpointing(args)
    refused = {
        "neftune_noise_alpha": (
            args.neftune_noise_alpha is not None,
            "It adds noise to token embeddings of language models. Leave it unset",
        ),
        "train_sampling_strategy": (
            args.train_sampling_strategy not in ("random", "sequential"),
            "Images have no length to group by. Use 'random'",
        ),
        "include_for_metrics": (args.include_for_metrics, "`compute_metrics` receives only rewards. Leave it empty"),
        "include_num_input_tokens_seen": (
            args.include_num_input_tokens_seen not in ("no", False),
            "Images have no tokens. Leave it off",
        ),
        "label_smoothing_factor": (args.label_smoothing_factor, "Use `loss_type='robust'`"),
        "bf16_full_eval": (args.bf16_full_eval, "It would round the policy but not the reference. Use `bf16`"),
        "fp16_full_eval": (args.fp16_full_eval, "It would round the policy but not the reference. Use `fp16`"),
        f"{CHECKPOINTING}_kwargs": (
            checkpointing.get("use_reentrant"),
            "`use_reentrant=True` loses the gradients of a LoRA. Leave it out",
        ),
    }
    for name, (is_refused, advice) in refused.items():
        if is_refused:
            raise UserError(f"`{name}={getattr(args, name)}` cannot be used with a diffusion model. {advice}.")


# ---- Settings that exclude one another ------------------------------------------------------------------------------


def _conflicts_of_losses(args: DiffusionSDPOConfig, loss: LossSpec) -> Iterator[str]:
    """Yield an error message for each setting that does not go with the loss or the safeguard."""
    if not loss.uses_loser:
        for name in ("loser_noise_range", "winner_budget"):
            if getattr(args, name) is not None:
                yield f"`{name}` needs a loss that trains losers, got {args.loss_type!r}. Leave `{name}` unset."
        if args.safeguard == "parameter":
            yield (
                f"`safeguard='parameter'` needs a loss that trains losers, got {args.loss_type!r}. Use "
                "`safeguard='none'`: without losers, the result is the same and costs less."
            )
    for reason, advice in setting_obstacles(args) if args.safeguard == "parameter" else ():
        yield (
            "`safeguard='parameter'` needs a backward pass for winners and one for losers before weights change, but "
            f"{reason}. {advice}, or use `safeguard='output'`."
        )
    if args.sync_ref_model and not loss.needs_reference:
        yield (
            f"`sync_ref_model=True` needs a loss with a reference, got {args.loss_type!r}. Leave it off, or choose "
            "another loss."
        )
    if args.mask_anchor and (args.precompute_ref_errors or not loss.needs_reference):
        reason = "`precompute_ref_errors=True`" if args.precompute_ref_errors else f"the loss {args.loss_type!r}"
        yield (
            f"`mask_anchor={args.mask_anchor}` needs the reference's prediction at every step, but there is none with "
            f"{reason}. Leave one of the two out."
        )
    precomputed = {
        f"The loss {args.loss_type!r} reads the reference's prediction itself": loss.reads_reference_prediction,
        f"The loss {args.loss_type!r} has no reference": not loss.needs_reference,
        "`sync_ref_model` changes the reference, and so its errors, during training": args.sync_ref_model,
        "With `noise_source='inversion'`, the noise depends on the policy, which changes during training": (
            args.noise_source == "inversion"
        ),
    }
    permuted = {
        f"The loss {args.loss_type!r} reads the scores of the data set's losers": loss.needs_scores,
        f"`pair_weights={args.pair_weights!r}` reads the scores of the data set's losers (use the name of a column of "
        "weights instead)": args.pair_weights in WEIGHT_FUNCTIONS,
        "`calibrated_scores` reads the scores of the data set's losers": args.calibrated_scores,
        "`swap_labels` would make the image of another prompt the winner": args.swap_labels,
        "`aspect_ratio_buckets` trains a pair at the size that fits its winner, so a loser from another pair could be "
        "cropped much more": args.aspect_ratio_buckets,
        "`precompute_latents` with `random_crop` stores each image with the crop of its own pair, but both images of a "
        "pair need one crop": args.precompute_latents and args.random_crop,
    }
    excluded = {
        "precompute_ref_errors=True": precomputed if args.precompute_ref_errors else {},
        "losers='permute'": permuted if args.losers == "permute" else {},
    }
    for setting, reasons in excluded.items():
        for reason in (reason for reason, applies in reasons.items() if applies):
            yield f"`{setting}` cannot be used here. {reason}. Leave one of the two out."


def _conflicts(args: DiffusionSDPOConfig) -> Iterator[str]:
    """Yield an error message for each other combination of settings that is not possible."""
    span = args.timestep_range
    if span is not None:
        is_span = len(span) == 2 and all(isinstance(end, int) for end in span) and 0 <= span[0] < span[1]
        if not is_span:
            yield (
                "`timestep_range` must be two whole numbers: the lowest timestep, and the highest timestep plus 1. "
                f"Got {list(span)}. For example, 500 1000 is the noisier half of 1000 timesteps."
            )
    if args.timesteps is not None and (span is not None or args.weighting_scheme is not None):
        yield (
            "`timesteps` cannot be combined with `timestep_range` or `weighting_scheme`. Got "
            f"{list(args.timesteps)}, {span} and {args.weighting_scheme!r}. Leave out `timesteps`, or leave out the "
            "other two."
        )
    levels = args.loser_noise_range
    if levels is not None and (len(levels) != 2 or not 0 <= levels[0] < levels[1] <= 1):
        yield (
            f"`loser_noise_range` must be two noise levels in [0, 1], the lower one first, got {list(levels)}. For "
            "example, use 0.6 1 for the noisier levels."
        )
    if "snr_gamma" in args.weighting_kwargs and args.timestep_weighting != "min_snr":
        yield (
            "`snr_gamma` of `weighting_kwargs` needs `timestep_weighting='min_snr'`, got "
            f"`timestep_weighting={args.timestep_weighting!r}`. Set it, or leave `snr_gamma` out."
        )
    if args.score_threshold is not None and not math.isfinite(args.score_threshold):
        yield (
            f"`score_threshold` must be a finite number, got {args.score_threshold}. Set a score between those of good "
            "and bad images, or leave it unset to use the median."
        )
    if args.noise_offset and args.noise_source != "shared":
        yield (
            f"`noise_offset` needs `noise_source='shared'`, got `noise_offset={args.noise_offset}` and "
            f"`noise_source={args.noise_source!r}`. Leave one of the two out."
        )
    for name in ("random_flip", "random_crop"):
        if args.noise_source == "generated" and getattr(args, name):
            yield (
                "`noise_source='generated'` needs unchanged images: the noise of an image does not fit its mirror "
                f"image or a part of it. Got `{name}=True`. Set `{name}=False`."
            )
    if args.ema_decay is not None and args.sync_ref_model:
        yield (
            "`ema_decay` needs a reference that does not change, got `sync_ref_model=True`. Leave one of the two out."
        )
    if args.on_winner_rise == "stop" and args.eval_strategy == "no":
        yield (
            "`on_winner_rise='stop'` needs evaluations of held-out pairs, got `eval_strategy='no'`. Pass an "
            "`eval_dataset` and set `eval_strategy='steps'`."
        )


def without_turn(args: DiffusionSDPOConfig, max_steps: int) -> Iterator[str]:
    """Yield a warning for each setting that acts every few steps and whose first turn would come after `max_steps`."""
    evaluates = args.on_winner_rise == "stop" and args.eval_strategy == "steps"
    intervals = {
        "winner_budget": ("`steps` of `winner_budget_kwargs`", ProbeSettings(**args.winner_budget_kwargs).steps),
        "sync_ref_model": ("`ref_model_sync_steps`", args.ref_model_sync_steps),
        "on_winner_rise": ("`eval_steps`", args.eval_steps if evaluates else None),
    }
    for name, (interval, steps) in intervals.items():
        if getattr(args, name) and steps is not None and steps >= max_steps:
            yield (
                f"`{name}={getattr(args, name)}` has no effect in a run of {max_steps} steps: it acts every {steps:g}. "
                f"Lower {interval}, or leave `{name}` out."
            )


def best_sample_metric(args: DiffusionSDPOConfig) -> str | None:
    """Return `metric_for_best_model` without the prefix `eval_` if it is a score of sample images, else `None`."""
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    return metric if metric.startswith(PREFIX) else None


# ---- Warnings -------------------------------------------------------------------------------------------------------


def _without_effect(args: DiffusionSDPOConfig, loss: LossSpec) -> Iterator[str]:
    """Yield a warning for each setting without effect."""
    if not loss.uses_beta and args.beta is not None:
        yield f"`beta={args.beta}` has no effect: the loss {args.loss_type!r} has no beta."
    for name, weight in loss_weights_by_name(args.loss_type, args.loss_weights).items():
        if not weight:
            yield f"The loss {name!r} has no effect, because its weight in `loss_weights` is 0."
    safeguard = args.safeguard or default_safeguard(args, loss)[0]
    safeguard = safeguard if loss.uses_loser else "none"
    constants = args.safeguard_settings
    if safeguard != "output" and (constants.granularity != "batch" or constants.eps):
        yield (
            "`granularity` and `eps` of `safeguard_kwargs` have no effect without `safeguard='output'` and a loss that "
            "trains losers."
        )
    if safeguard != "parameter" and (constants.anchor is not None or constants.low_memory):
        yield "`anchor` and `low_memory` of `safeguard_kwargs` have no effect without `safeguard='parameter'`."
    if safeguard == "none" and args.safeguard_mu is not None:
        yield "`safeguard_mu` has no effect without a safeguard and a loss that trains losers."
    crops = args.precompute_latents and args.random_crop
    weights = None if args.pair_weights is None else WEIGHT_FUNCTIONS.get(args.pair_weights)
    reads_scores = loss.needs_scores or (weights is not None and not weights.several_scorers)
    defaults = {field.name: field.default for field in fields(args)}
    # Each row: settings, whether their condition is met, the condition in words.
    needs = (
        (("inversion_kwargs",), args.noise_source == "inversion", "`noise_source='inversion'`"),
        (("winner_budget_kwargs",), args.winner_budget is not None, "`winner_budget`"),
        (("ref_model_mixup_alpha", "ref_model_sync_steps"), args.sync_ref_model, "`sync_ref_model`"),
        (
            ("precompute_dir",),
            args.precompute_latents or args.precompute_ref_errors,
            "`precompute_latents` or `precompute_ref_errors`",
        ),
        (("bucket_kwargs",), args.aspect_ratio_buckets, "`aspect_ratio_buckets`"),
        (
            ("sample_sources", "sample_steps", "sample_kwargs", "sample_scorers"),
            args.sample_prompts,
            "`sample_prompts`",
        ),
        (("calibrated_scores",), reads_scores, "a loss or `pair_weights` that read scores"),
        (("offload_frozen_components",), args.device.type != "cpu", "an accelerator"),
    )
    for names, is_on, needed in needs:
        for name in names:
            if getattr(args, name) and getattr(args, name) != defaults[name] and not is_on:
                yield f"`{name}` has no effect without {needed}."
    if args.precompute_epochs != 1 and not (crops or args.precompute_ref_errors):
        yield (
            "`precompute_epochs` has no effect without `precompute_ref_errors`, or both `precompute_latents` and "
            "`random_crop`."
        )
