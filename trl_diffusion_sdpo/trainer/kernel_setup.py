"""Set-up of the models for speed: attention back ends and compiled blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engines.engine_settings import by_engine
from ..models.frozen_components import VAE, FrozenComponents
from ..models.kernels import compile_blocks, compile_encoder, set_attention
from ..models.reference import Reference
from ..models.weight_copies import WeightCopy
from ..utils._compat import compile_with_eager_rounding
from .diffusion_sdpo_config import DiffusionSDPOConfig


def choose_attention(denoiser: Any, reference: Reference, args: DiffusionSDPOConfig) -> None:
    """Choose the attention back end of policy and reference."""
    if args.attention_backend is not None:
        for module in (denoiser, *([] if reference.module is None else [reference.module])):
            set_attention(module, args.attention_backend)


def compile_models(
    denoiser: Any, weight_copies: Sequence[WeightCopy], frozen: FrozenComponents, args: DiffusionSDPOConfig
) -> None:
    """Compile what `torch_compile` is for and transformers' Trainer does not compile: the VAE's encoder, and second
    denoisers or the blocks of all denoisers. In the last case `args` then say that nothing else is to be compiled."""
    if not args.torch_compile:
        return
    compile_with_eager_rounding()
    if frozen.state == "on device":  # others encode once, before training, or move at each use
        compile_encoder(
            frozen.family.pipeline.components.get(VAE), args.torch_compile_backend, args.torch_compile_mode
        )
    for weights in weight_copies:
        weights.compile(args.torch_compile_backend, args.torch_compile_mode, regional=args.torch_compile_regional)
    if args.torch_compile_regional:
        if by_engine(args):
            raise ValueError(
                "`torch_compile_regional` is for one process and for DDP: DeepSpeed and FSDP wrap the blocks that it "
                "compiles. Leave it off: `torch_compile` then compiles the whole model."
            )
        compile_blocks(denoiser, args.torch_compile_backend, args.torch_compile_mode)
        args.torch_compile_backend = args.torch_compile_mode = None  # what accelerate would compile with
