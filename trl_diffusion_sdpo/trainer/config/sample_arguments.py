"""Settings of the sample images that are generated before, during and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from .declaring import Range, documented


@documented
@dataclass
class SampleArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for sample images.

    Parameters:
        sample_prompts (`list[str]`, *optional*):
            Prompts of the sample images, which are generated with fixed seeds before and after training, and during
            training if you set `sample_steps`. They are saved in the subfolder `samples` of the output folder and shown
            in the model card.
        sample_sources (`list[str]`, *optional*):
            Paths of the images that `sample_prompts` edit, one for each prompt. Required for models that always edit an
            image, optional for those that can also generate without one. They are cropped to the shape of `resolution`,
            as in training.
        sample_steps (`int`, *optional*):
            Number of optimizer steps between two generations of sample images. If unset, they are generated only before
            and after training.
        sample_kwargs (`dict` or `str`, *optional*):
            Arguments of the pipeline's `__call__` for sample images, in YAML or as JSON, such as `num_inference_steps`
            (default 30) and `guidance_scale` (default: the pipeline's).
        sample_scorers (`list[str]`, *optional*):
            Scorers that rate the sample images: names such as `pickscore`, or your own function as `module:function`.
            Later scores are compared with those from before training.
    """

    sample_prompts: list[str] | None = None
    sample_sources: list[str] | None = None
    sample_steps: Annotated[
        int | None, Range("[1, inf)", "Leave it unset to sample only before and after training.")
    ] = None
    sample_kwargs: dict[str, Any] | str | None = None
    sample_scorers: list[str] | None = None
