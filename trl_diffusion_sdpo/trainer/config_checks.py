"""Checks of arguments that are more than a range: what cannot act on a diffusion model, or with the parameter-space
safeguard."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from .._compat import CHECKPOINTING, activation_checkpointing, checkpoints_activations
from ..data.checking import verify_choice
from ..data.images import settled_schemes
from ..families.noise import WEIGHTINGS
from ..families.timestep_sampling import TimestepSampling
from ..losses import ANCHORS, LossSpec, loss_spec
from ..suggestions import did_you_mean
from .argument_groups import INTERPOLATIONS, METRICS, ON_BAD_ROW, VAE_DTYPES, WinnerArguments

if TYPE_CHECKING:
    from .diffusion_sdpo_config import DiffusionSDPOConfig

# Optimizers that step within the backward pass, when the other branch's gradient is not there yet.
FUSED_OPTIMIZERS = ("lomo", "adalomo")
LAYERWISE = "layerwise"
MIN_SIDE = 8  # pixels, of training images
MEASUREMENTS_OF_LAG = 10  # of a budget's loop, over which an average may reach back


def check_inherited(args: DiffusionSDPOConfig) -> None:
    """Settings of language models and classifiers that cannot act on a diffusion model."""
    if args.remove_unused_columns:
        warnings.warn("`remove_unused_columns=True` has no effect: formats know their columns.", stacklevel=4)
        args.remove_unused_columns = False
    _, checkpointing = activation_checkpointing(args)
    refused = {
        "neftune_noise_alpha": (args.neftune_noise_alpha is not None, "there are no embeddings to disturb"),
        "use_liger_kernel": (args.use_liger_kernel, "its kernels are those of language models"),
        "label_smoothing_factor": (bool(args.label_smoothing_factor), "use `loss_type='robust'`"),
        "train_sampling_strategy": (
            args.train_sampling_strategy not in ("random", "sequential"),
            "images have one size; use 'random'",
        ),
        "include_for_metrics": (bool(args.include_for_metrics), "`compute_metrics` receives rewards alone"),
        "include_num_input_tokens_seen": (
            args.include_num_input_tokens_seen not in ("no", False),
            "images have no tokens",
        ),
        "bf16_full_eval": (args.bf16_full_eval, "it would round the policy and not the reference; use `bf16`"),
        "fp16_full_eval": (args.fp16_full_eval, "it would round the policy and not the reference; use `fp16`"),
        "fp16": (args.fp16 and args.device.type == "cpu", "a CPU has no fp16 autocast; use `bf16`"),
        "accelerator_config": (
            bool(args.accelerator_config.dispatch_batches),
            "`dispatch_batches` cannot send prompts and seeds between processes; leave it off",
        ),
        f"{CHECKPOINTING}_kwargs": (
            bool(checkpointing.get("use_reentrant")),
            "`use_reentrant=True` loses the gradients of a LoRA; leave it out",
        ),
    }
    for name, (is_refused, advice) in refused.items():
        if is_refused:
            raise ValueError(f"`{name}={getattr(args, name)}` cannot act on a diffusion model: {advice}.")


def check_parameter_safeguard(args: DiffusionSDPOConfig, loss: LossSpec) -> None:
    """Look at what can be told from the arguments alone.

    Raises:
        `ValueError`: On settings under which lambda or the gradients could not be right.
    """
    if args.safeguard_anchor is not None and args.safeguard_anchor not in ANCHORS:
        raise ValueError(f"`safeguard_anchor` must be one of {', '.join(ANCHORS)}; got {args.safeguard_anchor!r}.")
    if args.safeguard_diagnostics_steps is not None and args.safeguard_diagnostics_steps < 1:
        raise ValueError(
            f"`safeguard_diagnostics_steps` must be at least 1, got {args.safeguard_diagnostics_steps}. Leave it unset "
            "for none."
        )
    if args.safeguard != "parameter":
        names = ("safeguard_anchor", "safeguard_low_memory", "safeguard_diagnostics_steps")
        idle = [name for name in names if getattr(args, name)]
        if idle:
            listed = ", ".join(f"`{name}`" for name in idle)
            warnings.warn(f"{listed} has no effect: it belongs to `safeguard='parameter'`.", stacklevel=4)
        return
    if not loss.uses_loser:
        raise ValueError(
            f"`safeguard='parameter'` scales the loser's gradient, and the loss {args.loss_type!r} has no loser. Use "
            "`safeguard='none'`, which is the same here and costs less."
        )
    if args.safeguard_granularity != "batch" or args.safeguard_eps:
        warnings.warn(
            "`safeguard_granularity` and `safeguard_eps` have no effect with `safeguard='parameter'`: it has one "
            "lambda an optimizer step, and no division that needs an epsilon.",
            stacklevel=4,
        )
    optimizer = str(args.optim).rsplit(".", 1)[-1].lower()
    if optimizer in FUSED_OPTIMIZERS or LAYERWISE in optimizer:
        raise ValueError(
            f"`safeguard='parameter'` needs both branches' gradients before the optimizer steps, and {optimizer!r} "
            "steps within the backward pass. Use another optimizer, or `safeguard='output'`."
        )
    if args.ddp_static_graph:
        raise ValueError(
            "`ddp_static_graph=True` cannot act with `safeguard='parameter'`, which walks the graph once for each "
            "branch. Leave it off."
        )


def check_without_dropout(args: DiffusionSDPOConfig, denoiser: nn.Module) -> None:
    """Raise `ValueError` where the same input would be predicted twice, and dropout would make two things of it."""
    twice = [name for name in ("safeguard_low_memory", "safeguard_diagnostics_steps") if getattr(args, name)]
    if args.safeguard != "parameter" or not twice:
        return
    refuse_dropout(denoiser, f"`{twice[0]}`")


def refuse_dropout(denoiser: nn.Module, what: str) -> None:
    """Raise `ValueError` where `what`, which predicts the same images twice, meets dropout."""
    if any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in denoiser.modules()):
        raise ValueError(
            f"{what} predicts the same images twice, and dropout makes the two differ. Set `disable_dropout=True`, or "
            "leave it out."
        )


def check_data(args: DiffusionSDPOConfig) -> None:
    """Look at the settings of the data and of sample images; `ValueError` on what is out of its range."""
    _check_choice("on_bad_row", args.on_bad_row, ON_BAD_ROW)
    args.verify_images = verify_choice(args.verify_images)
    args.image_schemes = list(settled_schemes(args.image_schemes)) or None
    if args.dataset_num_proc is not None and args.dataset_num_proc < 1:
        raise ValueError(f"`dataset_num_proc` must be at least 1, got {args.dataset_num_proc}. Leave it unset.")
    _check_choice("image_interpolation", args.image_interpolation, INTERPOLATIONS)
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise ValueError(
            f"`proportion_empty_prompts` must be in [0, 1], got {args.proportion_empty_prompts}. Published: 0.2."
        )
    if args.sample_inference_steps < 1:
        raise ValueError(f"`sample_inference_steps` must be at least 1, got {args.sample_inference_steps}.")
    if args.sample_steps is not None and args.sample_steps < 1:
        raise ValueError(f"`sample_steps` must be at least 1, got {args.sample_steps}. Leave it unset for none.")
    if args.sample_steps is not None and not args.sample_prompts:
        warnings.warn("`sample_steps` has no effect without `sample_prompts`.", stacklevel=3)


def settled_resolution(value: Any) -> int | list[int] | None:
    """The size of training images in one form, wherever it was given: the side of a square, or `[height, width]`.

    Args:
        value (`int`, `list[int]` or `tuple[int, int]`, *optional*): From Python, a command line (where one number
            comes as a list of one) or YAML.

    Raises:
        `ValueError`: If it is no size, or smaller than 8 pixels.
    """
    if value is None:
        return None
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not whole or len(sides) not in (1, 2) or min(sides) < MIN_SIDE:
        raise ValueError(
            f"`resolution` must be one number or a height and a width, at least {MIN_SIDE} pixels; got {value!r}. "
            "Write `1024` or `768 1344` on a command line, `1024` or `[768, 1344]` in YAML."
        )
    return sides[0] if len(set(sides)) == 1 else sides


def check_noise(args: DiffusionSDPOConfig) -> None:
    """Look at the settings of the noise that need no model; `ValueError` on what is out of its range."""
    if args.timestep_range is not None:
        span = list(args.timestep_range)
        if len(span) != 2 or not all(isinstance(end, int) for end in span) or not 0 <= span[0] < span[1]:
            raise ValueError(
                "`timestep_range` must be two whole numbers, the lowest timestep and the first above the highest, "
                f"got {span}. For the noisier half of 1000 use 500 1000."
            )
    if args.timesteps is not None and (args.timestep_range is not None or args.weighting_scheme is not None):
        raise ValueError(
            f"`timesteps` takes the place of `timestep_range` and `weighting_scheme`; got {list(args.timesteps)} "
            f"beside {args.timestep_range} and {args.weighting_scheme!r}. Set the one or the others."
        )
    if args.snr_gamma is not None and not args.snr_gamma > 0:
        raise ValueError(f"`snr_gamma` must be greater than 0, got {args.snr_gamma}. Leave it unset for none.")
    TimestepSampling(args.weighting_scheme or "none", args.logit_mean, args.logit_std, args.mode_scale)
    _check_choice("timestep_weighting", args.timestep_weighting, WEIGHTINGS)
    if args.snr_gamma is not None and args.timestep_weighting != "none":
        raise ValueError(
            "`snr_gamma` and `timestep_weighting` both weigh the timesteps, one for DDPM and one for flow matching; "
            f"got {args.snr_gamma} and {args.timestep_weighting!r}. Set one."
        )
    for name in ("noise_offset", "input_perturbation"):
        value = getattr(args, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` must be at least 0, got {value}. Use 0 for none.")


def check_pipeline_arguments(args: DiffusionSDPOConfig) -> None:
    """Look at how the VAE is to run; `ValueError` on what is out of its range."""
    _check_choice("vae_dtype", args.vae_dtype, VAE_DTYPES)
    if args.vae_encode_batch_size is not None and args.vae_encode_batch_size < 1:
        raise ValueError(
            f"`vae_encode_batch_size` must be at least 1, got {args.vae_encode_batch_size}. Leave it unset to encode "
            "the images of a micro-batch together."
        )


def check_reference(args: DiffusionSDPOConfig) -> None:
    """Look at the settings of a reference that moves; `ValueError` on what cannot act."""
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise ValueError(f"`ref_model_mixup_alpha` must be in (0, 1], got {args.ref_model_mixup_alpha}.")
    if args.ref_model_sync_steps < 1:
        raise ValueError(f"`ref_model_sync_steps` must be at least 1, got {args.ref_model_sync_steps}.")
    if args.sync_ref_model and not loss_spec(args.loss_type).needs_reference:
        raise ValueError(
            f"`sync_ref_model=True` cannot act: the loss {args.loss_type!r} has no reference. Leave it off, or "
            "choose a loss with a reference."
        )


def check_activation_checkpointing(args: DiffusionSDPOConfig, denoiser: nn.Module) -> None:
    """Raise `ValueError` where activation checkpointing is asked of a denoiser that has none."""
    is_on, _ = activation_checkpointing(args)
    if is_on and not checkpoints_activations(denoiser):
        raise ValueError(
            f"`activation_checkpointing` (`gradient_checkpointing`) cannot act: diffusers' {type(denoiser).__name__} "
            "has none. Leave it off, and use smaller micro-batches or `safeguard_low_memory`."
        )


def check_one_device(args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` where transformers would spread a batch over several devices of one process: a reference, a
    safeguard's cut and a family's hooks live on one device, and `nn.DataParallel` would copy none of them."""
    if args.n_gpu > 1:
        raise ValueError(
            f"One process trains on one GPU, and this one sees {args.n_gpu}. Start a process for each with "
            "`trl-diffusion-sdpo train --accelerate_config multi_gpu ...` or `accelerate launch`, or show it one with "
            "CUDA_VISIBLE_DEVICES=0."
        )


def check_length(args: DiffusionSDPOConfig) -> None:
    """Raise `ValueError` where a run would have no steps; with `max_steps=0` the Trainer takes one nevertheless."""
    if args.max_steps == 0:
        raise ValueError("A run has at least one step, got `max_steps=0`. Use -1 to go by `num_train_epochs`.")
    if args.max_steps < 0 and not args.num_train_epochs > 0:
        raise ValueError(
            f"A run has at least one step, got `num_train_epochs={args.num_train_epochs}` and no `max_steps`. Set one."
        )


def check_winner_arguments(args: DiffusionSDPOConfig) -> None:
    """Look at what keeps the winners over a training; `ValueError` on what is out of its range or cannot act."""
    if args.num_noise_bins < 1:
        raise ValueError(f"`num_noise_bins` must be at least 1, got {args.num_noise_bins}.")
    span = args.loser_noise_range
    if span is not None and (len(span) != 2 or not 0 <= span[0] < span[1] <= 1):
        raise ValueError(
            f"`loser_noise_range` must be two noise levels, the lower one first, in [0, 1]; got {list(span)}. For the "
            "noisier part use 0.6 1."
        )
    if args.winner_budget is not None and not 0 < args.winner_budget < float("inf"):
        raise ValueError(f"`winner_budget` must be greater than 0, got {args.winner_budget}. 0.01 is one per cent.")
    for name in ("winner_budget_pairs", "winner_budget_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(args, name)}.")
        if args.winner_budget is None and getattr(args, name) != getattr(WinnerArguments, name):
            warnings.warn(f"`{name}` has no effect without `winner_budget`.", stacklevel=4)
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise ValueError(f"`ema_decay` must be in (0, 1), got {args.ema_decay}. Usual: 0.98 to 0.9999.")
    lag = 0.0 if args.ema_decay is None else 1 / (1 - args.ema_decay)  # steps over which the average reaches back
    if args.winner_budget is not None and lag > MEASUREMENTS_OF_LAG * args.winner_budget_steps:
        warnings.warn(
            f"`winner_budget` is measured on averaged weights, which with `ema_decay={args.ema_decay}` follow over "
            f"about {lag:.0f} steps, and acts every {args.winner_budget_steps}: it will answer late and too much. Set "
            f"`winner_budget_steps` to {lag / MEASUREMENTS_OF_LAG:.0f} or more, or a smaller `ema_decay`.",
            stacklevel=4,
        )
    if args.ema_decay is not None and args.sync_ref_model:
        raise ValueError(
            "`ema_decay` averages the policy against a reference that stands still, and `sync_ref_model` moves it; got "
            "both. Leave one out."
        )
    if not loss_spec(args.loss_type).uses_loser:
        for name, value in (("loser_noise_range", span), ("winner_budget", args.winner_budget)):
            if value is not None:
                raise ValueError(f"`{name}` cannot act: the loss {args.loss_type!r} has no loser. Leave it unset.")
    _check_choice("safeguard_preconditioner", args.safeguard_preconditioner, METRICS)
    if args.safeguard_preconditioner != "plain" and args.safeguard != "parameter":
        raise ValueError(
            f"`safeguard_preconditioner={args.safeguard_preconditioner!r}` needs `safeguard='parameter'`: output space has no "
            f"gradients of weights; got {args.safeguard!r}."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = did_you_mean(str(value), choices)
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.{near}")
