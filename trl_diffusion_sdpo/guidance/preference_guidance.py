"""Images beyond the tuned model: predictions extrapolated from a reference, in any pipeline of a known family."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from numbers import Real
from typing import Any, get_args

from diffusers import CacheMixin, DiffusionPipeline, ModularPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..families import Family
from ..families.registry import family_for_class_name
from .guided_denoiser import Form, Guide, guide, is_guided, leave
from .predictors import predictor_of

logger = logging.getLogger(__name__)

DEFAULT_SCALE = 3.0
TRIED_SCALES = 6.0  # the largest that was measured
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


@contextlib.contextmanager
def preference_guidance(
    pipeline: DiffusionPipeline,
    scale: float | None = None,
    *,
    reference: nn.Module | str | None = None,
    form: Form = "conditional",
    interval: tuple[float, float] | None = None,
    batched: bool = False,
    allow_distilled: bool = False,
) -> Iterator[DiffusionPipeline]:
    """Guide all calls of a pipeline within the context by the difference of the tuned model from a reference.

    In every denoising step the denoiser's prediction becomes `reference + scale (policy - reference)`. The pipeline's
    own code is untouched: its scheduler, classifier-free guidance, rescaling and callbacks work as they do.

    Args:
        pipeline (`DiffusionPipeline`): With the tuned model, such as after `load_lora_weights`. Its class must have a
            [`Family`]; or a modular pipeline of the same model.
        scale (`float`, *optional*, defaults to 3): From 0 over 1, which is the tuned model and costs no second
            pass, to larger ones. 0 is the reference without classifier-free guidance, or with the form `"both"`. Not
            for the form `"npo"`.
        reference (`nn.Module` or `str`, *optional*): A denoiser of the same architecture, dtype and device, or the name
            of an adapter, such as one that was tuned on swapped labels. By default the denoiser with its LoRA
            switched off.
        form (`str`, *optional*, defaults to `"conditional"`): What the branches of classifier-free guidance at scale g
            become, with the predictions c and u of the policy for the prompt and for the negative prompt, and c_r and
            u_r of the reference:

            - `"conditional"`: `u + g (c - u) + (scale - 1) (c - c_r)`; a third prediction, whatever g.
            - `"both"`: `u_s + g (c_s - u_s)` with both branches extrapolated, `c_s = c_r + scale (c - c_r)`; four.
            - `"npo"`: `u_r + g (c - u_r)`; two, as without guidance by a reference. From Diffusion-NPO.

            Without classifier-free guidance, the first two are the same, and the third changes nothing.
        interval (`tuple[float, float]`, *optional*): Lowest and highest noise level at which to guide, in `[0, 1]`: the
            sigma of flow matching, and for DDPM that of the flow with the same signal-to-noise ratio.
        batched (`bool`, *optional*, defaults to `False`): Predict with policy and reference in one batch, which needs
            more memory. Both must be LoRA or no LoRA of the same denoiser.
        allow_distilled (`bool`, *optional*, defaults to `False`): Whether to guide beyond a tuned model that is
            distilled to few steps, for which nothing was measured; refused otherwise.

    Returns:
        A context manager that gives the pipeline. It restores everything at its end.

    Raises:
        `ValueError`: If an argument is invalid, the reference does not fit, or the pipeline is guided already.

    Example:

    ```python
    pipeline.load_lora_weights("my-tuned-lora")
    with preference_guidance(pipeline, scale=3.0):
        image = pipeline("a photo of a fox").images[0]
    ```

    Source of the form `"npo"`: https://huggingface.co/papers/2505.11245.
    """
    scale = _checked_scale(scale, form)
    _check_interval(interval)
    family = _family_of(pipeline)
    denoiser = family.denoiser
    _check_denoiser(denoiser)
    if not allow_distilled and (scale > 1 or form == "npo"):
        _check_steps(family)
    with contextlib.closing(predictor_of(denoiser, reference, batched=batched)) as predictor:
        guiding = Guide(family, predictor, form, scale, interval)
        guide(denoiser, guiding)
        try:
            yield pipeline
        finally:
            leave(denoiser)
    if guiding.calls and not guiding.guided_calls and (form == "npo" or scale != 1):
        _warn_of_no_effect(None if guiding.calls_within else interval)


def _family_of(pipeline: Any) -> Family:
    """The family around a pipeline, or around a modular one of the same model."""
    name = type(pipeline).__name__
    if not isinstance(pipeline, ModularPipeline):
        return family_for_class_name(name).for_generation(pipeline)
    family = family_for_class_name(name.replace("ModularPipeline", "Pipeline")).for_generation(pipeline)
    family.conditional_rows = "all"  # diffusers' guiders have a call for each branch, that of the prompts first
    return family


def _checked_scale(scale: float | None, form: Form) -> float:
    if form not in get_args(Form):
        raise ValueError(f"`form` must be one of {', '.join(get_args(Form))}; got {form!r}.")
    if form == "npo":
        if scale is not None:
            raise ValueError(
                f"The form 'npo' has no scale of its own, got {scale}: the pipeline's `guidance_scale` extrapolates "
                "from the reference. Leave `scale` out."
            )
        return 1.0
    if scale is None:
        return DEFAULT_SCALE
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale) or scale < 0:
        raise ValueError(
            f"`scale` must be a finite number of at least 0, got {scale!r}. 1 is the tuned model; 0 is the reference "
            "without classifier-free guidance, or with the form 'both'."
        )
    if scale > TRIED_SCALES:
        logger.warning(
            "Scales up to %g were tried, got %g: images lose diversity and realism with the scale.",
            TRIED_SCALES,
            scale,
        )
    return float(scale)


def _check_interval(interval: tuple[float, float] | None) -> None:
    if interval is None:
        return
    are_two = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(isinstance(x, Real) for x in interval)
    if not are_two or not 0.0 <= interval[0] < interval[1] <= 1.0:
        raise ValueError(
            f"`interval` must be two noise levels, `0 <= low < high <= 1`, got {interval!r}. 0 is the image, 1 noise."
        )


def _check_denoiser(denoiser: nn.Module) -> None:
    if is_guided(denoiser):
        raise ValueError(
            "The pipeline's denoiser is guided already, by an outer `preference_guidance` or by that of a pipeline "
            "that shares it. Use one context at a time."
        )
    plain: Any = unwrap_module(denoiser)
    if isinstance(plain, CacheMixin) and plain.is_cache_enabled:
        raise ValueError(
            "The denoiser caches results between steps (`enable_cache`), and would reuse those of the policy for the "
            "reference. Call `disable_cache()` first."
        )


def is_distilled(family: Family) -> bool:
    """Whether a pipeline is known to generate in few steps, by its denoiser or its scheduler."""
    return family.has_few_steps or type(family.pipeline.scheduler).__name__ in FEW_STEP_SCHEDULERS


def _check_steps(family: Family) -> None:
    if is_distilled(family):
        scheduler = type(family.pipeline.scheduler).__name__
        raise ValueError(
            "Preference guidance beyond the tuned model is for models of many steps, as few leave no room to correct "
            f"one that went too far; this {family.name} model generates in few ("
            f"{scheduler if scheduler in FEW_STEP_SCHEDULERS else 'it is distilled'}). Use scale 1 at most, or pass "
            "`allow_distilled=True` and compare images."
        )


def _warn_of_no_effect(missed: tuple[float, float] | None) -> None:
    """Warn that nothing was guided, because all steps were outside of the interval `missed` or by the form `"npo"`."""
    if missed is not None:
        logger.warning("No step had a noise level in the interval %s: nothing was guided.", missed)
    else:
        logger.warning(
            "The form 'npo' changed nothing: it replaces the unconditional branch of classifier-free guidance, and the "
            "pipeline predicted none. Raise its guidance scale, or use the form 'conditional'."
        )
