"""The components of a pipeline that do not train, VAE and text encoders: on the device, in the precision in which they
run."""

from __future__ import annotations

import copy
import logging

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..families import Family
from .numerics import torch_dtype
from .text_checks import check_text_encoding

logger = logging.getLogger(__name__)

VAE = "vae"
OVERFLOWS = "force_upcast"  # in a VAE's configuration: it overflows in float16


def working_family(
    family: Family,
    *,
    device: torch.device,
    half_dtype: torch.dtype | None,
    vae_dtype: str,
    vae_encode_batch_size: int | None,
    guidance_scale: float | None,
) -> Family:
    """A family around a copy of its pipeline, as training uses it; the given pipeline is not changed.

    Args:
        half_dtype (`torch.dtype`, *optional*): The dtype of autocast; `None` without autocast.
        vae_dtype (`str`): A dtype, or `"auto"` for that of autocast unless the VAE overflows there.
        guidance_scale (`float`, *optional*): Input of a denoiser that takes one.

    Raises:
        `ValueError`: If different prompts are encoded alike.
    """
    working = type(family)(working_pipeline(family, device=device, half_dtype=half_dtype, vae_dtype=vae_dtype))
    working.guidance_scale = guidance_scale
    working.vae_encode_batch_size = vae_encode_batch_size
    working.settle_dtype()
    check_text_encoding(working)
    return working


def working_pipeline(
    family: Family, *, device: torch.device, half_dtype: torch.dtype | None, vae_dtype: str
) -> DiffusionPipeline:
    """The pipeline of [`working_family`]. The denoiser and components that keep their precision are shared with the
    given pipeline; others are copied, so that what is saved, or generated after training, is not rounded."""
    working = copy.copy(family.pipeline)
    for name in family.frozen_components:
        part = getattr(family.pipeline, name)
        if name == VAE:
            part = _working_vae(part, half_dtype, vae_dtype)
        elif half_dtype is not None and part.dtype.itemsize > half_dtype.itemsize:
            part = part if _text_overflows(part, half_dtype) else copy.deepcopy(part).to(half_dtype)
        working.register_modules(**{name: part.to(device)})
    return working


def _working_vae(vae: ModelMixin, half: torch.dtype | None, wanted: str) -> ModelMixin:
    """The VAE in the wanted precision. Only float16 overflows, at 65504; bfloat16 has float32's range."""
    overflows = vae.config.get(OVERFLOWS, False)
    dtype = vae.dtype
    if wanted != "auto":
        dtype = torch_dtype(wanted)
    elif half is not None and dtype.itemsize > half.itemsize:
        dtype = half
    if wanted == "auto" and overflows and dtype == torch.float16:
        dtype = torch.bfloat16 if half == torch.bfloat16 else torch.float32
    forced = overflows and dtype == torch.float16
    if dtype == vae.dtype and not forced:
        return vae
    vae = copy.deepcopy(vae).to(dtype)
    if forced:
        logger.warning(
            "`vae_dtype='float16'` though the VAE's configuration says that it overflows there (`%s`): latents that "
            "are not finite will stop the run.",
            OVERFLOWS,
        )
        vae.register_to_config(**{OVERFLOWS: False})  # otherwise diffusers would encode in float32
    return vae


def _text_overflows(text_encoder: nn.Module, half: torch.dtype) -> bool:
    """Whether a text encoder may overflow: CLIP's do not in float16, T5 and language models do."""
    return half == torch.float16 and not type(text_encoder).__name__.startswith("CLIP")
