"""Set-up of the model for memory and speed: storage of the frozen base, attention back ends, compiled blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..engines.engine_settings import by_engine
from ..models.memory import StoredBase, compile_blocks, set_attention
from ..models.numerics import autocast_dtype
from ..models.reference import Reference
from ..models.shadow_weights import ShadowWeights
from ..utils._compat import compile_with_eager_rounding
from .diffusion_sdpo_config import DiffusionSDPOConfig


def store_base(
    denoiser: Any, reference: Reference, args: DiffusionSDPOConfig, *, adapter: str | None
) -> StoredBase | None:
    """Choose the attention back end, and store the frozen base as the settings say; all adapters and the reference are
    there already."""
    if args.attention_backend is not None:
        for module in (denoiser, *([] if reference.module is None else [reference.module])):
            set_attention(module, args.attention_backend)
    if args.layerwise_casting is None and args.group_offload is None:
        return None
    check_stored_base(args, adapter, reference, sharded=by_engine(args))
    return StoredBase(
        denoiser,
        device=args.device,
        casting=None if args.layerwise_casting is None else getattr(torch, args.layerwise_casting),
        half_dtype=autocast_dtype(args.mixed_precision),
        offload=args.group_offload,
        blocks=args.group_offload_blocks,
    )


def compile_models(denoiser: Any, shadow_weights: Sequence[ShadowWeights], args: DiffusionSDPOConfig) -> None:
    """What `torch_compile` compiles before transformers' Trainer compiles the model: second denoisers, or the blocks of
    all denoisers, and then `args` say that nothing else is to be compiled."""
    if not args.torch_compile:
        return
    compile_with_eager_rounding()
    for weights in shadow_weights:
        weights.compile(args.torch_compile_backend, args.torch_compile_mode, regional=args.torch_compile_regional)
    if args.torch_compile_regional:
        if by_engine(args):
            raise ValueError(
                "`torch_compile_regional` is for one process and for DDP: DeepSpeed and FSDP wrap the blocks that it "
                "compiles. Leave it off: `torch_compile` then compiles the whole model."
            )
        compile_blocks(denoiser, args.torch_compile_backend, args.torch_compile_mode)
        args.torch_compile_backend = args.torch_compile_mode = None  # what accelerate would compile with


def check_stored_base(args: DiffusionSDPOConfig, adapter: str | None, reference: Reference, *, sharded: bool) -> None:
    """Raise `ValueError` where the base cannot be stored on the CPU or in 8 bits.

    Args:
        sharded (`bool`): Whether DeepSpeed or FSDP trains.
    """
    names = [name for name in ("layerwise_casting", "group_offload") if getattr(args, name) is not None]
    given = f"`{names[0]}={getattr(args, names[0])!r}`"
    if adapter is None:
        raise ValueError(
            f"{given} is for the frozen base of a LoRA: weights that train stay on the device, in float32. Pass a "
            "`peft_config`, or leave it out."
        )
    if sharded:
        raise ValueError(
            f"{given} cannot act under DeepSpeed and FSDP, which hold all weights in a form of their own. Use their "
            "own offloading, or neither of them."
        )
    if args.layerwise_casting is not None and reference.module is not None:
        raise ValueError(
            "`layerwise_casting` rounds the policy's base, and a `ref_model` of its own would not be rounded: policy "
            "and reference would differ before the first step. Leave `ref_model` out."
        )
