"""A model of an evaluation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffusers import DiffusionPipeline

from ...utils.errors import UserError

Form = Literal["weights", "guidance"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Candidate:
    """A model of an evaluation.

    Args:
        name (`str`): Name in tables and file names: letters, digits, dots, dashes and underscores.
        model (`str` or `DiffusionPipeline`): Hub id, folder of a pipeline, output folder of a training run, or loaded
            pipeline.
        lora (`str`, *optional*): Folder, file or Hub id of a LoRA for the model. Into a loaded pipeline, load it
            yourself.
        scale (`float`, *optional*): How far to go from the base model (0) to the tuned model (1) and beyond. The base
            is this candidate without its LoRA, or if it has none the first model of the evaluation.
        form (`"guidance"` or `"weights"`, *optional*, defaults to `"guidance"`): Whether `scale` multiplies the
            difference between the predictions of tuned and base model ([`preference_guidance`]), or between their
            weights.
        interval (`tuple[float, float]`, *optional*): Lowest and highest noise level at which preference guidance
            acts, from 0 (clean image) to 1 (pure noise).
        call_kwargs (`dict`, *optional*): Arguments of the pipeline's call for this model, over those of
            [`ImageSettings`].

    Raises:
        `ValueError`: If the name cannot be part of a file name, `lora` is set for a loaded pipeline, or `scale`
            or `interval` is out of range.
    """

    name: str
    model: str | DiffusionPipeline
    lora: str | None = None
    scale: float | None = None
    form: Form = "guidance"
    interval: tuple[float, float] | None = None
    call_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                "A model's name is used in file names, so it must begin with a letter from a to z or a digit, and have "
                f"only these letters, digits, dots, dashes and underscores. Got {self.name!r}. Choose another name."
            )
        if self.lora is not None and not isinstance(self.model, str):
            raise UserError(
                f"`lora` cannot be set for a loaded pipeline, got {self.lora} for the model {self.name}. Load the "
                "LoRA into the pipeline yourself."
            )
        if self.form not in get_args(Form):
            raise UserError(f"`form` must be one of {', '.join(get_args(Form))}, got {self.form!r}.")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(
                f"`scale` must be a finite number above 0, got {self.scale}. For scale 0, evaluate the base model."
            )
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise UserError(
                f"`interval` must be two noise levels (low, high) with 0 <= low < high <= 1, got {self.interval}."
            )
