"""Generates images with a pipeline: for sample images during training, for evaluations, and for pairs."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..families import Family
from ..utils.errors import UserError
from ..utils.hints import did_you_mean

_SET_HERE = ("prompt", "generator", "latents", "num_images_per_prompt", "output_type", "return_dict")


def call_options(family: Family, options: dict[str, Any], setting: str = "sample_kwargs") -> dict[str, Any]:
    """Return the arguments with which to call the pipeline, except prompt and random generator.

    Args:
        options (`dict`): Arguments that the user passed.
        setting (`str`): Name of the setting that contains `options`, for the error message.

    Raises:
        `ValueError`: If the pipeline cannot be called with one of the options, an option is set by the caller, such as
            the prompt, or there are no steps or pixels.
    """
    guidance = family.generation_kwargs(options.get("guidance_scale"))
    others = {name: value for name, value in options.items() if name != "guidance_scale"}
    accepted = inspect.signature(family.pipeline.__call__).parameters
    unknown = [name for name in others if name not in accepted]
    own = [name for name in _SET_HERE if name in others]
    if own:
        raise UserError(f"`{setting}` must leave out {', '.join(_SET_HERE)}, which are set here; got {own[0]!r}.")
    for name in ("num_inference_steps", "height", "width"):
        value = others.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"`{name}` in `{setting}` must be a whole number, 1 or more; got {value!r}.")
    if unknown:
        near = did_you_mean(unknown[0], accepted)
        raise UserError(f"`{setting}` takes arguments of {type(family.pipeline).__name__}; got {unknown[0]!r}.{near}")
    return {**guidance, **others}


def quiet_copy(pipeline: DiffusionPipeline, scheduler: Any = None) -> Any:
    """Return a copy of a pipeline without progress bar. It shares the networks, and has `scheduler` or a copy of the
    pipeline's own."""
    copied = copy.copy(pipeline)
    copied.scheduler = copy.deepcopy(pipeline.scheduler) if scheduler is None else scheduler
    copied.set_progress_bar_config(disable=True)
    return copied


def draw_images(pipeline: Any, prompt: Any, generator: Any = None, **options: Any) -> list[Any]:
    """Return the images of one call of a pipeline. Of a video, return the first frame.

    Args:
        prompt (`str` or `list[str]`): One prompt, or a batch of prompts.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): From [`noise_generator`], one for each
            prompt. Not needed if `options` have `latents`.
        options: Other arguments of the pipeline's call, such as those from [`call_options`].
    """
    images = pipeline(prompt=prompt, generator=generator, return_dict=False, **options)[0]
    return [image[0] if isinstance(image, list) else image for image in images]


def noise_generator(seed: int) -> torch.Generator:
    """Return the random generator of an image's initial noise. It is on the CPU, so that the noise does not depend on
    the device."""
    return torch.Generator("cpu").manual_seed(seed)


@contextlib.contextmanager
def in_own_precision(vae: Any) -> Iterator[None]:
    """Cast inputs of the VAE to the VAE's dtype, because some pipelines pass latents in the denoiser's dtype. Hooks on
    the VAE's submodules do this, because pipelines call `vae.decode` and not the VAE itself."""

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return cast_floats(inputs, vae.dtype)

    handles = [module.register_forward_pre_hook(enter) for module in vae.children()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cast_floats(values: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors in tuples and dictionaries. Tensors of at most one dimension are timesteps, which are
    not cast because they would be rounded."""
    if isinstance(values, torch.Tensor):
        return values.to(dtype) if values.is_floating_point() and values.ndim > 1 else values
    if type(values) is tuple:
        return tuple(cast_floats(value, dtype) for value in values)
    if type(values) is dict:
        return {key: cast_floats(value, dtype) for key, value in values.items()}
    return values
