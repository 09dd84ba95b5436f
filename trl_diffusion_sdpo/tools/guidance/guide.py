"""Replace a denoiser's predictions by combinations of the policy's and the reference's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ...families import Family
from ...models.adapters import unwrap_peft_model
from .arithmetic import guidance_shift, interpolate, shifted
from .denoiser_call import DenoiserCall, prediction_in, with_prediction, without_lora_scale

Form = Literal["conditional", "npo"]


@dataclass(frozen=True)
class Branches:
    """Rows of a denoiser call that are predicted for the prompts (conditional), and for the negative prompts of
    classifier-free guidance (unconditional). A call for another purpose has neither."""

    conditional: slice | None
    unconditional: slice | None


class Guide:
    """Forward hook that guides a denoiser, whose own prediction is the policy's.

    Args:
        family ([`Family`]): Family of the pipeline.
        refer (`Callable`): Runs the reference on inputs of the denoiser, and returns its output. It may call the guided
            denoiser, which is then not guided.
        form, scale, interval: See [`preference_guidance`]. `scale` has no effect if `form` is `"npo"`.
    """

    def __init__(
        self,
        family: Family,
        refer: Callable[[dict[str, Any]], Any],
        form: Form,
        scale: float,
        interval: tuple[float, float] | None,
    ):
        self.calls = 0
        self.calls_within = 0  # calls at a noise level in the interval
        self.guided_calls = 0
        self._family = family
        self._refer = refer
        self._is_referring = False
        self._mix = {"conditional": self._conditional, "npo": self._npo}[form]
        self._scale = scale
        self._interval = interval
        plain = unwrap_peft_model(unwrap_module(family.denoiser))
        self._signature = inspect.signature(type(plain).forward)
        self._latents: Any = None  # latents of the previous call
        self._schedule: Any = None  # timesteps of the scheduler at the previous call
        self._shift: torch.Tensor | None = None  # shift that guidance added to the last conditional prediction

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._is_referring:
            return output
        self.calls += 1
        call = DenoiserCall(self._signature, args, kwargs, self._family.batch_dimensions)
        if not self._is_within(call):
            self._shift = None
            return output
        self.calls_within += 1
        # With CUDA graphs, the reference's pass overwrites this memory.
        policy = prediction_in(output).clone()
        return with_prediction(output, self._mix(call, self._branches(call), policy))

    def _is_within(self, call: DenoiserCall) -> bool:
        if self._interval is None:
            return True
        low, high = self._interval
        return low <= float(self._family.noise_level_of(call.inputs).flatten()[0]) <= high

    def _branches(self, call: DenoiserCall) -> Branches:
        if call.inputs.get("skip_layers") is not None:  # Stable Diffusion 3's extra pass for skip-layer guidance
            return Branches(None, None)
        if self._family.conditional_rows == "all":
            return self._branches_of_calls(call)
        # A doubled batch means classifier-free guidance, unless the pipeline's `do_classifier_free_guidance` is false.
        pipeline: Any = self._family.pipeline
        if not (getattr(pipeline, "do_classifier_free_guidance", True) and call.is_doubled):
            return Branches(call.everything, None)
        first = slice(0, call.rows // 2)
        last = slice(call.rows // 2, call.rows)
        return Branches(last, first) if self._family.conditional_rows == "last" else Branches(first, last)

    def _branches_of_calls(self, call: DenoiserCall) -> Branches:
        """Return the branches for pipelines that call the denoiser twice per step, for the prompts and then for the
        negative prompts, with the same latents."""
        schedule = self._family.pipeline.scheduler.timesteps  # a new tensor each time the pipeline is called
        follows = call.latents is self._latents and schedule is self._schedule
        self._latents = call.latents
        self._schedule = schedule
        return Branches(None, call.everything) if follows else Branches(call.everything, None)

    def _conditional(self, call: DenoiserCall, branches: Branches, policy: torch.Tensor) -> torch.Tensor:
        rows = branches.conditional
        if rows is None:
            assert self._shift is not None, "The conditional prediction comes first."
            return shifted(policy, _fitted(self._shift, policy))
        reference = self._reference(call, rows)
        self._shift = guidance_shift(reference, policy[rows], self._scale)
        if branches.unconditional is None:
            return interpolate(reference, policy, self._scale)
        return shifted(policy, torch.cat([self._shift, self._shift]))

    def shift_unconditional(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook for a separate network for unconditional predictions: add the shift of the last conditional
        prediction to its output."""
        if self._shift is None:  # outside the interval
            return output
        prediction = prediction_in(output)
        return with_prediction(output, shifted(prediction, _fitted(self._shift, prediction)))

    def _npo(self, call: DenoiserCall, branches: Branches, policy: torch.Tensor) -> torch.Tensor:
        if branches.unconditional is not None:
            policy[branches.unconditional] = self._reference(call, branches.unconditional)
        return policy

    def _reference(self, call: DenoiserCall, rows: slice) -> torch.Tensor:
        """Return the reference's prediction for rows of a call."""
        self.guided_calls += 1
        inputs = call.inputs if rows == call.everything else call.take(rows)
        self._is_referring = True
        try:
            return prediction_in(self._refer(without_lora_scale(inputs)))
        finally:
            self._is_referring = False


def without_prompt_cache(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook that drops Qwen-Image 2.1's cache of the prompt's keys and values, which policy and reference
    must not share."""
    return args, {name: value for name, value in kwargs.items() if name not in ("kv_cache", "kv_cache_mode")}


def _fitted(shift: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Return a shift in the shape of a prediction. If a denoiser's output starts with prompt tokens, and prompt and
    negative prompt differ in length, the shift of prompt tokens is cut off or filled with zeros."""
    if shift.shape == prediction.shape:
        return shift
    tokens = min(shift.shape[1], prediction.shape[1])
    fitted = shift.new_zeros(prediction.shape)
    fitted[:, -tokens:] = shift[:, -tokens:]
    return fitted
