"""The safeguard of a run that leaves `safeguard` unset, and what rules out the one in parameter space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from ...engines.engine_settings import branch_gradient_obstacles
from ...losses import LossSpec, Safeguard

if TYPE_CHECKING:
    from .diffusion_sdpo_config import DiffusionSDPOConfig

OUTPUT_CONSTANTS = ("granularity", "eps")  # names in `safeguard_kwargs` of the safeguard in output space


def default_safeguard(
    args: DiffusionSDPOConfig, loss: LossSpec, denoiser: nn.Module | None = None
) -> tuple[Safeguard, str]:
    """Return the safeguard of a run that leaves `safeguard` unset, and a sentence that says why it is not
    `"parameter"`. The sentence is empty for `"parameter"` and for a loss without losers.

    Args:
        denoiser (`nn.Module`, *optional*): Denoiser that trains. Its dropout matters under ZeRO-3.
    """
    if not loss.uses_loser:
        return "none", ""
    if not loss.lowers_winner:
        return "none", f"No safeguard: the loss {args.loss_type!r} raises the winner's error on purpose."
    constants = [f"`{name}`" for name in OUTPUT_CONSTANTS if name in args.safeguard_kwargs]
    if constants:
        listed = " and ".join(constants)
        return "output", (
            f"`safeguard` is 'output', not the default 'parameter', because only 'output' has {listed} of "
            "`safeguard_kwargs`. Set `safeguard='output'` too, or leave them out."
        )
    for reason, advice in parameter_obstacles(args, loss, denoiser):
        return "output", f"`safeguard` is 'output', not the default 'parameter', because {reason}. {advice}."
    return "parameter", ""


def parameter_obstacles(
    args: DiffusionSDPOConfig, loss: LossSpec, denoiser: nn.Module | None
) -> Iterator[tuple[str, str]]:
    """Yield what keeps the safeguard in parameter space from running: each reason, and what to do."""
    yield from setting_obstacles(args)
    yield from branch_gradient_obstacles(args)
    anchor = args.safeguard_settings.anchor or loss.anchor
    predicts_twice = anchor == "error" or args.mask_anchor
    sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if sharded and predicts_twice and denoiser is not None and has_dropout(denoiser):
        yield "the denoiser has dropout, but ZeRO-3 predicts the winners twice here", "Set `disable_dropout=True`"


def setting_obstacles(args: DiffusionSDPOConfig) -> Iterator[tuple[str, str]]:
    """Yield those of [`parameter_obstacles`] that need neither engine nor model to be known."""
    if args.ddp_static_graph:
        yield "`ddp_static_graph=True` allows one backward pass per step", "Leave `ddp_static_graph` out"
    optimizer = str(args.optim).rsplit(".", 1)[-1].lower()
    if "lomo" in optimizer or "layerwise" in optimizer:
        yield f"the optimizer {optimizer!r} updates weights during a backward pass", "Use another optimizer"


def has_dropout(denoiser: nn.Module) -> bool:
    """Return whether a denoiser has active dropout: two predictions of the same images then differ."""
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in denoiser.modules())
