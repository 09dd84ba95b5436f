"""Checks of the settings against a model or this process."""

from __future__ import annotations

from torch import nn

from .._compat import activation_checkpointing, checkpoints_activations
from .all_arguments import AllArguments


def check_without_dropout(args: AllArguments, denoiser: nn.Module) -> None:
    """Raise `ValueError` where a setting predicts the same input twice and dropout would make the two differ."""
    twice = [name for name in ("safeguard_low_memory", "safeguard_diagnostics_steps") if getattr(args, name)]
    if args.safeguard == "parameter" and twice:
        refuse_dropout(denoiser, f"`{twice[0]}`")
    if args.precompute_ref_errors and _has_dropout(denoiser):
        raise ValueError(
            "`precompute_ref_errors=True` needs a policy that predicts as its reference did before training, and "
            "dropout makes the two differ. Set `disable_dropout=True`, or leave it out."
        )


def refuse_dropout(denoiser: nn.Module, what: str) -> None:
    """Raise `ValueError` where a denoiser has dropout that acts; `what` predicts the same images twice."""
    if _has_dropout(denoiser):
        raise ValueError(
            f"{what} predicts the same images twice, and dropout makes the two differ. Set `disable_dropout=True`, or "
            "leave it out."
        )


def _has_dropout(denoiser: nn.Module) -> bool:
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in denoiser.modules())


def check_activation_checkpointing(args: AllArguments, denoiser: nn.Module) -> None:
    """Raise `ValueError` where activation checkpointing is asked of a denoiser that does not support it."""
    is_on, _ = activation_checkpointing(args)
    if is_on and not checkpoints_activations(denoiser):
        raise ValueError(
            f"`activation_checkpointing` (`gradient_checkpointing`) cannot act: diffusers' {type(denoiser).__name__} "
            "has none. Leave it off, and use smaller micro-batches or `safeguard_low_memory`."
        )


def check_one_device(args: AllArguments) -> None:
    """Raise `ValueError` where transformers would wrap the model in `nn.DataParallel`, which replicates neither the
    reference nor the hooks of a family and of the safeguard."""
    if args.n_gpu > 1:
        raise ValueError(
            f"One process trains on one GPU, and this one sees {args.n_gpu}. Start a process for each with "
            "`trl-diffusion-sdpo train --accelerate_config multi_gpu ...` or `accelerate launch`, or show it one with "
            "CUDA_VISIBLE_DEVICES=0."
        )
