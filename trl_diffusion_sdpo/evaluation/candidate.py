"""A model of an evaluation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffusers import DiffusionPipeline

Form = Literal["weights", "guidance"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Candidate:
    """A model of an evaluation.

    Args:
        name (`str`): Its name in tables and file names: letters, digits, dots, dashes and underscores.
        model (`str` or `DiffusionPipeline`): A Hub id, a folder of a pipeline, a run's output folder, or a pipeline.
        lora (`str`, *optional*): A LoRA on it: a folder, a file or a Hub id. A pipeline loads its LoRA itself.
        scale (`float`, *optional*): Scale of what training changed. 0 is the base, 1 the tuned model, and larger scales
            go further. The base is the model without its LoRA. If it has no LoRA, the base is the first model of the
            evaluation.
        form (`"guidance"` or `"weights"`, *optional*, defaults to `"guidance"`): Whether to scale the predictions by
            [`preference_guidance`], or the weights.
        interval (`tuple[float, float]`, *optional*): Noise levels of guidance, from 0 (image) to 1 (noise).
        call_kwargs (`dict`, *optional*): Arguments of the pipeline's call for this model, over those of all.

    Raises:
        `ValueError`: If the name is no file name, a pipeline comes with a LoRA, or scale or interval is out of range.
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
            raise ValueError(f"The name of a model is part of file names, got {self.name!r}. Use letters and digits.")
        if self.lora is not None and not isinstance(self.model, str):
            raise ValueError(f"Load the LoRA {self.lora} into the pipeline of {self.name}, and leave `lora` out.")
        if self.form not in get_args(Form):
            raise ValueError(f"`form` must be one of {', '.join(get_args(Form))}, got {self.form!r}.")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"A scale must be a finite number above 0, got {self.scale}. The base is scale 0.")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"`interval` must be two noise levels, low before high, in [0, 1], got {self.interval}.")
