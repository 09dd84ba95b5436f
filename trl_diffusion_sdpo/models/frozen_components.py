"""The parts of a pipeline that work and do not train, VAE and text encoders: on the device, in the precision in which
they run."""

from __future__ import annotations

import copy
import logging

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..families import Family
from ..trainer.diffusion_sdpo_config import DiffusionSDPOConfig
from ..trainer.preparing import autocast_dtype
from .loading import torch_dtype
from .text_checks import check_text_encoding

logger = logging.getLogger(__name__)

VAE = "vae"
OVERFLOWS = "force_upcast"  # of a VAE's configuration: float16 is too small for it


def working_family(family: Family, args: DiffusionSDPOConfig) -> Family:
    """The family around a pipeline of the trainer's own, set as the arguments say; the user's pipeline stays as it was.

    `args.vae_dtype` becomes the precision that was chosen.

    Raises:
        `ValueError`: If the pipeline's prompts all mean the same to it.
    """
    working = type(family)(working_pipeline(family, args))
    working.guidance_scale = args.guidance_scale
    working.vae_encode_batch_size = args.vae_encode_batch_size
    working.settle_dtype()
    args.vae_dtype = str(working.pipeline.vae.dtype).removeprefix("torch.")
    check_text_encoding(working)
    return working


def working_pipeline(family: Family, args: DiffusionSDPOConfig) -> DiffusionPipeline:
    """A family's pipeline with what does not train on the device, in the precision in which it runs.

    The denoiser and the parts that keep their precision are shared with the pipeline that was loaded; parts that run
    in another one are copies, so that what is saved or drawn with later is not rounded.
    """
    half = autocast_dtype(args)
    working = copy.copy(family.pipeline)
    for name in family.frozen_components:
        part = getattr(family.pipeline, name)
        if name == VAE:
            part = _working_vae(part, half, args.vae_dtype)
        elif half is not None and part.dtype.itemsize > half.itemsize and not _text_overflows(part, half):
            part = copy.deepcopy(part).to(half)
        working.register_modules(**{name: part.to(args.device)})
    return working


def _working_vae(vae: ModelMixin, half: torch.dtype | None, wanted: str) -> ModelMixin:
    """The VAE in the precision that is wanted; with `"auto"` that of autocast, unless it is known to overflow there.

    What overflows is float16, whose largest number is 65504. bfloat16 has float32's range.
    """
    overflows = vae.config.get(OVERFLOWS, False)
    dtype = vae.dtype
    if wanted != "auto":
        dtype = torch_dtype(wanted)
    elif half is not None and dtype.itemsize > half.itemsize:
        dtype = half
    if wanted == "auto" and overflows and dtype == torch.float16:
        dtype = torch.bfloat16 if half == torch.bfloat16 else torch.float32
    insists = overflows and dtype == torch.float16
    if dtype == vae.dtype and not insists:
        return vae
    vae = copy.deepcopy(vae).to(dtype)
    if insists:
        logger.warning(
            "`vae_dtype='float16'` though the VAE's configuration says that it overflows there (`%s`): latents that "
            "are not finite will stop the run.",
            OVERFLOWS,
        )
        vae.register_to_config(**{OVERFLOWS: False})  # or its images would be encoded in float32
    return vae


def _text_overflows(text_encoder: nn.Module, half: torch.dtype) -> bool:
    """Of text encoders CLIP's are known not to overflow in float16, and the T5 and language models of other families
    to."""
    return half == torch.float16 and not type(text_encoder).__name__.startswith("CLIP")
