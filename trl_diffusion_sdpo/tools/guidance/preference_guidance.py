"""Preference guidance: extrapolate from a reference's predictions beyond the tuned model's."""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Iterator
from numbers import Real
from typing import Any, get_args

from diffusers import CacheMixin, DiffusionPipeline, ModularPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ...families import Family
from ...families.registry import family_for_class_name
from ...utils._compat import hooked
from ...utils.errors import UserError
from .guide import Form, Guide, without_prompt_cache
from .reference import reference_of

logger = logging.getLogger(__name__)

DEFAULT_SCALE = 3.0
TRIED_SCALES = 6.0  # largest scale that we have measured
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")

_guided: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # denoisers within `preference_guidance`


@contextlib.contextmanager
def preference_guidance(
    pipeline: DiffusionPipeline,
    scale: float | None = None,
    *,
    reference: nn.Module | str | None = None,
    form: Form = "conditional",
    interval: tuple[float, float] | None = None,
    allow_distilled: bool = False,
) -> Iterator[DiffusionPipeline]:
    """Within the context, guide a pipeline by the difference between the tuned model and a reference model.

    Every denoising step then predicts `reference + scale (policy - reference)`, where `policy` is the tuned model's
    prediction. Scheduler, classifier-free guidance, rescaling and callbacks work as usual.

    Args:
        pipeline (`DiffusionPipeline`): Pipeline with the tuned model, for example after `load_lora_weights`, of a class
            with a [`Family`] here. Modular pipelines of the same models work too.
        scale (`float`, *optional*, defaults to 3): Strength of the guidance, at least 0: 1 gives the tuned model's
            images, without calling the reference; 0 gives the reference's if classifier-free guidance is off. The form
            `"npo"` takes none.
        reference (`nn.Module` or `str`, *optional*): The reference: a denoiser of the same architecture, dtype and
            device, or the name of an adapter on the pipeline's, such as a LoRA trained with `swap_labels=True`. By
            default, the pipeline's denoiser with its LoRA switched off.
        form (`str`, *optional*, defaults to `"conditional"`): How predictions are combined under classifier-free
            guidance, with its strength g. The policy predicts c for the prompt and u for the negative prompt; the
            reference predicts c_r and u_r.

            - `"conditional"`: `u + g (c - u) + (scale - 1) (c - c_r)`.
            - `"npo"`: `u_r + g (c - u_r)`, from Diffusion-NPO. Without classifier-free guidance, it has no effect.

            Both need three predictions per step, one more than without preference guidance.
        interval (`tuple[float, float]`, *optional*): Lowest and highest noise level at which to guide, from 0 (clean
            image) to 1 (pure noise): sigma for flow matching, and for DDPM the flow-matching sigma with the same
            signal-to-noise ratio. By default, all.
        allow_distilled (`bool`, *optional*, defaults to `False`): Whether to allow scales above 1 and the form `"npo"`
            for a model that is distilled to few steps. Not measured.

    Returns:
        A context manager that yields the pipeline, guided until it ends.

    Raises:
        `ValueError`: If an argument is invalid, the reference cannot be used with the pipeline, or the pipeline is
            already guided.

    Example:

    ```python
    import torch
    from diffusers import DiffusionPipeline
    from trl_diffusion_sdpo import preference_guidance

    pipeline = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=torch.float16
    ).to("cuda")
    pipeline.load_lora_weights("path/to/run")  # output folder of a run that trained a LoRA
    with preference_guidance(pipeline, scale=3.0):
        image = pipeline("a photo of a fox").images[0]
    ```

    Source of the form `"npo"`: https://huggingface.co/papers/2505.11245.
    """
    # Check the arguments and the model.
    scale = _checked_scale(scale, form)
    if interval is not None:
        are_two = isinstance(interval, (tuple, list)) and len(interval) == 2
        if not (
            are_two and all(isinstance(end, Real) for end in interval) and 0.0 <= interval[0] < interval[1] <= 1.0
        ):
            raise UserError(
                f"`interval` must be two noise levels with `0 <= low < high <= 1`, got {interval!r}. 0 is the clean "
                "image, 1 is pure noise."
            )
    family = _family_of(pipeline)
    denoiser = family.denoiser
    unconditional = None if family.unconditional_name is None else getattr(pipeline, family.unconditional_name, None)
    if unconditional is not None and form == "npo":
        raise UserError(
            f"The form 'npo' needs a denoiser that also makes the unconditional predictions, but {family.name} has "
            f"another network for them, `{family.unconditional_name}`, which is not tuned. Use the form 'conditional'."
        )
    _check_denoiser(denoiser)
    if not allow_distilled and (scale > 1 or form == "npo") and is_distilled(family):
        scheduler = type(family.pipeline.scheduler).__name__
        raise UserError(
            "Scales above 1 and the form 'npo' are for models that generate in many steps, so that later steps can "
            f"correct a step that went too far. This {family.name} model generates in few steps "
            f"({scheduler if scheduler in FEW_STEP_SCHEDULERS else 'it is distilled'}). Use a scale of at most 1, or "
            "pass `allow_distilled=True` and compare images."
        )

    refer = reference_of(denoiser, reference)
    if form == "conditional" and scale == 1:
        yield pipeline
        return

    # Guide the denoiser until the context ends, even if it is compiled or offloaded.
    guide = Guide(family, refer, form, scale, interval)
    plain = unwrap_module(denoiser)
    with contextlib.ExitStack() as stack:
        _guided.add(plain)
        stack.callback(_guided.discard, plain)
        stack.enter_context(hooked(denoiser, without_prompt_cache, guide))
        if unconditional is not None:
            stack.enter_context(hooked(unconditional, without_prompt_cache, guide.shift_unconditional))
        yield pipeline
    if not guide.calls or guide.guided_calls:
        return
    if not guide.calls_within:
        logger.warning(
            "`preference_guidance` had no effect, because no step had a noise level in the `interval` %s.", interval
        )
    else:
        logger.warning(
            "`preference_guidance` had no effect: the form 'npo' replaces the unconditional predictions of "
            "classifier-free guidance, and the pipeline made none. Raise the pipeline's `guidance_scale`, or use the "
            "form 'conditional'."
        )


def _family_of(pipeline: Any) -> Family:
    """Return the family of a pipeline, or of a modular pipeline of the same model."""
    is_modular = isinstance(pipeline, ModularPipeline)
    name = type(pipeline).__name__
    family = family_for_class_name(name.replace("ModularPipeline", "Pipeline") if is_modular else name)(pipeline)
    if is_modular:
        family.conditional_rows = "all"  # diffusers' guiders call the denoiser once for each branch, prompts first
    # To generate, a pipeline may lack VAE and text encoders. What is checked needs the VAE's configuration.
    family.frozen_components = tuple(part for part in family.frozen_components if getattr(pipeline, part, None))
    if "vae" in family.frozen_components:
        family.check_pipeline()
    return family


def _checked_scale(scale: float | None, form: Form) -> float:
    if form not in get_args(Form):
        raise UserError(
            f"`form` must be one of {', '.join(get_args(Form))}; got {form!r}. Use 'conditional' in place of the "
            "earlier form 'both': it measured as well, with fewer predictions."
        )
    if form == "npo":
        if scale is not None:
            raise UserError(
                f"The form 'npo' takes no `scale`. Got {scale}. Leave `scale` out, and set the pipeline's "
                "`guidance_scale`, which extrapolates from the reference."
            )
        return 1.0
    if scale is None:
        return DEFAULT_SCALE
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale) or scale < 0:
        raise UserError(
            f"`scale` must be a finite number of at least 0. Got {scale!r}. Use 1 for the tuned model, and larger "
            "values for stronger guidance."
        )
    if scale > TRIED_SCALES:
        logger.warning(
            "`scale` is %g, above the largest measured one (%g). Images become less diverse and less realistic as it "
            "grows.",
            scale,
            TRIED_SCALES,
        )
    return float(scale)


def _check_denoiser(denoiser: nn.Module) -> None:
    if unwrap_module(denoiser) in _guided:
        raise UserError(
            "Only one `preference_guidance` can guide a denoiser at a time. This one is already guided, by an outer "
            "context or through another pipeline with the same denoiser. End that context first."
        )
    plain: Any = unwrap_module(denoiser)
    if isinstance(plain, CacheMixin) and plain.is_cache_enabled:
        raise UserError(
            "The denoiser must not cache results between steps, because the reference would then reuse the policy's "
            "results. This denoiser has a cache (`enable_cache`). Call `disable_cache()` first."
        )


def is_distilled(family: Family) -> bool:
    """Return whether a pipeline's denoiser or scheduler is made for generation in few steps."""
    return family.has_few_steps or type(family.pipeline.scheduler).__name__ in FEW_STEP_SCHEDULERS
