"""Checks of arguments that are more than a range: what cannot act on a diffusion model, or with the parameter-space
safeguard."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from ..losses import ANCHORS, LossSpec

if TYPE_CHECKING:
    from .diffusion_sdpo_config import DiffusionSDPOConfig

# Optimizers that step within the backward pass, when the other branch's gradient is not there yet.
FUSED_OPTIMIZERS = ("lomo", "adalomo")
LAYERWISE = "layerwise"


def check_inherited(args: DiffusionSDPOConfig) -> None:
    """Settings of language models and classifiers that cannot act on a diffusion model."""
    if args.remove_unused_columns:
        warnings.warn("`remove_unused_columns=True` has no effect: formats know their columns.", stacklevel=4)
        args.remove_unused_columns = False
    checkpointing = args.activation_checkpointing_kwargs or {}
    refused = {
        "neftune_noise_alpha": (args.neftune_noise_alpha is not None, "there are no embeddings to disturb"),
        "use_liger_kernel": (args.use_liger_kernel, "its kernels are those of language models"),
        "label_smoothing_factor": (bool(args.label_smoothing_factor), "use `loss_type='robust'`"),
        "train_sampling_strategy": (
            "length" in str(args.train_sampling_strategy),
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
        "activation_checkpointing_kwargs": (
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
