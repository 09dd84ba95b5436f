"""A pipeline's call of its denoiser: read its inputs by name, select rows of them, and replace the prediction."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

LORA_SCALE = "scale"  # key of the LoRA scale in a pipeline's `cross_attention_kwargs` or similar arguments


class DenoiserCall:
    """Arguments that a pipeline passes in one call of its denoiser.

    Args:
        signature (`inspect.Signature`): Signature of the denoiser's `forward`, whose first arguments must be `self` and
            the latents.
        args, kwargs: Arguments that the pipeline passed.
        batch_dimensions (`dict[str, int | None]`): See [`~trl_diffusion_sdpo.families.Family`].
    """

    def __init__(
        self,
        signature: inspect.Signature,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_dimensions: Mapping[str, int | None],
    ):
        self._batch_dimensions = batch_dimensions
        bound = list(signature.bind(None, *args, **kwargs).arguments.items())
        self.inputs: dict[str, Any] = dict(bound[1:])
        self.latents: Any = bound[1][1]  # a tensor, or a list with one for each row of the batch
        self.rows = len(self.latents)
        self.everything = slice(0, self.rows)

    @property
    def is_doubled(self) -> bool:
        """Whether the two halves of the batch have the same latents, as under classifier-free guidance."""
        half = self.rows // 2
        if self.rows % 2:
            return False
        if isinstance(self.latents, list):
            return all(map(torch.equal, self.latents[:half], self.latents[half:]))
        return torch.equal(self.latents[:half], self.latents[half:])

    def take(self, rows: slice) -> dict[str, Any]:
        """Return the inputs of these rows of the batch."""
        selected = {}
        for name, value in self.inputs.items():
            dimension = self._batch_dimensions.get(name, 0)
            if dimension is None:
                selected[name] = value
            elif dimension == 0:
                selected[name] = self._select(value, rows, is_input=True)
            else:
                selected[name] = value.narrow(dimension, rows.start, rows.stop - rows.start)
        return selected

    def _select(self, value: Any, rows: slice, *, is_input: bool = False) -> Any:
        if isinstance(value, torch.Tensor):
            has_rows = value.ndim > 0 and len(value) == self.rows
            return value[rows] if has_rows else value
        if isinstance(value, dict):
            return {name: self._select(entry, rows) for name, entry in value.items()}
        if isinstance(value, list) and is_input:  # one entry for each row
            return value[rows] if len(value) == self.rows else value
        if isinstance(value, (list, tuple)):
            return type(value)(self._select(entry, rows) for entry in value)
        return value


def without_lora_scale(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs without the LoRA scale that a pipeline may pass in its attention arguments: the policy's must
    not act on the reference."""
    return {
        name: {key: entry for key, entry in value.items() if key != LORA_SCALE}
        if name.endswith("attention_kwargs") and isinstance(value, dict)
        else value
        for name, value in inputs.items()
    }


def prediction_in(output: Any) -> torch.Tensor:
    """Return the prediction `(N, ...)` from a denoiser's output, stacking a list of one tensor per row."""
    prediction = output[0]
    return torch.stack(prediction) if isinstance(prediction, list) else prediction


def with_prediction(output: Any, prediction: torch.Tensor) -> Any:
    """Return a copy of a denoiser's output with `prediction` in place of its own."""
    new = list(prediction.unbind()) if isinstance(output[0], list) else prediction
    if isinstance(output, tuple):
        return (new, *output[1:])
    return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: new})
