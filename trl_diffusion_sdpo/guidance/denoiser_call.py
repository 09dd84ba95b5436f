"""One call of a denoiser by a pipeline: its inputs by name, rows of them, and its output."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

LORA_SCALE = "scale"  # in the pipeline's `cross_attention_kwargs`, `joint_attention_kwargs` or `attention_kwargs`


class DenoiserCall:
    """The arguments of a call.

    Args:
        signature (`inspect.Signature`): Of the denoiser's `forward`, with `self`. Its first input are the latents.
        args, kwargs: As the pipeline gave them.
        shared (`tuple[str, ...]`): Names of the inputs that all rows share.
    """

    def __init__(
        self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], shared: tuple[str, ...]
    ):
        self.args, self.kwargs, self._shared = args, kwargs, shared
        bound = list(signature.bind(None, *args, **kwargs).arguments.items())
        self.inputs: dict[str, Any] = dict(bound[1:])
        self.latents: Any = bound[1][1]  # a tensor, or a list with a tensor for each row
        self.rows = len(self.latents)
        self.everything = slice(0, self.rows)

    @property
    def is_doubled(self) -> bool:
        """Whether both halves of the batch have the same latents."""
        half = self.rows // 2
        if self.rows % 2:
            return False
        if isinstance(self.latents, list):
            return all(map(torch.equal, self.latents[:half], self.latents[half:]))
        return torch.equal(self.latents[:half], self.latents[half:])

    def take(self, *parts: slice) -> dict[str, Any]:
        """The inputs of some rows, one part after the other."""
        return {
            name: value if name in self._shared else self._taken(value, parts, is_input=True)
            for name, value in self.inputs.items()
        }

    def _taken(self, value: Any, parts: tuple[slice, ...], *, is_input: bool = False) -> Any:
        if isinstance(value, torch.Tensor):
            has_rows = value.ndim > 0 and len(value) == self.rows
            return torch.cat([value[part] for part in parts]) if has_rows else value
        if isinstance(value, dict):
            return {name: self._taken(entry, parts) for name, entry in value.items()}
        if isinstance(value, list) and is_input:  # an entry for each row
            return [entry for part in parts for entry in value[part]] if len(value) == self.rows else value
        if isinstance(value, (list, tuple)):
            return type(value)(self._taken(entry, parts) for entry in value)
        return value


def without_lora_scale(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without the scale that a pipeline's call gives to the LoRA that is active."""
    return {
        name: {key: entry for key, entry in value.items() if key != LORA_SCALE}
        if name.endswith("attention_kwargs") and isinstance(value, dict)
        else value
        for name, value in inputs.items()
    }


def prediction_in(output: Any) -> torch.Tensor:
    """The prediction `(N, ...)` in a denoiser's output; some denoisers give a list of rows."""
    prediction = output[0]
    return torch.stack(prediction) if isinstance(prediction, list) else prediction


def with_prediction(output: Any, prediction: torch.Tensor) -> Any:
    """The output with another prediction in it, in the same form."""
    new = list(prediction.unbind()) if isinstance(output[0], list) else prediction
    if isinstance(output, tuple):
        return (new, *output[1:])
    return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: new})
