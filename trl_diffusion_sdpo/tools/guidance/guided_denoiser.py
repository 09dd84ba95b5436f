"""Make a pipeline's denoiser return a combination of the predictions of policy and reference."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ...families import Family
from ...models.adapters import unwrap_peft_model
from .arithmetic import guidance_shift, interpolate, shifted
from .denoiser_call import DenoiserCall, prediction_in, with_prediction
from .predictors import Predictor

Form = Literal["conditional", "both", "npo"]
_ATTRIBUTE = "_preference_guidance"


@dataclass(frozen=True)
class Branches:
    """The rows of a denoiser call that are predicted for the prompts (conditional), and those that are predicted for
    the negative prompts of classifier-free guidance (unconditional). A call for another purpose has no rows of either
    kind."""

    conditional: slice | None
    unconditional: slice | None


class Guide:
    """Function that a guided denoiser runs instead of its normal `__call__`.

    Args:
        family ([`Family`]): Family of the pipeline.
        predictor ([`Predictor`]): Object that computes the predictions of policy and reference.
        form, scale, interval: See [`preference_guidance`]. `scale` must be 1 if `form` is `"npo"`.
    """

    def __init__(
        self, family: Family, predictor: Predictor, form: Form, scale: float, interval: tuple[float, float] | None
    ):
        self.calls = self.calls_within = self.guided_calls = 0
        self._family = family
        self._predictor = predictor
        self._scale = scale
        self._interval = interval
        self._mix = {"conditional": self._conditional, "both": self._both, "npo": self._npo}[form]
        self._is_plain = form != "npo" and scale == 1
        plain = unwrap_peft_model(unwrap_module(family.denoiser))
        self._signature = inspect.signature(type(plain).forward)
        self._latents: Any = None  # latents of the previous call
        self._schedule: Any = None  # timesteps of the scheduler at the previous call
        self._shift: torch.Tensor | None = None  # shift that guidance added to the last conditional prediction

    def __call__(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        if self._is_plain:
            return denoiser(*args, **kwargs)
        # Qwen-Image 2.1 caches the prompt's keys and values. Policy and reference must not share this cache.
        kwargs = {name: value for name, value in kwargs.items() if name not in ("kv_cache", "kv_cache_mode")}
        call = DenoiserCall(self._signature, args, kwargs, self._family.batch_dimensions)
        if not self._is_within(call):
            self._shift = None
            return denoiser(*args, **kwargs)
        self.calls_within += 1
        return self._mix(denoiser, call, self._branches(call))

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
        first, last = slice(0, call.rows // 2), slice(call.rows // 2, call.rows)
        return Branches(last, first) if self._family.conditional_rows == "last" else Branches(first, last)

    def _branches_of_calls(self, call: DenoiserCall) -> Branches:
        """Return the branches for pipelines that call the denoiser twice per step: first for the prompts, then for the
        negative prompts. If a call has the same latents as the previous call, this call is the second of its step."""
        schedule = self._family.pipeline.scheduler.timesteps  # a new tensor each time the pipeline is called
        follows = call.latents is self._latents and schedule is self._schedule
        self._latents, self._schedule = call.latents, schedule
        return Branches(None, call.everything) if follows else Branches(call.everything, None)

    def _both(self, denoiser: Callable[..., Any], call: DenoiserCall, branches: Branches) -> Any:
        rows = call.everything
        policy, reference, output = self._predictor.predict(denoiser, call, rows if self._scale else None, rows)
        assert reference is not None
        self.guided_calls += 1
        return with_prediction(output, reference if policy is None else interpolate(reference, policy, self._scale))

    def _conditional(self, denoiser: Callable[..., Any], call: DenoiserCall, branches: Branches) -> Any:
        rows = branches.conditional
        policy, reference, output = self._predictor.predict(denoiser, call, call.everything, rows)
        assert policy is not None
        if rows is None:
            assert self._shift is not None, "The conditional prediction comes first."
            return with_prediction(output, shifted(policy, _fitted(self._shift, policy)))
        assert reference is not None
        self.guided_calls += 1
        self._shift = guidance_shift(reference, policy[rows], self._scale)
        if branches.unconditional is None:
            return with_prediction(output, interpolate(reference, policy, self._scale))
        return with_prediction(output, shifted(policy, torch.cat([self._shift, self._shift])))

    def shift_unconditional(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook for a separate network that makes the unconditional predictions: add the shift of the last
        conditional prediction to its output."""
        if self._shift is None:  # outside the interval
            return output
        prediction = prediction_in(output)
        return with_prediction(output, shifted(prediction, _fitted(self._shift, prediction)))

    def _npo(self, denoiser: Callable[..., Any], call: DenoiserCall, branches: Branches) -> Any:
        conditional, unconditional = branches.conditional, branches.unconditional
        if unconditional is None:
            return denoiser(*call.args, **call.kwargs)
        self.guided_calls += 1
        policy, reference, output = self._predictor.predict(denoiser, call, conditional, unconditional)
        assert reference is not None
        if policy is None:
            return with_prediction(output, reference)
        assert conditional is not None
        halves = (policy, reference) if conditional.start == 0 else (reference, policy)
        return with_prediction(output, torch.cat(halves))


def _fitted(shift: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Return a shift in the shape of a prediction. The shapes differ if a denoiser's output contains prompt tokens
    before the image tokens, and prompt and negative prompt have different lengths. The shift of prompt tokens is then
    cut off or filled with zeros."""
    if shift.shape == prediction.shape:
        return shift
    tokens = min(shift.shape[1], prediction.shape[1])
    fitted = shift.new_zeros(prediction.shape)
    fitted[:, -tokens:] = shift[:, -tokens:]
    return fitted


def is_guided(denoiser: nn.Module) -> bool:
    return _ATTRIBUTE in vars(denoiser)


def guide(denoiser: nn.Module, guide: Guide) -> None:
    """Make all calls of a denoiser run `guide`, until [`leave`] is called.

    The denoiser's class is replaced by a subclass with another `__call__`. Replacing `forward` would not work:
    accelerate's hooks replace `forward` themselves in every call of an offloaded pipeline, and compiled modules have no
    `forward` to replace.
    """
    vars(denoiser)[_ATTRIBUTE] = guide
    _set_class(denoiser, _guided_class(cast(Any, type(denoiser))))


def leave(denoiser: nn.Module) -> None:
    """Undo what [`guide`] did to a denoiser."""
    _set_class(denoiser, type(denoiser).__base__)
    del vars(denoiser)[_ATTRIBUTE]


def _set_class(denoiser: nn.Module, new: Any) -> None:
    object.__setattr__(denoiser, "__class__", new)  # `setattr` on a compiled module would change the inner module


@functools.cache  # one class per denoiser class, so that torch.compile recompiles a denoiser only once
def _guided_class(original: Any) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        guide: Guide = vars(self)[_ATTRIBUTE]
        return guide(functools.partial(original.__call__, self), args, kwargs)

    names = {"__call__": __call__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original)(original.__name__, (original,), names)
